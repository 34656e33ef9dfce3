#include "selection.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <type_traits>

#include "bit_words.h"
#include "parallel_for.h"
#include "random_choice.h"

namespace sparseopt::cpu {
namespace {

// The numbers of inputs that a neuron has lost and got.
struct NeuronChange {
  uint32_t lost = 0, got = 0;
};

// A sample has one weight of kSampledOf, within the bounds of its size. A place of it is given up if
// kWordsTried words behind its own have no bit, either. Figures are parts of the time with these constants,
// by make tuning on a Zen 3. RigL updates of 16.8 million weights: one of 1 << 6 and of 1 << 10 take 1.04 and
// 1.00 (noise 4%), at most 1 << 13 and 1 << 17 take 0.99 and 0.98 (noise 2%), 2 and 32 words 0.97 and 0.97
// (noise 0%). RigL updates of ResNet-20: at least 1 << 8 and 1 << 12 take 0.99 and 1.10 (noise 1%).
constexpr int64_t kSampledOf = 1 << 8, kFewestSampled = 1 << 10, kMostSampled = 1 << 15, kWordsTried = 8;
// Fewer weights are all ranked, without a guess. RigL updates of ResNet-20: 1 << 11 and 1 << 16 take 0.85 and
// 1.85 (noise 21%).
constexpr int64_t kFewest = 1 << 12;
static_assert(kFewest >= kFewestSampled, "there is a weight for each place of a sample");

// Appends the ranks of those places in [begin, end) whose bits are 1 and for which rank_of(place, rank)
// returns true, in order. word(first, count) returns bits, and rank_of sets `rank`, from `values`.
template <class Rank, class Bits, class WordAt, class RankOf>
void collect(const Bits* values, int64_t begin, int64_t end, WordAt word, RankOf rank_of,
             std::vector<Rank>& all) {
  const auto fetch = [&](uint32_t place) { __builtin_prefetch(values + place); };
  for_places(begin, end, word, fetch, [&](const uint32_t* places, int64_t count) {
    Rank found[kBatch];
    size_t size = 0;
    // Without a branch on rank_of(), which would be mispredicted.
    for (int64_t i = 0; i < count; ++i) size += rank_of(places[i], found[size]);
    all.insert(all.end(), found, found + size);
  });
}

// The same for all weights, by several threads. It replaces what `all` holds, in the same memory.
template <class Rank, class Bits, class WordAt, class RankOf>
void collect_all(const Bits* values, int64_t numel, int threads, WordAt word, RankOf rank_of,
                 std::vector<Rank>& all) {
  all.clear();
  if (threads == 1 || numel <= kGrain) return collect(values, 0, numel, word, rank_of, all);
  std::vector<std::vector<Rank>> parts(static_cast<size_t>((numel + kGrain - 1) / kGrain));
  parallel_for(numel, kGrain, threads, [&](int64_t range, int64_t begin, int64_t end) {
    collect(values, begin, end, word, rank_of, parts[static_cast<size_t>(range)]);
  });
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
}

// Returns a word for up to 64 values: 1 where the magnitude is at least `least`.
template <class Magnitude>
uint64_t word_at_least(const typename Magnitude::Bits* values, int64_t count,
                       typename Magnitude::Bits least) {
  uint8_t hits[kWord];
  if (count == kWord) {  // a constant for the compiler
    for (int64_t i = 0; i < kWord; ++i) hits[i] = Magnitude::of(values[i]) >= least;
    return pack_word(hits);
  }
  for (int64_t i = 0; i < count; ++i) hits[i] = Magnitude::of(values[i]) >= least;
  return pack_bytes(hits, count);
}

// Returns about `count` places whose bits in word(index) are 1. Each is the first one behind a random place
// in its part of the layer, because places at a fixed distance would lie in a few columns.
template <class WordAt>
std::vector<uint32_t> sample_places(int64_t numel, int64_t count, WordAt word) {
  std::vector<uint32_t> places;
  places.reserve(static_cast<size_t>(count));
  const int64_t part = numel / count;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = i * part + static_cast<int64_t>(random_place(0, i, part));
    int64_t index = start / kWord;
    const int64_t last = std::min(index + kWordsTried, (numel - 1) / kWord);
    uint64_t bits = word(index) >> (start % kWord) << (start % kWord);
    while (bits == 0 && index < last) bits = word(++index);
    const int64_t place = index * kWord + (bits ? __builtin_ctzll(bits) : 0);
    if (bits && place < numel) places.push_back(static_cast<uint32_t>(place));
  }
  return places;
}

int64_t sample_size(int64_t population) {
  return std::clamp<int64_t>(population / kSampledOf, kFewestSampled, kMostSampled);
}

// Returns a magnitude that very probably `k` of `all` weights come before, estimated from a sample of them;
// or `otherwise`, if the sample is too small.
template <class Magnitude, class Before>
typename Magnitude::Bits guess(const std::vector<uint32_t>& places, const typename Magnitude::Bits* values,
                               int64_t k, int64_t all, typename Magnitude::Bits otherwise, Before before) {
  const double expected =
      static_cast<double>(places.size()) * static_cast<double>(k) / static_cast<double>(all);
  const size_t rank = static_cast<size_t>(expected + 3 * std::sqrt(expected) + 3);  // standard deviations: 3
  if (rank >= places.size()) return otherwise;
  for (uint32_t place : places) __builtin_prefetch(values + place);  // all cache misses at once
  std::vector<typename Magnitude::Bits> magnitudes;
  magnitudes.reserve(places.size());
  for (uint32_t place : places) magnitudes.push_back(Magnitude::of(values[place]));
  const auto nth = magnitudes.begin() + static_cast<ptrdiff_t>(rank);
  std::nth_element(magnitudes.begin(), nth, magnitudes.end(), before);
  return *nth;
}

// Returns the vector of this type, empty if the variant held the other.
template <class Rank>
std::vector<Rank>& ranks_of(Ranks& ranks) {
  if (!std::holds_alternative<std::vector<Rank>>(ranks)) ranks.template emplace<std::vector<Rank>>();
  return std::get<std::vector<Rank>>(ranks);
}

template <class Rank>
void forget_if_large(std::vector<Rank>& ranks) {
  constexpr size_t kLarge = 1 << 20;  // 8 MB, of float64 16 MB
  if (ranks.capacity() > kLarge) std::vector<Rank>().swap(ranks);
}

}  // namespace

