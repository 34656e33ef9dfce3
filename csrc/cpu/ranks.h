// Ranks of weights, and the n-th smallest of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <variant>
#include <vector>

#include "../names.h"

namespace sparseopt::cpu {

// A rank is an integer that is larger for a weight that is kept or grown first: by magnitude (NaN is
// smallest), then active before inactive, then the lower place. No two are equal, so that exactly k weights
// are chosen.
using Rank32 = uint64_t;           // for float32, bfloat16 and float16
using Rank64 = unsigned __int128;  // for float64
using Ranks = std::variant<std::vector<Rank32>, std::vector<Rank64>>;

// Magnitudes as integers: in IEEE formats, the bits without the sign are ordered as |x| is.
template <class Int, Int infinity, class RankType>
struct MagnitudeOf {
  using Bits = Int;  // signed, because SSE2 compares no others
  using Rank = RankType;
  static constexpr Bits kInfinity = infinity;

  static Bits of(Bits bits) { return bits & std::numeric_limits<Int>::max(); }
  static Rank rank(Bits magnitude, bool active, uint32_t place) {
    const Rank key = magnitude > kInfinity ? 0 : Rank(magnitude) + 1;
    return key << 33 | Rank(active) << 32 | Rank(~place);
  }
};

template <class Rank>
uint32_t place_of(Rank rank) {
  return ~static_cast<uint32_t>(rank);
}
template <class Rank>
bool is_active(Rank rank) {
  return rank >> 32 & 1;
}
template <class Rank>
bool is_nan(Rank rank) {
  return rank >> 33 == 0;
}

// Calls body(MagnitudeOf<...>()) for the weights of a dtype.
template <class Body>
auto with_magnitude(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::kFloat64:
      return body(MagnitudeOf<int64_t, 0x7ff0000000000000, Rank64>());
    case Dtype::kBFloat16:
      return body(MagnitudeOf<int16_t, 0x7f80, Rank32>());
    case Dtype::kFloat16:
      return body(MagnitudeOf<int16_t, 0x7c00, Rank32>());
    default:
      return body(MagnitudeOf<int32_t, 0x7f800000, Rank32>());
  }
}

// Returns the rank that is larger than `n` others. A histogram leaves few to nth_element. RigL updates of
// 16.8 million weights: 1 << 8 and 1 << 16 bins both take 1.02 of its time (make tuning, Zen 3; noise 0%).
template <class Rank>
Rank nth_smallest(const std::vector<Rank>& ranks, size_t n) {
  constexpr int kBins = 1 << 12;
  const auto [least, most] = std::minmax_element(ranks.begin(), ranks.end());
  const Rank origin = *least;
  int shift = 0;
  while ((*most - origin) >> shift >= kBins) ++shift;
  const auto bin_of = [&](Rank rank) { return static_cast<size_t>((rank - origin) >> shift); };
  std::vector<size_t> counts(kBins);
  for (Rank rank : ranks) ++counts[bin_of(rank)];
  size_t bin = 0;
  for (; n >= counts[bin]; ++bin) n -= counts[bin];
  std::vector<Rank> few;
  few.reserve(counts[bin]);
  for (Rank rank : ranks)
    if (bin_of(rank) == bin) few.push_back(rank);
  std::nth_element(few.begin(), few.begin() + static_cast<ptrdiff_t>(n), few.end());
  return few[n];
}

}  // namespace sparseopt::cpu
