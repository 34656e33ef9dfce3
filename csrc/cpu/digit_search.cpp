#include "digit_search.h"

#include <algorithm>
#include <type_traits>

#include "parallel_for.h"
#include "ranks.h"

namespace sparseopt::cpu {
namespace {

// Candidates are few if they are at most this part of all weights: their places take 8 bytes each. RigL
// updates of 33.6 million sharded weights, one thread of a Xeon (Sapphire Rapids or later): 4 takes 1.00 of
// its time, and never to keep places 1.6.
constexpr int64_t kFewOf = 16;

template <class Magnitude>
using KeyOf = std::make_unsigned_t<typename Magnitude::Bits>;

template <class Magnitude>
KeyOf<Magnitude> key_of(typename Magnitude::Bits bits) {
  const auto magnitude = Magnitude::of(bits);
  return static_cast<KeyOf<Magnitude>>(
      magnitude > Magnitude::kInfinity ? 0 : static_cast<KeyOf<Magnitude>>(magnitude) + 1);
}

template <class Magnitude>
const typename Magnitude::Bits* bits_in(const void* values) {
  return static_cast<const typename Magnitude::Bits*>(values);
}

// Writes 1 for candidates with a magnitude that is not smaller, else 0. A function of its own, because it is
// compiled to vectors only if the bytes that it writes cannot be those of its arguments.
template <class Magnitude>
void mark_range(const typename Magnitude::Bits* bits, const uint8_t* candidates, int64_t count,
                typename Magnitude::Bits least, uint8_t* chosen) {
  for (int64_t i = 0; i < count; ++i) {
    const auto own = Magnitude::of(bits[i]);
    chosen[i] = static_cast<uint8_t>((candidates[i] != 0) & (own >= least) & (own <= Magnitude::kInfinity));
  }
}

// Returns the size of ranges of which there is about one for each thread.
int64_t share(int64_t numel, int threads) { return std::max(kGrain, (numel + threads - 1) / threads); }

void add(DigitCounts& to, const DigitCounts& counts) {
  for (size_t i = 0; i < to.size(); ++i) to[i] += counts[i];
}

int64_t ranges_of(int64_t numel, int64_t size) { return (numel + size - 1) / size; }

}  // namespace

int DigitSearch::key_bits() const {
  return with_magnitude(dtype_, [](auto magnitude) {
    return static_cast<int>(8 * sizeof(typename decltype(magnitude)::Bits));
  });
}

DigitCounts DigitSearch::counts(uint64_t prefix, int left, int threads) {
  const int shift = std::max(0, left - kDigitBits);
  const uint64_t digit = (uint64_t(1) << std::min(left, kDigitBits)) - 1;
  const int64_t size = share(numel_, std::max(threads, 1));
  std::vector<DigitCounts> parts(static_cast<size_t>(std::max<int64_t>(1, ranges_of(numel_, size))));
  with_magnitude(dtype_, [&](auto magnitude) {
    using Magnitude = decltype(magnitude);
    const auto* bits = bits_in<Magnitude>(values_);
    const bool is_first_digit = left == key_bits();
    const auto has_prefix = [&](int64_t i) { return uint64_t(key_of<Magnitude>(bits[i])) >> left == prefix; };
    const auto digit_of = [&](int64_t i) { return uint64_t(key_of<Magnitude>(bits[i])) >> shift & digit; };
    if (!is_first_digit && !few_ && kFewOf * last_counts_[prefix & ((1 << kDigitBits) - 1)] <= numel_)
      collect(threads, has_prefix);
    if (few_) {
      for (const int64_t i : *few_) parts[0][digit_of(i)] += has_prefix(i);
      return;
    }
    parallel_for(numel_, size, threads, [&](int64_t range, int64_t begin, int64_t end) {
      // Adding 0 is faster than a branch that is often guessed wrong. Most magnitudes have one of a few
      // digits: with two histograms, an addition need not wait for the one before.
      std::array<DigitCounts, 2> own{};
      const uint8_t* candidates = candidates_;
      for (int64_t i = begin; i < end; ++i)
        own[static_cast<size_t>(i) % 2][digit_of(i)] +=
            (candidates[i] != 0) & (is_first_digit || has_prefix(i));
      DigitCounts& sums = parts[static_cast<size_t>(range)];
      for (const DigitCounts& counts : own) add(sums, counts);
    });
  });
  last_counts_ = {};
  for (const DigitCounts& part : parts) add(last_counts_, part);
  return last_counts_;
}

std::pair<int64_t, int64_t> DigitSearch::mark(uint64_t threshold, uint8_t* chosen, int threads) {
  with_magnitude(dtype_, [&](auto magnitude) {
    using Magnitude = decltype(magnitude);
    const auto* bits = bits_in<Magnitude>(values_);
    // A key is a magnitude plus 1, so that it is larger if the magnitude is not smaller; that of NaN is not.
    const auto least = static_cast<typename Magnitude::Bits>(threshold);
    parallel_for(
        numel_, share(numel_, std::max(threads, 1)), threads, [&](int64_t, int64_t begin, int64_t end) {
          mark_range<Magnitude>(bits + begin, candidates_ + begin, end - begin, least, chosen + begin);
        });
  });
  threshold_ = threshold;
  std::pair<int64_t, int64_t> ties{0, 0};
  for_each_tie([&](int64_t i) { ++(is_first(i) ? ties.first : ties.second); });
  return ties;
}

void DigitSearch::choose(uint8_t* chosen, int64_t in_first, int64_t elsewhere) const {
  for_each_tie([&](int64_t i) {
    int64_t& left = is_first(i) ? in_first : elsewhere;
    chosen[i] = left > 0;
    --left;
  });
}

// Calls body(place) for the candidates that have the threshold, in order.
template <class Body>
void DigitSearch::for_each_tie(Body body) const {
  with_magnitude(dtype_, [&](auto magnitude) {
    using Magnitude = decltype(magnitude);
    const auto* bits = bits_in<Magnitude>(values_);
    const auto visit = [&](int64_t i) {
      if (key_of<Magnitude>(bits[i]) == threshold_) body(i);
    };
    if (few_) {
      for (const int64_t i : *few_) visit(i);
    } else {
      for (int64_t i = 0; i < numel_; ++i)
        if (candidates_[i] != 0) visit(i);
    }
  });
}

// Fills `few_` with the places of the candidates that `keep` returns true for, in order.
template <class Keep>
void DigitSearch::collect(int threads, Keep keep) {
  const int64_t size = share(numel_, std::max(threads, 1));
  std::vector<std::vector<int64_t>> parts(static_cast<size_t>(ranges_of(numel_, size)));
  parallel_for(numel_, size, threads, [&](int64_t range, int64_t begin, int64_t end) {
    std::vector<int64_t>& own = parts[static_cast<size_t>(range)];
    std::array<int64_t, 1024> found;
    const uint8_t* candidates = candidates_;
    while (begin < end) {
      const int64_t stop = std::min(end, begin + static_cast<int64_t>(found.size()));
      size_t count = 0;
      for (; begin < stop; ++begin) {  // without a branch that is often guessed wrong
        found[count] = begin;
        count += (candidates[begin] != 0) & keep(begin);
      }
      own.insert(own.end(), found.begin(), found.begin() + static_cast<int64_t>(count));
    }
  });
  few_.emplace();
  for (const std::vector<int64_t>& part : parts) few_->insert(few_->end(), part.begin(), part.end());
}

}  // namespace sparseopt::cpu