void Selection::begin(const uint8_t* mask, int64_t numel, int64_t min_fan_in, const NeuronGrid& grid,
                      int threads) {
  numel_ = numel;
  active_ = at_most_ = missing_ = 0;
  min_fan_in_ = numel == 0 ? 0 : min_fan_in;
  grid_ = grid;
  sees_active_ = sees_inactive_ = false;
  lacking_.clear();
  filled_.clear();
  words_.resize(static_cast<size_t>((numel + kWord - 1) / kWord));
  dropped_.clear();
  grown_.clear();
  std::vector<int64_t> counts(static_cast<size_t>((numel + kGrain - 1) / kGrain));
  parallel_for(numel, kGrain, threads, [&](int64_t range, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; i += kWord) {
      const uint64_t word = pack_bytes(mask + i, end - i);
      words_[i / kWord] = word;
      count += count_bits(word);
    }
    counts[range] = count;
  });
  for (int64_t count : counts) active_ += count;
  if (min_fan_in_ > 0) find_lacking();
}

void Selection::find_lacking() {
  for (int64_t neuron = 0; neuron < grid_.neurons(); ++neuron) {
    const int64_t count = count_inputs(grid_, neuron, words_);
    if (count >= min_fan_in_) continue;
    missing_ += min_fan_in_ - count;
    lacking_.push_back(static_cast<uint32_t>(neuron));
  }
}

template <class Rank, class RankOf>
void Selection::fill(RankOf rank_of) {
  filled_.clear();
  std::vector<Rank> ranks;
  for (uint32_t neuron : lacking_) {
    ranks.clear();
    int64_t active = 0;
    for_input_words(grid_, neuron, words_, [&](uint64_t bits, int64_t first, uint64_t inputs) {
      active += count_bits(bits);
      for_bits(~bits & inputs, first, [&](uint32_t place) { ranks.push_back(rank_of(place)); });
    });
    const size_t count = std::min(static_cast<size_t>(min_fan_in_ - active), ranks.size());
    largest_last(ranks, count);
    for (size_t i = ranks.size() - count; i < ranks.size(); ++i) filled_.push_back(place_of(ranks[i]));
  }
}

size_t Selection::grow_missing(int64_t net) {
  for (uint32_t place : filled_) words_[place / kWord] |= uint64_t(1) << place % kWord;
  grown_ = filled_;
  const int64_t all = static_cast<int64_t>(dropped_.size()) + net;
  return static_cast<size_t>(std::max<int64_t>(0, all - static_cast<int64_t>(filled_.size())));
}

