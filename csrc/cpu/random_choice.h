// Random choices that depend on a seed alone. topology/random_choice.py makes the same.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparseopt::cpu {

// Returns number i of the sequence of a seed (SplitMix64), modulo `size`. It has 63 bits: below 2^32 places,
// none is likelier than another by more than 2^-31.
inline uint64_t random_place(uint64_t seed, uint64_t i, uint64_t size) {
  uint64_t x = seed + (i + 1) * 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return ((x ^ x >> 31) >> 1) % size;
}

// Adds `k` random places. add(place) takes a place, and returns false if it was taken before.
template <class Add>
void add_random(uint64_t size, int64_t k, uint64_t seed, Add add) {
  for (uint64_t i = 0; k > 0; ++i) k -= add(random_place(seed, i, size));
}

// Writes a 1 for `k` of `size` bytes and a 0 for the others.
inline void choose_random(uint8_t* chosen, int64_t size, int64_t k, uint64_t seed) {
  const bool most = 2 * k > size;  // then it is faster to choose the others
  std::memset(chosen, most, static_cast<size_t>(size));
  add_random(uint64_t(size), most ? size - k : k, seed, [&](uint64_t place) {
    const bool added = chosen[place] == most;
    chosen[place] = !most;
    return added;
  });
}

}  // namespace sparseopt::cpu
