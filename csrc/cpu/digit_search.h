// The search for the k-th largest magnitude of a layer of which each rank has a part: what one rank counts of
// its part. The ranks add up their counts: see topology/sharded_selection.py.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "../names.h"

namespace sparseopt::cpu {

constexpr int kDigitBits = 11;
using DigitCounts = std::array<int64_t, 1 << kDigitBits>;

// The part of a rank. A weight is a candidate if its byte of `candidates` is 1. The key of a weight is an
// unsigned integer that is larger for a larger magnitude: 0 for NaN, else the bits without the sign, plus 1.
struct DigitSearch {
  Dtype dtype;
  const void* values;
  const uint8_t* candidates;
  const uint8_t* first;  // of equal keys, those whose byte is 1 are taken first; null: none
  int64_t numel;

  // Returns how many candidates have which next digit, of those whose keys begin with `prefix`: `left` bits
  // of a key are not in it.
  DigitCounts counts(uint64_t prefix, int left, int threads) const;

  // Writes to `chosen`: 1 for candidates whose key is larger than the threshold, 2 and 3 where it is equal,
  // in `first` and elsewhere; else 0. Returns the numbers of 2 and 3.
  std::pair<int64_t, int64_t> mark(uint64_t threshold, uint8_t* chosen, int threads) const;
};

// Returns the bits of the keys of a dtype.
int key_bits(Dtype dtype);

// Replaces the first so many 2 by 1, the first so many 3 by 1, and all others of them by 0.
void settle(uint8_t* chosen, int64_t numel, int64_t twos, int64_t threes);

}  // namespace sparseopt::cpu
