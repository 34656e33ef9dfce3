// The update rule for the weights that a thread has: which rule it is, and the choice among its variants.
#pragma once

#include <cuda_runtime.h>

#include "../dtypes.h"
#include "../update_rule.h"
#include "argument.h"
#include "lanes.h"

namespace sparseopt::cuda {

// The rule of one tensor.
template <class T>
struct TensorRule {
  Coefficients<T> k;
  T gamma;  // with the sign of `maximize` and AMP's scale in it
  bool momentum, nesterov, ham;

  __device__ __forceinline__ TensorRule(const InputArgument<T>& inputs, const RuleArgument<T>& rule,
                                        bool has_b, bool wants_ham)
      : k(rule.coefficients), momentum(has_b), nesterov(rule.nesterov), ham(rule.ham && wants_ham) {
    gamma = rule.gamma_address != nullptr ? *rule.gamma_address : rule.gamma;
    if (inputs.grad_scale != nullptr) gamma /= static_cast<T>(*inputs.grad_scale);
    if (rule.maximize) gamma = -gamma;
    if (rule.lr_address != nullptr) k.lr = *rule.lr_address;
  }

  // Updates the lanes whose bits are set; the others stay as they are. `c` is c_i of all of them.
  template <class Stored, int kLanes>
  __device__ __forceinline__ void operator()(Lanes<Stored, kLanes>& p, const Lanes<Stored, kLanes>& g,
                                             Lanes<Stored, kLanes>& b, unsigned active, T c) const {
    const T scale = c * gamma;
    if (ham) {
      if (!momentum)
        lanes<Momentum::kNone, true>(p, g, b, active, scale);
      else if (nesterov)
        lanes<Momentum::kNesterov, true>(p, g, b, active, scale);
      else
        lanes<Momentum::kHeavyBall, true>(p, g, b, active, scale);
    } else {
      if (!momentum)
        lanes<Momentum::kNone, false>(p, g, b, active, scale);
      else if (nesterov)
        lanes<Momentum::kNesterov, false>(p, g, b, active, scale);
      else
        lanes<Momentum::kHeavyBall, false>(p, g, b, active, scale);
    }
  }

 private:
  template <Momentum kMomentum, bool kHam, class Stored, int kLanes>
  __device__ __forceinline__ void lanes(Lanes<Stored, kLanes>& p, const Lanes<Stored, kLanes>& g,
                                        Lanes<Stored, kLanes>& b, unsigned active, T scale) const {
    constexpr int kPerWord = Lanes<Stored, kLanes>::kPerWord;
#pragma unroll
    for (int word = 0; word < kLanes / kPerWord; ++word) {
      T new_p[kPerWord], new_b[kPerWord];
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        const int lane = word * kPerWord + i;
        new_p[i] = p.get(lane);
        new_b[i] = b.get(lane);
        update_weight<kMomentum, kHam>(new_p[i], scale * g.get(lane), new_b[i], k);
      }
      p.replace(word, new_p, active);
      if (kMomentum != Momentum::kNone) b.replace(word, new_b, active);
    }
  }
};

}  // namespace sparseopt::cuda
