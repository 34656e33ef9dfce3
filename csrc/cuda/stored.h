// Weights in registers, as they are stored: two of half precision share one. GPUs have instructions that
// convert them; dtypes.h has the same in integer arithmetic, with another NaN for NaN.
#pragma once

#include <cuda_runtime.h>

#include "../dtypes.h"

namespace sparseopt::cuda {

// A register, or two for double: kCount weights, of type `type`. `Raw` is a weight in memory.
template <class Stored>
struct Register {
  using Raw = Stored;
  using type = Stored;
  static constexpr int kCount = 1;

  static __device__ __forceinline__ Stored unpack(Stored reg, int) { return reg; }
  static __device__ __forceinline__ Stored pack(const Stored (&values)[kCount]) { return values[0]; }
};

struct PairRegister {
  using Raw = uint16_t;
  using type = uint32_t;
  static constexpr int kCount = 2;

  static __device__ __forceinline__ uint16_t raw(uint32_t reg, int i) {
    return static_cast<uint16_t>(reg >> (16 * i));
  }
};

template <>
struct Register<Half> : PairRegister {
  static __device__ __forceinline__ float unpack(uint32_t reg, int i) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(raw(reg, i)));
    return value;
#else
    return load(Half{raw(reg, i)});
#endif
  }

  static __device__ __forceinline__ uint32_t pack(const float (&values)[kCount]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t reg;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(reg) : "f"(values[1]), "f"(values[0]));
    return reg;
#else
    Half low, high;
    store(low, values[0]);
    store(high, values[1]);
    return low.bits | uint32_t(high.bits) << 16;
#endif
  }
};

template <>
struct Register<BFloat16> : PairRegister {
  static __device__ __forceinline__ float unpack(uint32_t reg, int i) { return load(BFloat16{raw(reg, i)}); }

  static __device__ __forceinline__ uint32_t pack(const float (&values)[kCount]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t reg;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(reg) : "f"(values[1]), "f"(values[0]));
    return reg;
#else
    BFloat16 low, high;
    store(low, values[0]);
    store(high, values[1]);
    return low.bits | uint32_t(high.bits) << 16;
#endif
  }
};

}  // namespace sparseopt::cuda
