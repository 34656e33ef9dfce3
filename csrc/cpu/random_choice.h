// Random choices, made by topology/random_choice.py in the same way: they depend on a seed and nothing else.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparseopt::cpu {

// Number i of the sequence of a seed (SplitMix64), in [0, size): of 63 bits the remainder, so that for
// less than 2^32 places no one is likelier than another by more than 2^-31.
inline uint64_t random_place(uint64_t seed, uint64_t i, uint64_t size) {
  uint64_t x = seed + (i + 1) * 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return ((x ^ x >> 31) >> 1) % size;
}

// Adds `k` places that are not taken yet. `add(place)` tells whether its place was not taken, and takes it.
template <class Add>
void add_random(uint64_t size, int64_t k, uint64_t seed, Add add) {
  for (uint64_t i = 0; k > 0; ++i) k -= add(random_place(seed, i, size));
}

// Writes a 1 for `k` of `size` bytes and a 0 for the others.
inline void choose_random(uint8_t* chosen, int64_t size, int64_t k, uint64_t seed) {
  const bool most = 2 * k > size;  // then it is quicker to choose the others
  std::memset(chosen, most, static_cast<size_t>(size));
  add_random(uint64_t(size), most ? size - k : k, seed, [&](uint64_t place) {
    const bool added = chosen[place] == most;
    chosen[place] = !most;
    return added;
  });
}

}  // namespace sparseopt::cpu
