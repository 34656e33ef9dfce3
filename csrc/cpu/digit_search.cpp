#include "digit_search.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "parallel_for.h"
#include "ranks.h"

namespace sparseopt::cpu {
namespace {

template <class Magnitude>
auto key_of(typename Magnitude::Bits bits) {
  using Key = std::make_unsigned_t<typename Magnitude::Bits>;
  const auto magnitude = Magnitude::of(bits);
  return static_cast<Key>(magnitude > Magnitude::kInfinity ? 0 : static_cast<Key>(magnitude) + 1);
}

// Returns the size of ranges of which there is about one for each thread.
int64_t share(int64_t numel, int threads) { return std::max(kGrain, (numel + threads - 1) / threads); }

}  // namespace

int key_bits(Dtype dtype) {
  return with_magnitude(
      dtype, [](auto magnitude) { return static_cast<int>(8 * sizeof(typename decltype(magnitude)::Bits)); });
}

DigitCounts DigitSearch::counts(uint64_t prefix, int left, int threads) const {
  const int64_t size = share(numel, std::max(threads, 1));
  std::vector<DigitCounts> parts(static_cast<size_t>((numel + size - 1) / size));
  with_magnitude(dtype, [&](auto magnitude) {
    using Magnitude = decltype(magnitude);
    const auto* bits = static_cast<const typename Magnitude::Bits*>(values);
    const int shift = std::max(0, left - kDigitBits);
    const uint64_t digit = (uint64_t(1) << std::min(left, kDigitBits)) - 1;
    const bool is_first = left == key_bits(dtype);
    parallel_for(numel, size, threads, [&](int64_t range, int64_t begin, int64_t end) {
      DigitCounts& own = parts[static_cast<size_t>(range)];
      for (int64_t i = begin; i < end; ++i) {
        if (candidates[i] == 0) continue;
        const uint64_t key = key_of<Magnitude>(bits[i]);
        if (is_first || key >> left == prefix) ++own[key >> shift & digit];
      }
    });
  });
  DigitCounts sums{};
  for (const DigitCounts& part : parts)
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += part[i];
  return sums;
}

std::pair<int64_t, int64_t> DigitSearch::mark(uint64_t threshold, uint8_t* chosen, int threads) const {
  const int64_t size = share(numel, std::max(threads, 1));
  std::vector<std::pair<int64_t, int64_t>> ties(static_cast<size_t>((numel + size - 1) / size));
  with_magnitude(dtype, [&](auto magnitude) {
    using Magnitude = decltype(magnitude);
    const auto* bits = static_cast<const typename Magnitude::Bits*>(values);
    parallel_for(numel, size, threads, [&](int64_t range, int64_t begin, int64_t end) {
      auto& [twos, threes] = ties[static_cast<size_t>(range)];
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t key = key_of<Magnitude>(bits[i]);
        chosen[i] = candidates[i] != 0 && key > threshold;
        if (candidates[i] == 0 || key != threshold) continue;
        const bool is_first = first != nullptr && first[i] != 0;
        chosen[i] = is_first ? 2 : 3;
        ++(is_first ? twos : threes);
      }
    });
  });
  std::pair<int64_t, int64_t> sums{0, 0};
  for (const auto& [twos, threes] : ties) {
    sums.first += twos;
    sums.second += threes;
  }
  return sums;
}

void settle(uint8_t* chosen, int64_t numel, int64_t twos, int64_t threes) {
  for (int64_t i = 0; i < numel; ++i) {
    if (chosen[i] < 2) continue;
    int64_t& left = chosen[i] == 2 ? twos : threes;
    chosen[i] = left > 0;
    --left;
  }
}

}  // namespace sparseopt::cpu
