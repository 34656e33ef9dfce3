// The eight weights of one mask byte, between memory and registers. Where all are there and aligned, that
// is 16 bytes at a time; at the end of a row of odd length, and in rows that are not aligned, one by one.
// Vectors are streamed: nothing is read again before the next step, and an access that is called by name is
// one that no compiler takes apart.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "../dtypes.h"
#include "shares.h"

namespace sparseopt::cuda {

__device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0;
}

// `count` of the weights are in memory, the others stay as they are.
template <class Stored>
__device__ __forceinline__ void read(Stored (&to)[kLanes], const Stored* from, int count, bool vectors) {
  if (vectors) {
    constexpr int kVectors = sizeof to / sizeof(uint4);
    uint4 raw[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) raw[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
    std::memcpy(to, raw, sizeof to);
  } else {
#pragma unroll
    for (int i = 0; i < kLanes; ++i)
      if (i < count) to[i] = from[i];
  }
}

template <class Stored>
__device__ __forceinline__ void write(Stored* to, const Stored (&from)[kLanes], int count, bool vectors) {
  if (vectors) {
    constexpr int kVectors = sizeof from / sizeof(uint4);
    uint4 raw[kVectors];
    std::memcpy(raw, from, sizeof from);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) __stcs(reinterpret_cast<uint4*>(to) + i, raw[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kLanes; ++i)
      if (i < count) to[i] = from[i];
  }
}

}  // namespace sparseopt::cuda
