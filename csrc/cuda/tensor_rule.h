// The update rule for the weights of a fragment: the numbers of the rule, and the choice among its variants.
#pragma once

#include <cuda_runtime.h>

#include "../dtypes.h"
#include "../update_rule.h"
#include "argument.h"
#include "fragment.h"

namespace sparseopt::cuda {

// The rule of a tensor.
template <class T>
struct TensorRule {
  Coefficients<T> k;
  T gamma;  // including the sign of `maximize` and AMP's scale
  bool momentum, nesterov, ham;

  __device__ __forceinline__ TensorRule(const InputArgument<T>& inputs, const RuleArgument<T>& rule,
                                        bool has_b, bool wants_ham)
      : k(rule.coefficients), momentum(has_b), nesterov(rule.nesterov), ham(rule.ham && wants_ham) {
    gamma = rule.gamma_address != nullptr ? *rule.gamma_address : rule.gamma;
    if (inputs.grad_scale != nullptr) gamma /= static_cast<T>(*inputs.grad_scale);
    if (rule.maximize) gamma = -gamma;
    if (rule.lr_address != nullptr) k.lr = *rule.lr_address;
  }

  // Updates the weights whose bits in `active` are 1, all with c_i = c. The others stay as they are.
  template <class Stored, int kWeights>
  __device__ __forceinline__ void operator()(Fragment<Stored, kWeights>& p,
                                             const Fragment<Stored, kWeights>& g,
                                             Fragment<Stored, kWeights>& b, unsigned active, T c) const {
    const T scale = c * gamma;
    if (ham) {
      if (!momentum)
        update<Momentum::kNone, true>(p, g, b, active, scale);
      else if (nesterov)
        update<Momentum::kNesterov, true>(p, g, b, active, scale);
      else
        update<Momentum::kHeavyBall, true>(p, g, b, active, scale);
    } else {
      if (!momentum)
        update<Momentum::kNone, false>(p, g, b, active, scale);
      else if (nesterov)
        update<Momentum::kNesterov, false>(p, g, b, active, scale);
      else
        update<Momentum::kHeavyBall, false>(p, g, b, active, scale);
    }
  }

 private:
  template <Momentum kMomentum, bool kHam, class Stored, int kWeights>
  __device__ __forceinline__ void update(Fragment<Stored, kWeights>& p, const Fragment<Stored, kWeights>& g,
                                         Fragment<Stored, kWeights>& b, unsigned active, T scale) const {
    constexpr int kPerRegister = Fragment<Stored, kWeights>::kPerRegister;
#pragma unroll
    for (int r = 0; r < kWeights / kPerRegister; ++r) {
      T new_p[kPerRegister], new_b[kPerRegister];
#pragma unroll
      for (int i = 0; i < kPerRegister; ++i) {
        const int weight = r * kPerRegister + i;
        new_p[i] = p.get(weight);
        new_b[i] = b.get(weight);
        update_weight<kMomentum, kHam>(new_p[i], scale * g.get(weight), new_b[i], k);
      }
      p.replace(r, new_p, active);
      if (kMomentum != Momentum::kNone) b.replace(r, new_b, active);
    }
  }
};

}  // namespace sparseopt::cuda
