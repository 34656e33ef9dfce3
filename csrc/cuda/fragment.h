// The weights that a thread holds in registers, and their loads and stores: of 16 bytes if all weights are
// there and aligned, else (at the end of a row or a tensor, say) of one weight. All are streaming accesses,
// because nothing is read again before the next step. They are intrinsics, which no compiler takes apart.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "stored.h"

namespace sparseopt::cuda {

__device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0;
}

template <class Stored, int kWeights>
class Fragment {
  using Register = cuda::Register<Stored>;
  using Raw = typename Register::Raw;
  using T = typename ArithmeticOf<Stored>::type;

 public:
  static constexpr int kPerRegister = Register::kCount, kRegisters = kWeights / kPerRegister;

  // Reads `count` weights. The others become zeros.
  __device__ __forceinline__ void read(const Stored* from, int count, bool vectors) {
    if (vectors) {
      uint4 raw[kAccesses];
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) raw[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
      std::memcpy(registers_, raw, sizeof registers_);
    } else {
      const Raw* raw = reinterpret_cast<const Raw*>(from);
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        registers_[r] = 0;
#pragma unroll
        for (int i = 0; i < kPerRegister; ++i)
          if (r * kPerRegister + i < count) add(r, i, __ldcs(raw + r * kPerRegister + i));
      }
    }
  }

  __device__ __forceinline__ void write(Stored* to, int count, bool vectors) const {
    if (vectors) {
      uint4 raw[kAccesses];
      std::memcpy(raw, registers_, sizeof registers_);
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) __stcs(reinterpret_cast<uint4*>(to) + i, raw[i]);
    } else {
      Raw* at = reinterpret_cast<Raw*>(to);
#pragma unroll
      for (int i = 0; i < kWeights; ++i)
        if (i < count) __stcs(at + i, raw(i));
    }
  }

  __device__ __forceinline__ T get(int i) const {
    return Register::unpack(registers_[i / kPerRegister], i % kPerRegister);
  }

  // Replaces the weights of register `r` whose bits are 1: bit i is that of weight i of the fragment.
  __device__ __forceinline__ void replace(int r, const T (&values)[kPerRegister], unsigned bits) {
    const auto packed = Register::pack(values);
    if constexpr (kPerRegister == 1) {
      registers_[r] = ((bits >> r) & 1u) != 0 ? packed : registers_[r];
    } else {
      const uint32_t chosen = mask_of_pair(bits >> (2 * r));
      registers_[r] = (packed & chosen) | (registers_[r] & ~chosen);
    }
  }

  // Zeroes the weights whose bits are 0.
  __device__ __forceinline__ void clear_inactive(unsigned active) {
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      if constexpr (kPerRegister == 1)
        registers_[r] = ((active >> r) & 1u) != 0 ? registers_[r] : Stored(0);
      else
        registers_[r] &= mask_of_pair(active >> (2 * r));
    }
  }

 private:
  static constexpr int kAccesses = kWeights * sizeof(Stored) / sizeof(uint4);

  // Returns a mask of the halves of a register: the lowest two bits stand for them.
  static __device__ __forceinline__ uint32_t mask_of_pair(unsigned bits) {
    return ((bits & 1u) | (bits & 2u) << 15) * 0xffffu;
  }

  __device__ __forceinline__ Raw raw(int i) const {
    if constexpr (kPerRegister == 1)
      return registers_[i];
    else
      return Register::raw(registers_[i / 2], i % 2);
  }

  // Puts weight i into register `r`, which has zero there.
  __device__ __forceinline__ void add(int r, int i, Raw value) {
    if constexpr (kPerRegister == 1)
      registers_[r] = value;
    else
      registers_[r] |= uint32_t(value) << (16 * i);
  }

  typename Register::type registers_[kRegisters] = {};
};

}  // namespace sparseopt::cuda
