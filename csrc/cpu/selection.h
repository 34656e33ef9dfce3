// The choice of one layer's new mask: what topology/selection.py defines, in few passes over memory.
#pragma once

#include <cstdint>
#include <vector>

#include "../names.h"
#include "neuron_inputs.h"
#include "ranks.h"

namespace sparseopt::cpu {

// How a mask has changed: weights that left it, those that are new in it, neurons that lost their last
// input and that got a first one, and the weights that are new in the neuron with most of them.
struct LayerUpdate {
  int64_t dropped = 0, grown = 0, died = 0, revived = 0, most_grown = 0;
};

// The weights of one layer that are to be dropped and grown. Only explore() and apply() write to tensors.
// Tensors are contiguous, of the mask's `numel` elements, fewer than 2^32. Results do not depend on the
// number of threads.
class Selection {
 public:
  // Starts anew, in the memory of the former selection. `mask`: one byte per weight, 0 or 1. It is not read
  // again before apply(). Each neuron of the grid keeps `min_fan_in` inputs.
  void begin(const uint8_t* mask, int64_t numel, int64_t min_fan_in, const NeuronGrid& grid, int threads);

  int64_t active() const { return active_; }             // before the update
  int64_t missing() const { return missing_; }           // inputs that neurons have too few, all together
  int64_t at_most() const { return at_most_; }           // as rank() was told
  bool sees_active() const { return sees_active_; }      // if a score of an active weight is not 0
  bool sees_inactive() const { return sees_inactive_; }  // of scores by which weights may grow

  // Whether there are active weights enough for `min_fan_in` of every neuron.
  bool is_possible() const { return min_fan_in_ == 0 || min_fan_in_ <= active_ / grid_.neurons(); }

  // Remembers enough of the largest |scores| to grow `at_most` weights, whatever is dropped. With `fills`,
  // chooses the missing inputs by them. Returns whether all scores are finite. To be called before weights
  // are dropped.
  bool rank(Dtype dtype, const void* scores, int64_t at_most, bool fills, int threads);

  // Drops the `k` active weights of smallest |scores|, or as many as no neuron needs.
  void drop_smallest(Dtype dtype, const void* scores, int64_t k, int threads);

  // Grows `net` weights more than were dropped (negative: fewer), but at least the missing inputs: these, and
  // those of largest rank among the others that are not kept. At most as many as rank() was told.
  void grow_largest(int64_t net);

  // The same, all equally likely: within a neuron by `seed_of_missing`, and then by `seed`.
  void grow_random(int64_t net, uint64_t seed, uint64_t seed_of_missing);

  // Sets the bytes of `explored` where the mask is active by now.
  void explore(uint8_t* explored, int threads) const;

  // Writes what changes: `mask`, in `explored` what is new in it, and zeros for the weights that left it or
  // are new in it.
  LayerUpdate apply(Dtype dtype, uint8_t* mask, void* weights, uint8_t* explored) const;

 private:
  bool has(uint32_t place) const { return words_[place / 64] >> (place % 64) & 1; }
  void find_lacking();
  // Puts down in `filled_` the missing inputs of largest rank_of(place).
  template <class Rank, class RankOf>
  void fill(RankOf rank_of);
  // Grows them. Returns how many are to grow beside them.
  size_t grow_missing(int64_t net);

  int64_t numel_ = 0;
  int64_t active_ = 0;
  int64_t at_most_ = 0;
  int64_t min_fan_in_ = 0;
  int64_t missing_ = 0;
  NeuronGrid grid_;
  bool sees_active_ = false, sees_inactive_ = false;
  std::vector<uint32_t> lacking_;  // neurons with fewer inputs than min_fan_in
  std::vector<uint32_t> filled_;   // what grows in them
  std::vector<uint64_t> words_;    // the mask's bits: at first the old one's, then what is kept, then the new
  std::vector<uint32_t> dropped_, grown_;
  Ranks largest_;
};

}  // namespace sparseopt::cpu
