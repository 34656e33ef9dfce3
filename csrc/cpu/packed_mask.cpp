#include "packed_mask.h"

#include <algorithm>
#include <cstring>

#include "bit_words.h"

namespace sparseopt::cpu {
namespace {

// No list is made of more than this share of the blocks: it would be up to 9% of the bytes of float32
// weights. 0.6 and 0.99 take 1.00 and 0.98 of its time at sparsity 0.8, 1.02 and 1.00 at 0.9 (make tuning,
// Zen 3; noise 6%).
constexpr double kWorthListing = 0.9;
// Blocks that a thread takes at a time. New masks: 1024 takes 0.95 of its time, 1 << 14 0.90, with noise of
// 7% (make tuning, Zen 3); but with 1 << 14, more masks would have fewer pieces than threads.
constexpr int64_t kPieceBlocks = 4096;

// Returns how many of the bits in [begin, end) are 1.
int64_t count_range(const std::vector<uint16_t>& bits, int64_t begin, int64_t end) {
  int64_t count = 0;
  const int64_t last = end / kBlock;
  int64_t block = begin / kBlock;
  if (begin % kBlock != 0) count -= count_bits(bits[block] & ~(0xffffu << (begin % kBlock)));
  for (; block + 4 <= last; block += 4) {
    uint64_t word;
    std::memcpy(&word, &bits[block], sizeof word);
    count += count_bits(word);
  }
  for (; block < last; ++block) count += count_bits(bits[block]);
  if (end % kBlock != 0) count += count_bits(bits[last] & ~(0xffffu << (end % kBlock)));
  return count;
}

}  // namespace

PackedMask::PackedMask(const uint8_t* mask, int64_t groups, int64_t segments, int64_t neurons_per_group,
                       int64_t length, int threads)
    : groups_(groups), segments_(segments), neurons_per_group_(neurons_per_group), length_(length) {
  bits_.assign(static_cast<size_t>(blocks_of(runs() * length_)), 0);
  threads = useful_threads(threads);
  pack(mask, threads);
  list_live_blocks(threads);
}

void PackedMask::pack(const uint8_t* mask, int threads) {
  const int64_t size = runs() * length_;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < size; first += kWord) {
    const uint64_t word = pack_bytes(mask + first, size - first);
    const int64_t block = first / kBlock, blocks = std::min<int64_t>(kWord / kBlock, blocks_of(size) - block);
    for (int64_t i = 0; i < blocks; ++i) bits_[block + i] = static_cast<uint16_t>(word >> (kBlock * i));
  }
}

void PackedMask::list_live_blocks(int threads) {
  const int64_t blocks = static_cast<int64_t>(bits_.size());
  const int64_t pieces = (blocks + kPieceBlocks - 1) / kPieceBlocks;
  std::vector<int64_t> start(static_cast<size_t>(pieces) + 1, 0);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t end = std::min(blocks, (piece + 1) * kPieceBlocks);
    for (int64_t block = piece * kPieceBlocks; block < end; ++block) start[piece + 1] += bits_[block] != 0;
  }
  for (int64_t piece = 0; piece < pieces; ++piece) start[piece + 1] += start[piece];
  const int64_t live = start[pieces];
  live_share_ = blocks == 0 ? 0 : double(live) / double(blocks);
  if (live_share_ > kWorthListing || blocks > int64_t(UINT32_MAX)) return;
  live_blocks_.resize(static_cast<size_t>(live));
  live_bits_.resize(static_cast<size_t>(live));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    uint32_t found[kPieceBlocks];
    int64_t count = 0;
    const int64_t end = std::min(blocks, (piece + 1) * kPieceBlocks);
    for (int64_t block = piece * kPieceBlocks; block < end; ++block) {
      found[count] = static_cast<uint32_t>(block);
      count += bits_[block] != 0;  // without a branch, which would be mispredicted
    }
    std::copy(found, found + count, live_blocks_.begin() + start[piece]);
    for (int64_t i = 0; i < count; ++i) live_bits_[start[piece] + i] = bits_[found[i]];
  }
}

void PackedMask::count_fan_in(int64_t* fan_in, int threads) const {
  threads = useful_threads(threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t neuron = 0; neuron < neurons(); ++neuron) {
    const int64_t group = neuron / neurons_per_group_;
    int64_t run = group * segments_ * neurons_per_group_ + neuron % neurons_per_group_;
    fan_in[neuron] = 0;
    for (int64_t segment = 0; segment < segments_; ++segment, run += neurons_per_group_)
      fan_in[neuron] += count_range(bits_, run * length_, (run + 1) * length_);
  }
}

int PackedMask::useful_threads(int threads) const {
  return static_cast<int>(std::clamp<int64_t>(int64_t(bits_.size()) / kPieceBlocks, 1, threads));
}

}  // namespace sparseopt::cpu
