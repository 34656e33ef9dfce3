#include "write_watch.h"

#include <algorithm>
#include <type_traits>

#include "bit_words.h"

namespace sparseopt::cpu {
namespace {

constexpr int64_t kAhead =
    8;  // words that are asked for before they are looked at: each lies on another page

std::vector<uint16_t> pack_blocks(const uint8_t* mask, int64_t numel) {
  std::vector<uint16_t> bits(static_cast<size_t>(blocks_of(numel)));
  for (int64_t block = 0; block < blocks_of(numel); ++block)
    bits[block] = static_cast<uint16_t>(
        pack_bytes(mask + kBlock * block, std::min<int64_t>(kBlock, numel - kBlock * block)));
  return bits;
}

// The bits of the 64 weights from `first` on.
uint64_t word_at(const std::vector<uint16_t>& bits, int64_t first) {
  uint64_t word = 0;
  const int64_t block = first / kBlock, blocks = std::min<int64_t>(kWord / kBlock, bits.size() - block);
  for (int64_t i = 0; i < blocks; ++i) word |= uint64_t(bits[block + i]) << (kBlock * i);
  return word;
}

// Calls look(first, count) for every `turns`-th word of 64 weights, from that of `turn` on.
template <class Fetch, class Look>
void for_words(int64_t numel, int64_t turn, int64_t turns, Fetch fetch, Look look) {
  const int64_t stride = turns * kWord;
  for (int64_t first = turn % turns * kWord; first < numel; first += stride) {
    if (first + kAhead * stride < numel) fetch(first + kAhead * stride);
    look(first, std::min(kWord, numel - first));
  }
}

// Tells if one of `count` numbers is not zero, of either sign, where the bit is 0.
template <class Number>
bool any_outside(const Number* numbers, uint64_t bits, int64_t count) {
  Number found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Number inactive = static_cast<Number>((bits >> i & 1) - 1);
    found |= static_cast<Number>(numbers[i] << 1) & inactive;
  }
  return found != 0;
}

}  // namespace

WriteWatch::WriteWatch(const uint8_t* mask, const PackedMask& packed, int64_t numel, bool in_order)
    : mask_(mask),
      bits_(packed.bits()),
      own_bits_(in_order ? std::vector<uint16_t>() : pack_blocks(mask, numel)),
      mask_bits_(in_order ? bits_ : own_bits_),
      numel_(numel) {}

bool WriteWatch::look(const void* weights, Dtype dtype, bool everything) {
  for_words(
      numel_, turn_, everything ? 1 : kMaskTurns, [&](int64_t first) { __builtin_prefetch(mask_ + first); },
      [&](int64_t first, int64_t count) {
        mask_written_ |= pack_bytes(mask_ + first, count) != word_at(mask_bits_, first);
      });
  with_stored(dtype, [&](auto stored) {
    using Number = std::conditional_t<sizeof stored == 2, uint16_t,
                                      std::conditional_t<sizeof stored == 4, uint32_t, uint64_t>>;
    const auto* numbers = static_cast<const Number*>(weights);
    for_words(
        numel_, turn_, everything ? 1 : kWeightTurns,
        [&](int64_t first) { __builtin_prefetch(numbers + first); },
        [&](int64_t first, int64_t count) {
          weights_written_ |= any_outside(numbers + first, word_at(bits_, first), count);
        });
  });
  ++turn_;
  return mask_written_ || weights_written_;
}

}  // namespace sparseopt::cpu