bool Selection::rank(Dtype dtype, const void* scores, int64_t at_most, bool fills, int threads) {
  at_most_ = at_most;
  return with_magnitude(dtype, [&](auto magnitude) {
    using Magnitude = decltype(magnitude);
    using Bits = typename Magnitude::Bits;
    using Rank = typename Magnitude::Rank;
    const Bits* values = static_cast<const Bits*>(scores);
    // Scores that are not finite are always found: `least` is infinity at most.
    auto& found = ranks_of<Rank>(largest_);
    const auto find_from = [&](Bits least) {
      collect_all(
          values, numel_, threads,
          [&](int64_t first, int64_t count) {
            return word_at_least<Magnitude>(values + first, count, least);
          },
          [&](uint32_t place, Rank& rank) {
            rank = Magnitude::rank(Magnitude::of(values[place]), has(place), place);
            return true;
          },
          found);
    };
    // Dropped weights may grow again, but are not known yet: inactive ones alone must suffice.
    const int64_t inactive = numel_ - active_;
    Bits least = at_most == 0 ? Magnitude::kInfinity : 0;
    if (at_most > 0 && numel_ >= kFewest && inactive > at_most) {
      const auto places = sample_places(numel_, sample_size(numel_), [&](int64_t i) { return ~words_[i]; });
      least = guess<Magnitude>(places, values, at_most, inactive, 0, std::greater<Bits>());
      least = std::min(least, Magnitude::kInfinity);
    }
    find_from(least);
    bool finite = true;
    int64_t can_grow = 0;
    bool sees_inactive = false, sees_active = false;
    for (Rank rank : found) {
      finite &= !is_nan(rank) & (rank < Magnitude::rank(Magnitude::kInfinity, false, UINT32_MAX));
      can_grow += !is_nan(rank) & !is_active(rank);
      sees_inactive |= !is_active(rank) & (rank >> 33 > 1);
      sees_active |= is_active(rank) & (rank >> 33 > 1);
    }
    // If `least` is not 0, it is the magnitude of an inactive weight, which was found.
    sees_inactive_ |= at_most > 0 && sees_inactive;
    sees_active_ |= at_most > 0 && sees_active;
    if (least > 0 && can_grow < at_most) find_from(0);
    if (missing_ > 0 && fills)
      fill<Rank>([&](uint32_t place) { return Magnitude::rank(Magnitude::of(values[place]), false, place); });
    return finite;
  });
}

void Selection::drop_smallest(Dtype dtype, const void* scores, int64_t k, int threads) {
  if (k == 0) return;
  with_magnitude(dtype, [&](auto magnitude) {
    using Magnitude = decltype(magnitude);
    using Bits = typename Magnitude::Bits;
    using Rank = typename Magnitude::Rank;
    const Bits* values = static_cast<const Bits*>(scores);
    thread_local std::vector<Rank> found;  // kept, because to allocate it takes as long as the rest
    const auto find_up_to = [&](Bits most) {
      const auto rank_of = [&](uint32_t place, Rank& rank) {
        const Bits own = Magnitude::of(values[place]);
        rank = Magnitude::rank(own, true, place);
        return (own <= most) | (own > Magnitude::kInfinity);
      };
      if (min_fan_in_ > 0) return collect_beyond(values, grid_, words_, min_fan_in_, threads, rank_of, found);
      const auto word = [&](int64_t first, int64_t) { return words_[first / kWord]; };
      collect_all(values, numel_, threads, word, rank_of, found);
    };
    Bits most = Magnitude::kInfinity;
    if (active_ >= kFewest) {
      const auto places =
          sample_places(numel_, sample_size(4 * active_), [&](int64_t i) { return words_[i]; });
      most = guess<Magnitude>(places, values, k, active_, Magnitude::kInfinity, std::less<Bits>());
    }
    find_up_to(most);
    if (static_cast<int64_t>(found.size()) < k) find_up_to(Magnitude::kInfinity);
    k = std::min(k, static_cast<int64_t>(found.size()));
    if (k == 0) return;  // neurons need them all
    const Rank last = nth_smallest(found, static_cast<size_t>(k - 1));
    dropped_.resize(found.size());
    size_t count = 0;
    for (Rank rank : found) {
      const uint32_t place = place_of(rank);
      const bool drops = rank <= last;
      dropped_[count] = place;
      count += drops;
      words_[place / kWord] &= ~(static_cast<uint64_t>(drops) << place % kWord);
    }
    dropped_.resize(count);
    forget_if_large(found);
  });
}

