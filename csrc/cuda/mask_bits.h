// The boolean mask of a tensor, a byte per weight, as bits: the first weight's bit is the lowest. A byte
// other than 0 is true.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparseopt::cuda {

// Of four bytes, a bit each.
__device__ __forceinline__ unsigned bits_of_bytes(uint32_t bytes) {
  const uint32_t high = (((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u;
  return ((high >> 7) * 0x10204080u) >> 28;
}

// The bits of `count` bytes, up to kLanes. Aligned bytes are loaded by words of `Word`.
template <int kLanes, class Word>
__device__ __forceinline__ unsigned mask_bits(const uint8_t* mask, int count) {
  static_assert(kLanes % sizeof(Word) == 0 && sizeof(Word) % sizeof(uint32_t) == 0, "whole words");
  unsigned bits = 0;
  if (count >= kLanes && reinterpret_cast<uintptr_t>(mask) % sizeof(Word) == 0) {
#pragma unroll
    for (int i = 0; i < kLanes / int(sizeof(Word)); ++i) {
      const Word word = __ldg(reinterpret_cast<const Word*>(mask) + i);
#pragma unroll
      for (int part = 0; part < int(sizeof(Word)); part += 4)
        bits |= bits_of_bytes(static_cast<uint32_t>(word >> (8 * part))) << (i * int(sizeof(Word)) + part);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLanes; ++i)
      if (i < count) bits |= unsigned(__ldg(mask + i) != 0) << i;
  }
  return bits;
}

}  // namespace sparseopt::cuda
