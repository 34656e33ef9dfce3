// The update rule of SparseOpt for one weight, for host and device. The loops around it read memory and
// masks. T is float or double, or a vector of these that has multiply_add, select and exponential of its own.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define SPARSEOPT_INLINE static __host__ __device__ __forceinline__
#else
// Internal linkage and always inlined: this header is compiled for several instruction sets, and the
// linker must not pick one set's copy of a function for all.
#define SPARSEOPT_INLINE static inline __attribute__((always_inline))
#endif

namespace sparseopt {

enum class Momentum { kNone, kHeavyBall, kNesterov };

// The hyperparameters in the type of the arithmetic: double for float64, else float.
template <class T>
struct Coefficients {
  T lr;        // eta
  T momentum;  // mu
  T one_minus_dampening;
  T weight_decay;  // lambda
  T ham_alpha;
  T ham_beta;
};

// Returns `a` if the choice is true, else `b`.
template <class T>
SPARSEOPT_INLINE T select(bool choice, T a, T b) {
  return choice ? a : b;
}

SPARSEOPT_INLINE float exponential(float x) { return std::exp(x); }
SPARSEOPT_INLINE double exponential(double x) { return std::exp(x); }

// Returns a * b + c, rounded once if the hardware can, as in PyTorch's own CPU kernels: so a float64 step
// without a mask equals torch.optim.SGD bit for bit.
template <class T>
SPARSEOPT_INLINE T multiply_add(T a, T b, T c) {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__) || defined(__FMA__) || defined(__aarch64__) || \
    defined(__FP_FAST_FMA)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Returns c_i = sqrt(fan_in_i / divisor), exactly 1 if both are equal. The divisor is the layer's mean fan-in
// (Eq. 12), or the full fan-in (sqrt(1 - s_i), not normalised).
template <class T>
SPARSEOPT_INLINE T correction_factor(int64_t fan_in, T divisor) {
  return std::sqrt(static_cast<T>(fan_in) / divisor);
}

// Updates a weight p and its momentum b by the corrected gradient g = +-c_i * gamma * gradient (minus to
// maximise).
template <Momentum kMomentum, bool kHam, class T>
SPARSEOPT_INLINE void update_weight(T& p, T g, T& b, const Coefficients<T>& k) {
  // Not added if it is 0, because 0 * inf would make an infinite weight NaN.
  const T d = select(k.weight_decay == T(0), g, multiply_add(k.weight_decay, p, g));
  T u = d;
  if (kMomentum != Momentum::kNone) {
    b = multiply_add(k.one_minus_dampening, d, k.momentum * b);
    u = kMomentum == Momentum::kNesterov ? multiply_add(k.momentum, b, d) : b;
  }
  p = multiply_add(-k.lr, u, p);
  if (kHam) {
    const T negative = select(p < T(0), T(-1), T(0));
    const T sign = select(p > T(0), T(1), negative);
    T exponent = -k.lr * multiply_add(k.ham_alpha * sign, g, k.ham_beta);
    exponent = select(exponent < T(-5), T(-5), exponent);
    exponent = select(exponent > T(5), T(5), exponent);
    p = p * exponential(exponent);
  }
}

}  // namespace sparseopt
