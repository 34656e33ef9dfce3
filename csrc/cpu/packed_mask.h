// A mask as the CPU loops read it, made from the boolean tensor once per change.
#pragma once

#include <cstdint>
#include <vector>

namespace sparseopt::cpu {

// Weights of a block: 16 mask bits, and one 64-byte cache line of float32. Blocks are counted from the first
// weight of a tensor, across its rows. The last one may be incomplete.
constexpr int kBlock = 16;

constexpr int64_t blocks_of(int64_t weights) { return (weights + kBlock - 1) / kBlock; }

// The mask of a weight that lies in memory as [groups][segments][neurons per group][length]: neuron
// (g, j) owns `segments` runs of `length` weights (one run, except in transposed convolutions).
class PackedMask {
 public:
  // `mask` points to one byte per weight, 0 or not, in the order of the weight's memory.
  PackedMask(const uint8_t* mask, int64_t groups, int64_t segments, int64_t neurons_per_group, int64_t length,
             int threads);

  int64_t neurons() const { return groups_ * neurons_per_group_; }
  int64_t runs() const { return neurons() * segments_; }
  int64_t neuron_of(int64_t run) const {
    return run / (segments_ * neurons_per_group_) * neurons_per_group_ + run % neurons_per_group_;
  }

  int64_t length() const { return length_; }

  // Writes the fan-in of each neuron.
  void count_fan_in(int64_t* fan_in, int threads) const;

  // The bits of each block: the lowest is that of the first weight in memory.
  const std::vector<uint16_t>& bits() const { return bits_; }

  // The indices of the live blocks, in order. Empty if nearly all blocks are live: a list would save nothing.
  const std::vector<uint32_t>& live_blocks() const { return live_blocks_; }
  // The bits of each live block, in the same order: beside the indices, they are read as one stream.
  const std::vector<uint16_t>& live_bits() const { return live_bits_; }
  bool has_list() const { return !live_blocks_.empty(); }
  double live_share() const { return live_share_; }

 private:
  void pack(const uint8_t* mask, int threads);
  void list_live_blocks(int threads);
  int useful_threads(int threads) const;

  int64_t groups_, segments_, neurons_per_group_, length_;
  double live_share_ = 0;
  std::vector<uint16_t> bits_;
  std::vector<uint32_t> live_blocks_;
  std::vector<uint16_t> live_bits_;
};

}  // namespace sparseopt::cpu
