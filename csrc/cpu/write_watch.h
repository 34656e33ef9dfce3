// Notices unseen writes to masks and weights (by a collective, say): each step compares a part of a mask with
// its packed bits, and a part of the weights outside of it with zero.
#pragma once

#include <cstdint>
#include <vector>

#include "../dtypes.h"
#include "packed_mask.h"

namespace sparseopt::cpu {

// A step looks at one word in so many, the next step at another: a write is noticed within so many steps, and
// in the next one if it touches many words. At sparsity 0.99, where a step moves fewest bytes, all masks
// would be 33% of them, and float32 weights four times as many. With these, steps of ResNet-20 and of 33.5
// million weights take 0 to 2% longer (Xeon, Sapphire Rapids or later, two threads); with 128 and 512 it was
// up to 5%.
constexpr int64_t kMaskTurns = 256, kWeightTurns = 2048;

class WriteWatch {
 public:
  // `mask` is the mask that `packed` was made from: boolean, or of floating-point numbers of 2, 4 or 8 bytes.
  // It must outlive the watch. `in_order` is true if it lies in memory as the weights do; else its bits are
  // packed once more, as it lies.
  WriteWatch(const void* mask, int element_bytes, const PackedMask& packed, int64_t numel, bool in_order);
  WriteWatch(const WriteWatch&) = delete;

  // Looks at the next part, or at everything. Returns true if a write was found, now or before.
  bool look(const void* weights, Dtype dtype, bool everything);

  bool mask_written() const { return mask_written_; }
  bool weights_written() const { return weights_written_; }
  void forget() { mask_written_ = weights_written_ = false; }

 private:
  const void* mask_;
  int element_bytes_;                  // of the mask
  const std::vector<uint16_t>& bits_;  // in the order of the weights
  std::vector<uint16_t> own_bits_;     // in the order of the mask, if it is another
  const std::vector<uint16_t>& mask_bits_;
  int64_t numel_;
  int64_t turn_ = 0;
  bool mask_written_ = false, weights_written_ = false;
};

}  // namespace sparseopt::cpu
