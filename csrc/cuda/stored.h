// Weights in registers, as they are stored: two of half precision share one. What converts them has an
// instruction of the GPU for it; dtypes.h has the same in integer arithmetic, with another NaN for NaN.
#pragma once

#include <cuda_runtime.h>

#include "../dtypes.h"

namespace sparseopt::cuda {

// `Word` is what a register holds, kCount the weights in it, `Raw` one of them in memory.
template <class Stored>
struct Word {
  using Raw = Stored;
  using type = Stored;
  static constexpr int kCount = 1;

  static __device__ __forceinline__ Stored unpack(Stored word, int) { return word; }
  static __device__ __forceinline__ Stored pack(const Stored (&values)[kCount]) { return values[0]; }
};

struct HalfWord {
  using Raw = uint16_t;
  using type = uint32_t;
  static constexpr int kCount = 2;

  static __device__ __forceinline__ uint16_t raw(uint32_t word, int i) {
    return static_cast<uint16_t>(word >> (16 * i));
  }
};

template <>
struct Word<Half> : HalfWord {
  static __device__ __forceinline__ float unpack(uint32_t word, int i) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(raw(word, i)));
    return value;
#else
    return load(Half{raw(word, i)});
#endif
  }

  static __device__ __forceinline__ uint32_t pack(const float (&values)[kCount]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
    return word;
#else
    Half low, high;
    store(low, values[0]);
    store(high, values[1]);
    return low.bits | uint32_t(high.bits) << 16;
#endif
  }
};

template <>
struct Word<BFloat16> : HalfWord {
  static __device__ __forceinline__ float unpack(uint32_t word, int i) {
    return load(BFloat16{raw(word, i)});
  }

  static __device__ __forceinline__ uint32_t pack(const float (&values)[kCount]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
    return word;
#else
    BFloat16 low, high;
    store(low, values[0]);
    store(high, values[1]);
    return low.bits | uint32_t(high.bits) << 16;
#endif
  }
};

}  // namespace sparseopt::cuda
