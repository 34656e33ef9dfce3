// The choice of one layer's new mask, as topology/selection.py defines it, in few passes over memory.
#pragma once

#include <cstdint>
#include <vector>

#include "../names.h"
#include "neuron_inputs.h"
#include "ranks.h"

namespace sparseopt::cpu {

// The change of a mask: numbers of weights that left it and that are new in it, of neurons that lost their
// last input and that got a first one, and of new weights in the neuron that got most.
struct LayerUpdate {
  int64_t dropped = 0, grown = 0, died = 0, revived = 0, most_grown = 0;
};

// Chooses the weights of a layer that are dropped and grown. Only explore() and apply() write to tensors.
// These are contiguous, of `numel` elements, fewer than 2^32. Results do not depend on the number of threads.
class Selection {
 public:
  // Begins a new selection, in the memory of the last one. `mask` has a byte per weight, 0 or 1, and is not
  // read again before apply(). Each neuron of the grid keeps `min_fan_in` inputs.
  void begin(const uint8_t* mask, int64_t numel, int64_t min_fan_in, const NeuronGrid& grid, int threads);

  int64_t active() const { return active_; }    // before the update
  int64_t missing() const { return missing_; }  // inputs that all neurons together lack
  int64_t at_most() const { return at_most_; }  // the argument of rank()

  // True if rank() saw a score other than 0 by which weights may grow.
  bool sees_active() const { return sees_active_; }      // of an active weight
  bool sees_inactive() const { return sees_inactive_; }  // of an inactive one

  // True if there are enough active weights to give each neuron `min_fan_in`.
  bool is_possible() const { return min_fan_in_ == 0 || min_fan_in_ <= active_ / grid_.neurons(); }

  // Remembers enough of the largest |scores| to grow `at_most` weights, whatever is dropped. With `fills`,
  // chooses the missing inputs by them. Returns true if all scores are finite. Call it before weights are
  // dropped.
  bool rank(Dtype dtype, const void* scores, int64_t at_most, bool fills, int threads);

  // Drops the `k` active weights of smallest |scores|; fewer, if neurons need the others.
  void drop_smallest(Dtype dtype, const void* scores, int64_t k, int threads);

  // Grows `net` weights more than were dropped (negative: fewer), but at least the missing inputs. These grow
  // first, then those of largest rank that are not kept. `at_most` of rank() is the limit.
  void grow_largest(int64_t net);

  // The same with random weights: missing inputs by `seed_of_missing`, the others by `seed`.
  void grow_random(int64_t net, uint64_t seed, uint64_t seed_of_missing);

  // Writes 1 into `explored` where the mask is active now.
  void explore(uint8_t* explored, int threads) const;

  // Writes what has changed in `mask`, 1 into `explored` where it has grown, and 0 into weights that left it
  // or are new in it.
  LayerUpdate apply(Dtype dtype, uint8_t* mask, void* weights, uint8_t* explored) const;

 private:
  bool has(uint32_t place) const { return words_[place / 64] >> (place % 64) & 1; }
  void find_lacking();
  // Puts the missing inputs of largest rank_of(place) into `filled_`.
  template <class Rank, class RankOf>
  void fill(RankOf rank_of);
  // Grows these. Returns how many others are to grow.
  size_t grow_missing(int64_t net);

  int64_t numel_ = 0;
  int64_t active_ = 0;
  int64_t at_most_ = 0;
  int64_t min_fan_in_ = 0;
  int64_t missing_ = 0;
  NeuronGrid grid_;
  bool sees_active_ = false, sees_inactive_ = false;
  std::vector<uint32_t> lacking_;  // neurons with fewer inputs than min_fan_in
  std::vector<uint32_t> filled_;   // places that grow in them
  std::vector<uint64_t> words_;    // the mask's bits: of the old mask, of what is kept, of the new mask
  std::vector<uint32_t> dropped_, grown_;
  Ranks largest_;
};

}  // namespace sparseopt::cpu
