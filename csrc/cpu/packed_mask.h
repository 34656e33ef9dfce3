// What the CPU loops read of a mask, derived from the boolean tensor once per change.
#pragma once

#include <cstdint>
#include <vector>

namespace sparseopt::cpu {

constexpr int kLanes = 16;  // weights per block: 16 mask bits, and one 64-byte cache line of float32

// The mask of a weight that lies in memory as [groups][segments][neurons per group][length]: neuron
// (g, j) owns `segments` runs of `length` weights (one run, except in transposed convolutions).
class PackedMask {
 public:
  // `mask` points to one byte per weight, 0 or 1, in the order of the weight's memory.
  PackedMask(const uint8_t* mask, int64_t groups, int64_t segments, int64_t neurons_per_group,
             int64_t length);

  int64_t rows() const { return groups_ * neurons_per_group_; }
  int64_t columns() const { return segments_ * length_; }
  int64_t segments() const { return segments_; }
  int64_t length() const { return length_; }
  int64_t nnz() const { return nnz_; }

  // Offset of a row's first weight, and between its segments, in weights.
  int64_t row_offset(int64_t row) const {
    if (segments_ == 1) return row * length_;
    const int64_t group = row / neurons_per_group_, neuron = row % neurons_per_group_;
    return (group * segments_ * neurons_per_group_ + neuron) * length_;
  }
  int64_t segment_stride() const { return neurons_per_group_ * length_; }

  // A row's bits, lowest first; each segment starts at a whole byte. Rows are padded with zeros to a
  // multiple of 8 bytes, so that 64 bits can be read anywhere in them.
  const uint8_t* row_bits(int64_t row) const { return bits_.data() + row * row_bytes_; }
  int64_t row_bytes() const { return row_bytes_; }
  int64_t segment_bytes() const { return (length_ + 7) / 8; }

  // The list of the blocks that hold an active weight, row after row. Walking it with prefetch beat reading
  // everything in order at any density on the first machine, not on all. There is none for rows of several
  // segments, and for tensors of 2^32 weights and more.
  bool has_active_blocks() const { return !block_start_.empty(); }
  int64_t block_begin(int64_t row) const { return block_start_[row]; }
  int64_t block_end(int64_t row) const { return block_start_[row + 1]; }
  const uint32_t* block_offset() const { return block_offset_.data(); }  // of its first weight, in the tensor
  const uint16_t* block_bits() const { return block_bits_.data(); }

 private:
  void pack(const uint8_t* mask);
  void list_active_blocks();

  int64_t groups_, segments_, neurons_per_group_, length_;
  int64_t row_bytes_ = 0;
  int64_t nnz_ = 0;
  std::vector<uint8_t> bits_;
  std::vector<int64_t> block_start_;
  std::vector<uint32_t> block_offset_;
  std::vector<uint16_t> block_bits_;
};

}  // namespace sparseopt::cpu
