// The weights that a thread has at a time, between memory and registers. Where all are there and aligned,
// that is 16 bytes at a time; at the end of a row or a tensor, and where memory is not aligned, one by one.
// All are streamed: nothing is read again before the next step, and an access that is called by name is one
// that no compiler takes apart.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "stored.h"

namespace sparseopt::cuda {

__device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0;
}

template <class Stored, int kLanes>
class Lanes {
  using Word = cuda::Word<Stored>;
  using Raw = typename Word::Raw;
  using T = typename ArithmeticOf<Stored>::type;

 public:
  static constexpr int kPerWord = Word::kCount, kWords = kLanes / kPerWord;

  // `count` of the weights are in memory, the others become zeros.
  __device__ __forceinline__ void read(const Stored* from, int count, bool vectors) {
    if (vectors) {
      uint4 raw[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) raw[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
      std::memcpy(words_, raw, sizeof words_);
    } else {
      const Raw* raw = reinterpret_cast<const Raw*>(from);
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        words_[word] = 0;
#pragma unroll
        for (int i = 0; i < kPerWord; ++i)
          if (word * kPerWord + i < count) add(word, i, __ldcs(raw + word * kPerWord + i));
      }
    }
  }

  __device__ __forceinline__ void write(Stored* to, int count, bool vectors) const {
    if (vectors) {
      uint4 raw[kVectors];
      std::memcpy(raw, words_, sizeof words_);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) __stcs(reinterpret_cast<uint4*>(to) + i, raw[i]);
    } else {
      Raw* raw = reinterpret_cast<Raw*>(to);
#pragma unroll
      for (int i = 0; i < kLanes; ++i)
        if (i < count) __stcs(raw + i, part(i));
    }
  }

  __device__ __forceinline__ T get(int i) const { return Word::unpack(words_[i / kPerWord], i % kPerWord); }

  // Puts values in place of those of a word whose bits are set: bit i is that of weight i.
  __device__ __forceinline__ void replace(int word, const T (&values)[kPerWord], unsigned bits) {
    const auto packed = Word::pack(values);
    if constexpr (kPerWord == 1) {
      words_[word] = ((bits >> word) & 1u) != 0 ? packed : words_[word];
    } else {
      const uint32_t chosen = bytes_of_pair(bits >> (2 * word));
      words_[word] = (packed & chosen) | (words_[word] & ~chosen);
    }
  }

  // Zero where bits are not set.
  __device__ __forceinline__ void clear_inactive(unsigned active) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      if constexpr (kPerWord == 1)
        words_[word] = ((active >> word) & 1u) != 0 ? words_[word] : Stored(0);
      else
        words_[word] &= bytes_of_pair(active >> (2 * word));
    }
  }

 private:
  static constexpr int kVectors = kLanes * sizeof(Stored) / sizeof(uint4);

  // The bytes of a word that the lowest two bits stand for.
  static __device__ __forceinline__ uint32_t bytes_of_pair(unsigned bits) {
    return ((bits & 1u) | (bits & 2u) << 15) * 0xffffu;
  }

  __device__ __forceinline__ Raw part(int i) const {
    if constexpr (kPerWord == 1)
      return words_[i];
    else
      return Word::raw(words_[i / 2], i % 2);
  }

  // To a word that has zero there.
  __device__ __forceinline__ void add(int word, int i, Raw value) {
    if constexpr (kPerWord == 1)
      words_[word] = value;
    else
      words_[word] |= uint32_t(value) << (16 * i);
  }

  typename Word::type words_[kWords] = {};
};

}  // namespace sparseopt::cuda
