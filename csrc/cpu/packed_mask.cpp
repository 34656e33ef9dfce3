#include "packed_mask.h"

#include <cstring>

namespace sparseopt::cpu {
namespace {

uint8_t pack_byte(const uint8_t* mask, int64_t count) {
  unsigned packed = 0;
  for (int64_t i = 0; i < count; ++i) packed |= unsigned(mask[i] != 0) << i;
  return static_cast<uint8_t>(packed);
}

int64_t count_bits(const std::vector<uint8_t>& bits) {
  int64_t count = 0;
  for (size_t i = 0; i < bits.size(); i += 8) {
    uint64_t word;
    std::memcpy(&word, bits.data() + i, 8);
    count += __builtin_popcountll(word);
  }
  return count;
}

}  // namespace

PackedMask::PackedMask(const uint8_t* mask, int64_t groups, int64_t segments, int64_t neurons_per_group,
                       int64_t length)
    : groups_(groups), segments_(segments), neurons_per_group_(neurons_per_group), length_(length) {
  row_bytes_ = (segments_ * segment_bytes() + 7) / 8 * 8;
  bits_.assign(static_cast<size_t>(rows() * row_bytes_), 0);
  pack(mask);
  nnz_ = count_bits(bits_);
  const bool offsets_fit = rows() * columns() <= int64_t(UINT32_MAX);
  if (segments_ == 1 && offsets_fit) list_active_blocks();
}

void PackedMask::pack(const uint8_t* mask) {
  for (int64_t row = 0; row < rows(); ++row) {
    for (int64_t segment = 0; segment < segments_; ++segment) {
      const uint8_t* from = mask + row_offset(row) + segment * segment_stride();
      uint8_t* to = bits_.data() + row * row_bytes_ + segment * segment_bytes();
      int64_t i = 0;
      for (; i + 8 <= length_; i += 8) to[i / 8] = pack_byte(from + i, 8);
      if (i < length_) to[i / 8] = pack_byte(from + i, length_ - i);
    }
  }
}

void PackedMask::list_active_blocks() {
  const int64_t blocks_per_row = (length_ + kLanes - 1) / kLanes;
  block_start_.reserve(static_cast<size_t>(rows()) + 1);
  block_start_.push_back(0);
  for (int64_t row = 0; row < rows(); ++row) {
    const uint8_t* bits = row_bits(row);
    for (int64_t block = 0; block < blocks_per_row; ++block) {
      const unsigned active = bits[2 * block] | unsigned(bits[2 * block + 1]) << 8;
      if (active == 0) continue;
      block_offset_.push_back(static_cast<uint32_t>(row * length_ + block * kLanes));
      block_bits_.push_back(static_cast<uint16_t>(active));
    }
    block_start_.push_back(static_cast<int64_t>(block_offset_.size()));
  }
}

}  // namespace sparseopt::cpu
