// The choice of one layer's new mask: what topology/mask_update.py defines, in few passes over memory.
#pragma once

#include <cstdint>
#include <vector>

#include "../names.h"
#include "ranks.h"

namespace sparseopt::cpu {

// An update of one layer in the making. Only explore() and apply() write to tensors. Tensors are contiguous,
// of the mask's `numel` elements, fewer than 2^32. Nothing depends on the number of threads but the time.
class MaskUpdate {
 public:
  // Another update, in the memory of the former one. `mask`: one byte per weight, 0 or 1. It is not looked at
  // again before apply().
  void begin(const uint8_t* mask, int64_t numel, int threads);

  int64_t active() const { return active_; }  // before the update
  int64_t at_most() const { return at_most_; }

  // Remembers enough of the largest |scores| to grow `at_most` weights, whatever is dropped. Returns whether
  // all scores are finite. To be called before weights are dropped.
  bool rank(Dtype dtype, const void* scores, int64_t at_most, int threads);

  // Drops the `k` active weights of smallest |weights|.
  void drop_smallest(Dtype dtype, const void* weights, int64_t k, int threads);

  // Grows the `k` of largest rank among those not kept; at most as many as rank() was told.
  void grow_largest(int64_t k);

  // Grows `k` of those not kept, all equally likely.
  void grow_random(int64_t k, uint64_t seed);

  // Sets the bytes of `explored` where the mask is active by now.
  void explore(uint8_t* explored, int threads) const;

  // Writes what changes: `mask`, in `explored` what is new in it, and zeros for the weights that left it or
  // are new in it. Returns whether anything did.
  bool apply(Dtype dtype, uint8_t* mask, void* weights, uint8_t* explored) const;

 private:
  bool has(uint32_t place) const { return words_[place / 64] >> (place % 64) & 1; }

  int64_t numel_ = 0;
  int64_t active_ = 0;
  int64_t at_most_ = 0;          // as rank() was told
  std::vector<uint64_t> words_;  // the mask's bits: at first the old one's, then what is kept, then the new
  std::vector<uint32_t> dropped_, grown_;
  Ranks largest_;
};

}  // namespace sparseopt::cpu
