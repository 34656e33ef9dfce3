// Packs a boolean mask, a byte per weight, into bits. The lowest is that of the first weight. Any byte but 0
// is true.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparseopt::cuda {

// Returns a bit for each of four bytes.
__device__ __forceinline__ unsigned bits_of_bytes(uint32_t bytes) {
  const uint32_t high = (((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u;
  return ((high >> 7) * 0x10204080u) >> 28;
}

// Returns the bits of `count` bytes, of kWeights at most. These are loaded as integers `Access` if all are
// there and aligned.
template <int kWeights, class Access>
__device__ __forceinline__ unsigned mask_bits(const uint8_t* mask, int count) {
  static_assert(kWeights % sizeof(Access) == 0 && sizeof(Access) % sizeof(uint32_t) == 0, "whole accesses");
  unsigned bits = 0;
  if (count >= kWeights && reinterpret_cast<uintptr_t>(mask) % sizeof(Access) == 0) {
#pragma unroll
    for (int i = 0; i < kWeights / int(sizeof(Access)); ++i) {
      const Access bytes = __ldg(reinterpret_cast<const Access*>(mask) + i);
#pragma unroll
      for (int part = 0; part < int(sizeof(Access)); part += 4)
        bits |= bits_of_bytes(static_cast<uint32_t>(bytes >> (8 * part))) << (i * int(sizeof(Access)) + part);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWeights; ++i)
      if (i < count) bits |= unsigned(__ldg(mask + i) != 0) << i;
  }
  return bits;
}

}  // namespace sparseopt::cuda
