#include "write_watch.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "bit_words.h"

namespace sparseopt::cpu {
namespace {

// Words next to each other that are looked at together, if a tensor has enough: 1 KB of a mask, 4 KB of
// weights. Apart, each would be a cache miss. Steps with 16.8 million weights at 0.97: 4 and 64 take 1.02 and
// 1.02 of its time (make tuning, Zen 3; noise 0%). With ResNet-20, there was nothing beyond noise.
constexpr int64_t kLongestRun = 16;
// Words that a step looks at in a small tensor, at least. A word is a cache line of the mask, and four lines
// of weights: with eight of both, a step of ResNet-20 took 3 to 7% longer (Xeon, Sapphire Rapids or later; 80
// to 150 us).
constexpr int64_t kFewestOfMask = 4, kFewestOfWeights = 1;

// Returns a word for up to 64 elements of a mask from `first` on: 0 where one is 0 or -0, else 1.
template <class Number>
uint64_t pack_numbers(const void* mask, int64_t first, int64_t count) {
  const auto* numbers = static_cast<const Number*>(mask) + first;
  uint64_t word = 0;
  for (int64_t i = 0; i < count; ++i) word |= uint64_t(static_cast<Number>(numbers[i] << 1) != 0) << i;
  return word;
}

uint64_t pack_elements(const void* mask, int element_bytes, int64_t first, int64_t count) {
  switch (element_bytes) {
    case 1:
      return pack_bytes(static_cast<const uint8_t*>(mask) + first, count);
    case 2:
      return pack_numbers<uint16_t>(mask, first, count);
    case 4:
      return pack_numbers<uint32_t>(mask, first, count);
    default:
      return pack_numbers<uint64_t>(mask, first, count);
  }
}

std::vector<uint16_t> pack_blocks(const void* mask, int element_bytes, int64_t numel) {
  std::vector<uint16_t> bits(static_cast<size_t>(blocks_of(numel)));
  for (int64_t block = 0; block < blocks_of(numel); ++block)
    bits[block] = static_cast<uint16_t>(pack_elements(mask, element_bytes, kBlock * block,
                                                      std::min<int64_t>(kBlock, numel - kBlock * block)));
  return bits;
}

// Returns the word of the 64 weights from `first` on.
uint64_t word_at(const std::vector<uint16_t>& bits, int64_t first) {
  uint64_t word = 0;
  const int64_t block = first / kBlock, blocks = std::min<int64_t>(kWord / kBlock, bits.size() - block);
  if (blocks == kWord / kBlock) {
    std::memcpy(&word, &bits[block], sizeof word);
    return word;
  }
  for (int64_t i = 0; i < blocks; ++i) word |= uint64_t(bits[block + i]) << (kBlock * i);
  return word;
}

// Prefetches the elements in [first, end).
void fetch(const void* elements, int element_bytes, int64_t first, int64_t end) {
  constexpr int64_t kLine = 64;
  const char* bytes = static_cast<const char*>(elements);
  for (int64_t at = first * element_bytes; at < end * element_bytes; at += kLine)
    __builtin_prefetch(bytes + at);
}

// Calls look(first, count) for one word in `turns`, in runs of words that are spread over the tensor; at
// least for `fewest`, so that a write to much of a small tensor is noticed at once. `elements` are prefetched
// a run ahead, because each run lies on pages of its own. Returns true if any call did.
template <class Look>
bool any_word(const void* elements, int element_bytes, int64_t numel, int64_t turn, int64_t turns,
              int64_t fewest, Look look) {
  const int64_t words = (numel + kWord - 1) / kWord;
  turns = std::clamp<int64_t>(words / fewest, 1, turns);
  const int64_t run = std::clamp<int64_t>(words / (8 * turns), 1, kLongestRun), stride = turns * run;
  bool found = false;
  for (int64_t begin = turn % turns * run; begin < words; begin += stride) {
    const int64_t next = begin + stride;
    if (run > 1 && next + run <= words) fetch(elements, element_bytes, next * kWord, (next + run) * kWord);
    for (int64_t word = begin; word < std::min(begin + run, words); ++word)
      found |= look(word * kWord, std::min(kWord, numel - word * kWord));
  }
  return found;
}

// Returns true if a number is neither 0 nor -0 in a block without an active weight. In other blocks, a step
// writes zeros itself.
template <class Number>
bool any_in_dead_blocks(const Number* numbers, uint64_t bits, int64_t count) {
  Number found = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    if ((bits >> first & 0xffff) != 0) continue;
    const int64_t end = std::min<int64_t>(first + kBlock, count);
    for (int64_t i = first; i < end; ++i) found |= numbers[i];
  }
  return static_cast<Number>(found << 1) != 0;
}

}  // namespace

WriteWatch::WriteWatch(const void* mask, int element_bytes, const PackedMask& packed, int64_t numel,
                       bool in_order)
    : mask_(mask),
      element_bytes_(element_bytes),
      bits_(packed.bits()),
      own_bits_(in_order ? std::vector<uint16_t>() : pack_blocks(mask, element_bytes, numel)),
      mask_bits_(in_order ? bits_ : own_bits_),
      numel_(numel) {
  if (element_bytes != 1 && element_bytes != 2 && element_bytes != 4 && element_bytes != 8)
    throw std::invalid_argument("element_bytes must be 1, 2, 4 or 8");
}

bool WriteWatch::look(const void* weights, Dtype dtype, bool everything) {
  mask_written_ |=
      any_word(mask_, element_bytes_, numel_, turn_, everything ? 1 : kMaskTurns, kFewestOfMask,
               [&](int64_t first, int64_t count) {
                 return pack_elements(mask_, element_bytes_, first, count) != word_at(mask_bits_, first);
               });
  weights_written_ |= with_stored(dtype, [&](auto stored) {
    using Number = std::conditional_t<sizeof stored == 2, uint16_t,
                                      std::conditional_t<sizeof stored == 4, uint32_t, uint64_t>>;
    const auto* numbers = static_cast<const Number*>(weights);
    return any_word(weights, sizeof stored, numel_, turn_, everything ? 1 : kWeightTurns, kFewestOfWeights,
                    [&](int64_t first, int64_t count) {
                      return any_in_dead_blocks(numbers + first, word_at(bits_, first), count);
                    });
  });
  ++turn_;
  return mask_written_ || weights_written_;
}

}  // namespace sparseopt::cpu
