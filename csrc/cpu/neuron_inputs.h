// The inputs of each neuron among the bits of a mask, for choices within a neuron.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bit_words.h"
#include "parallel_for.h"
#include "ranks.h"

namespace sparseopt::cpu {

// The weights of neuron (group, j) are [group, :, j, :] of a tensor of this shape.
struct NeuronGrid {
  int64_t groups = 0, segments = 0, per_group = 0, length = 0;

  int64_t neurons() const { return groups * per_group; }
  int64_t inputs() const { return segments * length; }
  int64_t neuron_of(int64_t place) const {
    return place / (segments * per_group * length) * per_group + place / length % per_group;
  }
};

// Calls body(bits, first, inputs) for the inputs of a neuron, up to 64 at a time: their mask bits, the place
// of the first, and a word with a 1 for each of them.
template <class Body>
void for_input_words(const NeuronGrid& grid, int64_t neuron, const std::vector<uint64_t>& words, Body body) {
  const int64_t group = neuron / grid.per_group, j = neuron % grid.per_group;
  for (int64_t s = 0; s < grid.segments; ++s) {
    int64_t begin = ((group * grid.segments + s) * grid.per_group + j) * grid.length;
    const int64_t end = begin + grid.length;
    while (begin < end) {
      const int64_t next = std::min(end, (begin / kWord + 1) * kWord);
      const uint64_t inputs = ~uint64_t(0) >> (kWord - (next - begin));
      body(words[begin / kWord] >> begin % kWord & inputs, begin, inputs);
      begin = next;
    }
  }
}

// Calls body(place) for each bit that is 1.
template <class Body>
void for_bits(uint64_t word, int64_t first, Body body) {
  for (; word != 0; word &= word - 1) body(static_cast<uint32_t>(first + __builtin_ctzll(word)));
}

// Returns the number of active inputs of a neuron.
inline int64_t count_inputs(const NeuronGrid& grid, int64_t neuron, const std::vector<uint64_t>& words) {
  int64_t count = 0;
  for_input_words(grid, neuron, words, [&](uint64_t bits, int64_t, uint64_t) { count += count_bits(bits); });
  return count;
}

// Puts the `count` largest ranks last.
template <class Rank>
void largest_last(std::vector<Rank>& ranks, size_t count) {
  if (count < ranks.size())
    std::nth_element(ranks.begin(), ranks.end() - static_cast<ptrdiff_t>(count), ranks.end());
}

// Puts into `all` the ranks of the active weights that are not among the `kept` largest of their neuron, and
// for which rank_of(place, rank) returns true. It sets `rank`, from `values`.
template <class Rank, class Bits, class RankOf>
void collect_beyond(const Bits* values, const NeuronGrid& grid, const std::vector<uint64_t>& words,
                    int64_t kept, int threads, RankOf rank_of, std::vector<Rank>& all) {
  const int64_t size = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, grid.inputs()));
  std::vector<std::vector<Rank>> parts(static_cast<size_t>((grid.neurons() + size - 1) / size));
  parallel_for(grid.neurons(), size, threads, [&](int64_t range, int64_t begin, int64_t end) {
    std::vector<uint32_t> places;
    std::vector<Rank> own;
    std::vector<Rank>& found = parts[static_cast<size_t>(range)];
    for (int64_t neuron = begin; neuron < end; ++neuron) {
      places.clear();
      for_input_words(grid, neuron, words, [&](uint64_t bits, int64_t first, uint64_t) {
        for_bits(bits, first, [&](uint32_t place) {
          __builtin_prefetch(values + place);
          places.push_back(place);
        });
      });
      if (static_cast<int64_t>(places.size()) <= kept) continue;
      own.resize(places.size());
      for (size_t i = 0; i < places.size(); ++i) rank_of(places[i], own[i]);
      largest_last(own, static_cast<size_t>(kept));
      for (size_t i = 0; i + static_cast<size_t>(kept) < own.size(); ++i) {
        Rank rank;
        if (rank_of(place_of(own[i]), rank)) found.push_back(rank);
      }
    }
  });
  all.clear();
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
}

}  // namespace sparseopt::cpu
