// Words: the mask bits of 64 weights in an integer. They are packed from bytes, counted, and turned into
// places. Functions that loops.cpp uses have internal linkage.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "../update_rule.h"

namespace sparseopt::cpu {

constexpr int64_t kWord = 64;  // weights
// Weights whose words are turned into places at a time, whole words. RigL updates of 16.8 million weights:
// 1 << 8 and 1 << 12 take 0.95 and 1.09 of its time (make tuning, Zen 3; noise 3%).
constexpr int64_t kBatch = 1 << 10;

// Returns eight bytes: 1 where a byte is not 0, else 0.
SPARSEOPT_INLINE uint64_t ones_of(uint64_t bytes) {
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7f;
  return (((bytes & kLow) + kLow) | bytes) >> 7 & 0x0101010101010101;
}

// Packs 64 bytes into a word: a bit is 1 where its byte is not 0.
SPARSEOPT_INLINE uint64_t pack_word(const uint8_t* bytes) {
  uint64_t word = 0;
#ifdef __SSE2__
  for (int i = 0; i < 4; ++i) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * i));
    const int zeros = _mm_movemask_epi8(_mm_cmpeq_epi8(part, _mm_setzero_si128()));
    word |= uint64_t(~zeros & 0xffff) << (16 * i);
  }
#else
  for (int i = 0; i < 8; ++i) {
    uint64_t part;
    std::memcpy(&part, bytes + 8 * i, 8);
    word |= (ones_of(part) * 0x0102040810204080 >> 56) << (8 * i);  // little-endian
  }
#endif
  return word;
}

// The same for `count` bytes; for the first 64 if there are more.
SPARSEOPT_INLINE uint64_t pack_bytes(const uint8_t* bytes, int64_t count) {
  if (count >= kWord) return pack_word(bytes);
  uint64_t word = 0;
  for (int64_t i = 0; i < count; ++i) word |= uint64_t(bytes[i] != 0) << i;
  return word;
}

// In plain arithmetic: for processors without the instruction, __builtin_popcountll is a function call.
inline int64_t count_bits(uint64_t word) {
  word -= word >> 1 & 0x5555555555555555;
  word = (word & 0x3333333333333333) + (word >> 2 & 0x3333333333333333);
  return static_cast<int64_t>(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101 >> 56);
}

// Writes the places of the bits that are 1, then up to three meaningless numbers. Returns how many places
// there are. `first` is the place of the lowest bit.
inline int64_t list_bits(uint64_t word, uint32_t first, uint32_t* places) {
  const int64_t count = count_bits(word);
  for (int64_t i = 0; i < count; i += 4)  // four without a branch, which would be mispredicted
    for (int64_t j = 0; j < 4; ++j) {
      places[i + j] = first + static_cast<uint32_t>(__builtin_ctzll(word | uint64_t(1) << 63));
      word &= word - 1;
    }
  return count;
}

// Calls body(places, count) for batches of the places in [begin, end) whose bits are 1. word(first, count)
// returns the bits of up to 64 places, and `begin` is the first place of a word. fetch(place) prefetches a
// batch ahead: memory is read while the batch before is worked on.
template <class WordAt, class Fetch, class Body>
void for_places(int64_t begin, int64_t end, WordAt word, Fetch fetch, Body body) {
  uint32_t places[2][kBatch + 3];
  int64_t count[2] = {0, 0};
  int current = 0;
  while (begin < end) {
    const int64_t batch_end = std::min(begin + kBatch, end);
    int64_t& own = count[current] = 0;
    for (; begin < batch_end; begin += kWord)
      own += list_bits(word(begin, std::min(kWord, end - begin)), static_cast<uint32_t>(begin),
                       places[current] + own);
    for (int64_t i = 0; i < own; ++i) fetch(places[current][i]);
    current = 1 - current;
    body(places[current], count[current]);
  }
  body(places[1 - current], count[1 - current]);
}

}  // namespace sparseopt::cpu
