// Notices masks and weights that were written without anybody being told (by a collective, say): each step
// compares a part of a mask with its packed bits, and a part of the weights with zero outside of it.
#pragma once

#include <cstdint>
#include <vector>

#include "../dtypes.h"
#include "packed_mask.h"

namespace sparseopt::cpu {

// Each step looks at one of this many words of 64 weights, another one in the next step: a write is noticed
// within so many steps, and one that touches many words in the next step. At sparsity 0.99, where a step
// costs least, all masks together are 33% of the bytes that it moves, and a weight is four times a mask.
// With these, steps of ResNet-20 and of 33.5 million weights take 0 to 2% longer (Xeon, Sapphire Rapids or
// later, two threads); with 128 and 512 it was up to 5%.
constexpr int64_t kMaskTurns = 256, kWeightTurns = 2048;

class WriteWatch {
 public:
  // `mask` is the mask that `packed` was made from: boolean, or of floating-point numbers of 2, 4 or 8 bytes.
  // It must be there for as long as anybody looks. `in_order` tells if it lies in memory as the weights do;
  // if not, its bits are packed once more as they lie.
  WriteWatch(const void* mask, int element_bytes, const PackedMask& packed, int64_t numel, bool in_order);
  WriteWatch(const WriteWatch&) = delete;

  // Looks at the part that is next, or at everything. Returns whether anything was found, now or before.
  bool look(const void* weights, Dtype dtype, bool everything);

  bool mask_written() const { return mask_written_; }
  bool weights_written() const { return weights_written_; }
  void forget() { mask_written_ = weights_written_ = false; }

 private:
  const void* mask_;
  int element_bytes_;                  // of the mask
  const std::vector<uint16_t>& bits_;  // as the weights lie
  std::vector<uint16_t> own_bits_;     // as the mask lies, where that is another order
  const std::vector<uint16_t>& mask_bits_;
  int64_t numel_;
  int64_t turn_ = 0;
  bool mask_written_ = false, weights_written_ = false;
};

}  // namespace sparseopt::cpu