void Selection::grow_largest(int64_t net) {
  const size_t k = grow_missing(net);
  if (k == 0) return;
  std::visit(
      [&](auto& ranks) {
        using Rank = typename std::decay_t<decltype(ranks)>::value_type;
        size_t free = 0;
        for (Rank rank : ranks) {
          ranks[free] = rank;
          free += !has(place_of(rank));
        }
        ranks.resize(free);
        const Rank last = nth_smallest(ranks, free - k);
        size_t count = grown_.size();
        grown_.resize(count + free);
        for (Rank rank : ranks) {
          const uint32_t place = place_of(rank);
          const bool grows = rank >= last;
          grown_[count] = place;
          count += grows;
          words_[place / kWord] |= static_cast<uint64_t>(grows) << place % kWord;
        }
        grown_.resize(count);
        forget_if_large(ranks);
      },
      largest_);
}

void Selection::grow_random(int64_t net, uint64_t seed, uint64_t seed_of_missing) {
  if (missing_ > 0)
    fill<Rank64>([&](uint32_t place) {
      const uint64_t score = random_place(seed_of_missing, place, uint64_t(1) << 62);
      return (Rank64(score) + 1) << 33 | Rank64(~place);
    });
  grown_.reserve(dropped_.size());
  const int64_t dropped = static_cast<int64_t>(dropped_.size());
  const int64_t k = static_cast<int64_t>(grow_missing(net));
  const int64_t free = numel_ - active_ + dropped - static_cast<int64_t>(filled_.size());
  const auto grow = [&](uint32_t place) {
    words_[place / kWord] |= uint64_t(1) << place % kWord;
    grown_.push_back(place);
  };
  if (2 * free >= numel_ && 2 * k <= free) {  // at least a quarter of all places stays free
    add_random(numel_, k, seed, [&](uint64_t drawn) {
      const uint32_t place = static_cast<uint32_t>(drawn);
      const bool added = !has(place);
      if (added) grow(place);
      return added;
    });
    return;
  }
  std::vector<uint8_t> chosen(static_cast<size_t>(free));
  choose_random(chosen.data(), free, k, seed);
  const uint8_t* next = chosen.data();
  const auto not_kept = [&](int64_t first, int64_t count) {
    const uint64_t all = count == kWord ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
    return ~words_[first / kWord] & all;
  };
  const auto fetch = [](uint32_t) {};
  for_places(0, numel_, not_kept, fetch, [&](const uint32_t* places, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      if (*next++) grow(places[i]);
  });
}

void Selection::explore(uint8_t* explored, int threads) const {
  parallel_for(numel_, kGrain, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kWord) {
      uint64_t unseen = words_[i / kWord] & ~pack_bytes(explored + i, end - i);
      for (; unseen != 0; unseen &= unseen - 1) explored[i + __builtin_ctzll(unseen)] = 1;
    }
  });
}

LayerUpdate Selection::apply(Dtype dtype, uint8_t* mask, void* weights, uint8_t* explored) const {
  return with_magnitude(dtype, [&](auto magnitude) {
    auto* values = static_cast<typename decltype(magnitude)::Bits*>(weights);
    LayerUpdate change;
    std::vector<NeuronChange> of_neurons(static_cast<size_t>(grid_.neurons()));
    for (uint32_t place : dropped_) {
      if (has(place)) continue;  // it grew again
      mask[place] = 0;
      values[place] = 0;
      ++of_neurons[static_cast<size_t>(grid_.neuron_of(place))].lost;
    }
    for (uint32_t place : grown_) {
      if (mask[place]) continue;
      mask[place] = explored[place] = 1;
      values[place] = 0;
      ++of_neurons[static_cast<size_t>(grid_.neuron_of(place))].got;
    }
    for (size_t neuron = 0; neuron < of_neurons.size(); ++neuron) {
      const auto [lost, got] = of_neurons[neuron];
      if (lost == 0 && got == 0) continue;
      change.dropped += lost;
      change.grown += got;
      change.most_grown = std::max<int64_t>(change.most_grown, got);
      const int64_t inputs =
          lost > 0 && got > 0 ? 1 : count_inputs(grid_, static_cast<int64_t>(neuron), words_);
      change.died += inputs == 0;
      change.revived += lost == 0 && inputs == got;
    }
    return change;
  });
}

}  // namespace sparseopt::cpu
