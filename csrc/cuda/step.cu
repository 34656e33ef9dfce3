// One step: the update rule over all tensors of a launch, in place.
#include "../dtypes.h"
#include "../update_rule.h"
#include "argument.h"
#include "check.h"
#include "octet.h"
#include "rows.h"

namespace sparseopt::cuda {
namespace {

template <Momentum kMomentum, bool kHam, class T>
__device__ __forceinline__ void update_lanes(T (&p)[kLanes], const T (&g)[kLanes], T (&b)[kLanes], T scale,
                                             const Coefficients<T>& k) {
#pragma unroll
  for (int i = 0; i < kLanes; ++i) update_weight<kMomentum, kHam>(p[i], scale * g[i], b[i], k);
}

// What is done to the weights of one mask byte of one tensor.
template <class Stored>
struct Update {
  using T = typename ArithmeticOf<Stored>::type;

  Stored* p;
  const Stored* g;
  Stored* b;
  Coefficients<T> k;
  T signed_gamma;
  bool nesterov, ham;

  __device__ __forceinline__ void lanes(T (&p_)[kLanes], const T (&g_)[kLanes], T (&b_)[kLanes],
                                        T scale) const {
    if (ham) {
      if (b == nullptr)
        update_lanes<Momentum::kNone, true>(p_, g_, b_, scale, k);
      else if (nesterov)
        update_lanes<Momentum::kNesterov, true>(p_, g_, b_, scale, k);
      else
        update_lanes<Momentum::kHeavyBall, true>(p_, g_, b_, scale, k);
    } else {
      if (b == nullptr)
        update_lanes<Momentum::kNone, false>(p_, g_, b_, scale, k);
      else if (nesterov)
        update_lanes<Momentum::kNesterov, false>(p_, g_, b_, scale, k);
      else
        update_lanes<Momentum::kHeavyBall, false>(p_, g_, b_, scale, k);
    }
  }

  // Everything is read before anything is written: three streams are under way at once.
  __device__ __forceinline__ void operator()(int64_t offset, int count, unsigned active, T c) const {
    Stored stored_p[kLanes] = {}, stored_g[kLanes] = {}, stored_b[kLanes] = {};
    const bool vectors = count == kLanes && is_aligned(p + offset) && is_aligned(g + offset) &&
                         (b == nullptr || is_aligned(b + offset));
    read(stored_p, p + offset, count, vectors);
    read(stored_g, g + offset, count, vectors);
    if (b != nullptr) read(stored_b, b + offset, count, vectors);
    T p_[kLanes], g_[kLanes], b_[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      p_[i] = load(stored_p[i]);
      g_[i] = load(stored_g[i]);
      b_[i] = load(stored_b[i]);
    }
    lanes(p_, g_, b_, c * signed_gamma);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const bool keep = ((active >> i) & 1u) != 0;
      store(stored_p[i], keep ? p_[i] : T(0));
      store(stored_b[i], keep ? b_[i] : T(0));
    }
    write(p + offset, stored_p, count, vectors);
    if (b != nullptr) write(b + offset, stored_b, count, vectors);
  }
};

// Half of what a multiprocessor can hold: at 64 registers a thread there are enough reads under way. The
// double kernel would have to spill.
template <class T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == sizeof(float) ? 4 : 1;

template <class Stored, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    step_kernel(const __grid_constant__ Argument<T> argument) {
  if (argument.found_inf != nullptr && *argument.found_inf != 0.0f) return;
  const Share share = share_of(argument, blockIdx.x);
  const TensorArgument& tensor = argument.tensors[share.tensor];
  const RuleArgument<T>& rule = argument.rules[tensor.rule];
  T gamma = rule.gamma_address != nullptr ? *rule.gamma_address : rule.gamma;
  if (argument.grad_scale != nullptr) gamma /= static_cast<T>(*argument.grad_scale);

  Update<Stored> update{static_cast<Stored*>(tensor.parameter),
                        static_cast<const Stored*>(tensor.grad),
                        static_cast<Stored*>(tensor.momentum_buffer),
                        rule.coefficients,
                        rule.maximize ? -gamma : gamma,
                        rule.nesterov,
                        rule.ham && tensor.ham};
  if (rule.lr_address != nullptr) update.k.lr = *rule.lr_address;
  for_each_byte<T>(tensor, rule.correction, share, update);
}

template <class Stored>
void step_stored(const Table& table, const Step& step, uintptr_t stream) {
  using T = typename ArithmeticOf<Stored>::type;
  for (const Launch& of : table.launches())
    launch("launching the step", step_kernel<Stored, T>, of.blocks, kThreads, stream,
           argument_of<T>(table, of, step));
}

}  // namespace

int step(const Table& table, const Step& step, uintptr_t stream) {
  switch (table.dtype()) {
    case Dtype::kFloat32:
      step_stored<float>(table, step, stream);
      break;
    case Dtype::kFloat64:
      step_stored<double>(table, step, stream);
      break;
    case Dtype::kBFloat16:
      step_stored<BFloat16>(table, step, stream);
      break;
    case Dtype::kFloat16:
      step_stored<Half>(table, step, stream);
      break;
  }
  return static_cast<int>(table.launches().size());
}

}  // namespace sparseopt::cuda
