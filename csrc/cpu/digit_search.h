// The search for the k-th largest magnitude of a layer of which each rank has a part: what one rank counts of
// its part. The ranks add up their counts: see topology/sharded_selection.py.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../names.h"

namespace sparseopt::cpu {

constexpr int kDigitBits = 11;
using DigitCounts = std::array<int64_t, 1 << kDigitBits>;

// The part of a rank. A weight is a candidate if its byte of `candidates` is not 0. The key of a weight is an
// unsigned integer that is larger for a larger magnitude: 0 for NaN, else the bits without the sign, plus 1.
class DigitSearch {
 public:
  // Of equal keys, those whose byte of `first` is 1 are taken first; null: none.
  DigitSearch(Dtype dtype, const void* values, const uint8_t* candidates, const uint8_t* first, int64_t numel)
      : dtype_(dtype), values_(values), candidates_(candidates), first_(first), numel_(numel) {}

  // Returns the bits of a key.
  int key_bits() const;

  // Returns how many candidates have which next digit, of those whose keys begin with `prefix`: `left` bits
  // of a key are not in it. The first prefix is empty, and each is the one before with a digit more.
  DigitCounts counts(uint64_t prefix, int left, int threads);

  // Writes 1 to `chosen` for candidates whose key is larger than the threshold, else 0. Returns how many
  // have the threshold, in `first` and elsewhere.
  std::pair<int64_t, int64_t> mark(uint64_t threshold, uint8_t* chosen, int threads);

  // Writes 1 to `chosen` for so many of those that have the threshold, in `first` and elsewhere.
  void choose(uint8_t* chosen, int64_t in_first, int64_t elsewhere) const;

 private:
  bool is_first(int64_t place) const { return first_ != nullptr && first_[place] != 0; }
  template <class Keep>
  void collect(int threads, Keep keep);
  template <class Body>
  void for_each_tie(Body body) const;

  Dtype dtype_;
  const void* values_;
  const uint8_t* candidates_;
  const uint8_t* first_;
  int64_t numel_;
  DigitCounts last_counts_{};
  uint64_t threshold_ = 0;
  // Candidates whose keys begin with the prefix, if they are few: they are all that is looked at then.
  std::optional<std::vector<int64_t>> few_;
};

}  // namespace sparseopt::cpu
