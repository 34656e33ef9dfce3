// The loops around the update rule, compiled once per instruction set: SPARSEOPT_ISA names the set, and
// SPARSEOPT_LOOPS the table of functions that this defines. Everything else has internal linkage, so that no
// code of one set is linked into another.
#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../dtypes.h"
#include "../update_rule.h"
#include "bit_words.h"
#include "step.h"
#include "vec.h"

namespace sparseopt::cpu {
namespace {

#define ALWAYS_INLINE __attribute__((always_inline)) inline
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

// Vectors in a block.
template <class T>
constexpr int kVectors = kBlock / Vec<T>::kCount;

// Weights in a cache line.
template <class Stored>
constexpr int kLine = 64 / int(sizeof(Stored));

// Prefetch distances, in blocks of the list: from far into the second cache, and from near into the first,
// which waits for few lines at a time. Into the first alone, from 24 blocks ahead, took 1.18 times as long at
// sparsity 0.9, 1.08 at 0.97 and 0.97 at 0.99; into the second alone, 1.13, 0.97 and 1.14 (33.5 million
// weights, Xeon, Sapphire Rapids or later, AVX-512, cold caches; noise up to 5%). On a Zen 4, AVX-512,
// cold caches, at 0.9 to 0.99: kFar 16 takes 1.04 to 1.13 of its time, 64 takes 0.99 to 1.05; kNear 3 takes
// 0.96 to 1.02, 12 takes 1.00 to 1.04; without kFar it takes 1.08 to 1.68 (noise up to 4%).
constexpr int64_t kFar = 32, kNear = 6;
using IntoL2 = std::integral_constant<int, 2>;
using IntoL1 = std::integral_constant<int, 3>;

template <class Stored>
struct Pointers {
  Stored* __restrict p;
  const Stored* __restrict g;
  Stored* __restrict b;

  Pointers at(int64_t offset) const { return {p + offset, g + offset, b ? b + offset : nullptr}; }
};

template <class Stored>
Pointers<Stored> pointers(const Chunk& chunk) {
  const Tensor& tensor = *chunk.update->tensor;
  return {static_cast<Stored*>(tensor.parameter), static_cast<const Stored*>(chunk.update->grad),
          static_cast<Stored*>(tensor.momentum_buffer)};
}

template <class T>
Coefficients<Vec<T>> coefficients(const Rule& rule) {
  const auto vec = [](double value) { return Vec<T>(T(value)); };
  return {vec(rule.lr),           vec(rule.momentum),  vec(1.0 - rule.dampening),
          vec(rule.weight_decay), vec(rule.ham_alpha), vec(rule.ham_beta)};
}

// The scale of each gradient: c_i of the run that holds its weight, times `gamma`.
template <class T>
class Scales {
 public:
  Scales(const Tensor& tensor, T gamma) : gamma_(gamma), all_(gamma) {
    if (tensor.factors.empty()) return;
    end_ = 0;
    factors_ = tensor.factors.data();
    last_run_ = static_cast<int64_t>(tensor.factors.size()) - 1;
    length_ = tensor.mask->length();
    begin_at_blocks_ = length_ % kBlock == 0;
    // 2^64 / length_, rounded up: run_of() is exact while element times length is below 2^64.
    inverse_length_ = length_ == 1 ? 0 : ~uint64_t(0) / static_cast<uint64_t>(length_) + 1;
  }

  // False if branches on the lengths of runs would be mispredicted.
  bool has_long_runs() const { return factors_ == nullptr || length_ >= kLongRun; }

  // Returns how many blocks from `element` on lie in one run, and so have the one scale of all_alike(). 0 for
  // short runs, too.
  int64_t blocks_alike(int64_t element) {
    if (element >= end_ && has_long_runs()) enter(run_of(element));
    return std::max<int64_t>((end_ - element) / kBlock, 0);
  }
  ALWAYS_INLINE void all_alike(Vec<T> (&block)[kVectors<T>]) const {
    for (Vec<T>& vec : block) vec = all_;
  }

  // Writes the scales of the block from `element` on. Call it for blocks in ascending order.
  ALWAYS_INLINE void get(int64_t element, Vec<T> (&block)[kVectors<T>]) {
    if (element + kBlock <= end_) return all_alike(block);
    int64_t run = run_of(element);
    if (begin_at_blocks_) {
      const Vec<T> scale(factor(run));
      for (Vec<T>& vec : block) vec = scale;
      return;
    }
    int64_t next = (run + 1) * length_ - element;  // where the next run begins, counted from `element`
    for (Vec<T>& vec : block) vec = Vec<T>(factor(run));
    // At most two runs that are no shorter than a block meet in it: no branch, which would be mispredicted.
    do {
      run = std::min(run + 1, last_run_);
      const Vec<T> scale(factor(run));
      const int begin = static_cast<int>(std::min<int64_t>(next, kBlock));
      for (int i = 0; i < kVectors<T>; ++i)
        block[i] = select(iota<T>(i * Vec<T>::kCount) >= broadcast<T>(begin), scale, block[i]);
      next += length_;
    } while (length_ < kBlock && next < kBlock);
  }

 private:
  void enter(int64_t run) {
    all_ = Vec<T>(factor(run));
    end_ = (run + 1) * length_;
  }

  int64_t run_of(int64_t element) const {
    if (length_ == 1) return element;
    return static_cast<int64_t>((static_cast<unsigned __int128>(element) * inverse_length_) >> 64);
  }

  T factor(int64_t run) const { return static_cast<T>(factors_[run]) * gamma_; }

  // The fewest weights of a long run. ResNet-20 and layers of 8.4 million weights at 0.9: a quarter of it
  // takes 0.97 and 1.00 of its time, four times as many 1.07 and 1.05 (make tuning, Zen 3; noise up to 7%).
  static constexpr int64_t kLongRun = 8 * kBlock;

  T gamma_;
  Vec<T> all_;  // the scale of weights before end_
  int64_t end_ = std::numeric_limits<int64_t>::max();
  const double* factors_ = nullptr;
  int64_t last_run_ = 0, length_ = 0;
  // All runs begin at a block, and so no block lies in two. Rows of 32 and 64 weights, list, 33.5 million
  // weights: without this, 0.9 takes 1.02 to 1.04 of its time, 0.97 1.08 to 1.17, 0.99 1.10 to 1.20 (Zen 4,
  // AVX-512 and AVX2, cold caches).
  bool begin_at_blocks_ = false;
  uint64_t inverse_length_ = 0;
};

// Updates the weights of a block whose bit in `active` is 1, and zeroes the others.
template <Momentum kMomentum, bool kHam, bool kMasked, class Stored, class T>
SPARSEOPT_INLINE void update_block(Pointers<Stored> at, unsigned active, const Vec<T> (&scales)[kVectors<T>],
                                   const Coefficients<Vec<T>>& k) {
  for (int i = 0; i < kBlock; i += Vec<T>::kCount) {
    Vec<T> p = load_vec(at.p + i);
    Vec<T> b(T(0));
    if (kMomentum != Momentum::kNone) b = load_vec(at.b + i);
    update_weight<kMomentum, kHam>(p, scales[i / Vec<T>::kCount] * load_vec(at.g + i), b, k);
    if (kMasked) {
      p = kept(active, i, p);
      b = kept(active, i, b);
    }
    store_vec(at.p + i, p);
    if (kMomentum != Momentum::kNone) store_vec(at.b + i, b);
  }
}

// Calls visit(block, bits, scales) for the blocks of a chunk.
template <bool kMasked, class T, class Prefetch, class Visit>
SPARSEOPT_INLINE void for_each_block(const Chunk& chunk, int64_t end, Scales<T>& scales, Prefetch prefetch,
                                     Visit visit) {
  const PackedMask* mask = chunk.update->tensor->mask;
  const uint16_t* bits = kMasked ? mask->bits().data() : nullptr;
  Vec<T> scale[kVectors<T>];
  if (!kMasked || chunk.strategy == Strategy::kStream) {
    for (int64_t block = chunk.begin; block < end;) {
      const int64_t alike = block + std::min(scales.blocks_alike(block * kBlock), end - block);
      scales.all_alike(scale);
      for (; block < alike; ++block) visit(block, kMasked ? bits[block] : 0xffffu, scale);
      if (block == end) return;
      scales.get(block * kBlock, scale);
      visit(block, kMasked ? bits[block] : 0xffffu, scale);
      ++block;
    }
    return;
  }
  const uint32_t* list = mask->live_blocks().data();
  const uint16_t* list_bits = mask->live_bits().data();
  const int64_t size = static_cast<int64_t>(mask->live_blocks().size());
  int64_t i = std::lower_bound(list, list + size, chunk.begin) - list;
  const int64_t stop = std::lower_bound(list + i, list + size, end) - list;
  const auto visit_next = [&]() ALWAYS_INLINE_LAMBDA {
    if (i + kFar < size) prefetch(list[i + kFar], IntoL2());
    if (i + kNear < size) prefetch(list[i + kNear], IntoL1());
    visit(list[i], list_bits[i], scale);
    ++i;
  };
  if (!scales.has_long_runs()) {
    while (i < stop) {
      scales.get(int64_t(list[i]) * kBlock, scale);
      visit_next();
    }
    return;
  }
  while (i < stop) {
    const int64_t alike = list[i] + scales.blocks_alike(int64_t(list[i]) * kBlock);
    if (alike > list[i])
      scales.all_alike(scale);
    else
      scales.get(int64_t(list[i]) * kBlock, scale);
    do visit_next();
    while (i < stop && list[i] < alike);
  }
}

template <Momentum kMomentum, bool kHam, bool kMasked, class Stored>
void update_chunk(const Chunk& chunk) {
  using T = typename ArithmeticOf<Stored>::type;
  const Tensor& tensor = *chunk.update->tensor;
  const Rule& rule = *chunk.update->rule;
  const Pointers<Stored> all = pointers<Stored>(chunk);
  const Coefficients<Vec<T>> k = coefficients<T>(rule);
  Scales<T> scales(tensor, T(rule.maximize ? -rule.gamma : rule.gamma));
  const int64_t complete = std::min(chunk.end, tensor.numel / kBlock);
  for_each_block<kMasked>(
      chunk, complete, scales,
      [&](int64_t block, auto where) ALWAYS_INLINE_LAMBDA {
        for (int i = 0; i < kBlock; i += kLine<Stored>) {
          const Pointers<Stored> ahead = all.at(block * kBlock + i);
          __builtin_prefetch(ahead.p, 1, where.value);
          __builtin_prefetch(ahead.g, 0, where.value);
          if (kMomentum != Momentum::kNone) __builtin_prefetch(ahead.b, 1, where.value);
        }
      },
      [&](int64_t block, unsigned active, const Vec<T>(&scale)[kVectors<T>]) ALWAYS_INLINE_LAMBDA {
        update_block<kMomentum, kHam, kMasked>(all.at(block * kBlock), active, scale, k);
      });
  if (complete == chunk.end) return;
  // The tensor ends within the last block.
  const int64_t element = complete * kBlock;
  const size_t size = static_cast<size_t>(tensor.numel - element) * sizeof(Stored);
  Stored p[kBlock] = {}, g[kBlock] = {}, b[kBlock] = {};
  const Pointers<Stored> last = all.at(element);
  std::memcpy(p, last.p, size);
  std::memcpy(g, last.g, size);
  if (kMomentum != Momentum::kNone) std::memcpy(b, last.b, size);
  const unsigned active = kMasked ? tensor.mask->bits()[complete] : 0xffffu;
  Vec<T> scale[kVectors<T>];
  scales.get(element, scale);
  update_block<kMomentum, kHam, kMasked>(Pointers<Stored>{p, g, b}, active, scale, k);
  std::memcpy(last.p, p, size);
  if (kMomentum != Momentum::kNone) std::memcpy(last.b, b, size);
}

template <Momentum kMomentum, bool kHam, class Stored>
void with_mask(const Chunk& chunk) {
  if (chunk.update->tensor->mask)
    update_chunk<kMomentum, kHam, true, Stored>(chunk);
  else
    update_chunk<kMomentum, kHam, false, Stored>(chunk);
}

template <Momentum kMomentum, class Stored>
void with_ham(const Chunk& chunk) {
  if (chunk.update->ham())
    with_mask<kMomentum, true, Stored>(chunk);
  else
    with_mask<kMomentum, false, Stored>(chunk);
}

template <class Stored>
void update_stored(const Chunk& chunk) {
  if (!chunk.update->tensor->momentum_buffer)
    with_ham<Momentum::kNone, Stored>(chunk);
  else if (chunk.update->rule->nesterov)
    with_ham<Momentum::kNesterov, Stored>(chunk);
  else
    with_ham<Momentum::kHeavyBall, Stored>(chunk);
}

void update(const Chunk& chunk) {
  with_stored(chunk.update->tensor->dtype, [&](auto stored) { update_stored<decltype(stored)>(chunk); });
}

// Adds the squares of the scaled gradients of a block, in double. There is a sum for each place in a block,
// so that the order of additions is the same for every vector size.
template <bool kMasked, class Stored, class T>
SPARSEOPT_INLINE void add_squares(const Stored* at, unsigned active, const Vec<T> (&scales)[kVectors<T>],
                                  Vec<double> (&sums)[kVectors<double>]) {
  for (int i = 0; i < kVectors<T>; ++i) {
    Vec<T> value = scales[i] * load_vec(at + i * Vec<T>::kCount);
    if (kMasked) value = kept(active, i * Vec<T>::kCount, value);
    constexpr int kParts = kVectors<double> / kVectors<T>;
    Vec<double> parts[kParts];
    to_doubles(value, parts);
    for (int j = 0; j < kParts; ++j) {
      Vec<double>& sum = sums[i * kParts + j];
      sum = multiply_add(parts[j], parts[j], sum);
    }
  }
}

// With kMasked, only active weights count; else all, each with the scale of its run.
template <bool kMasked, class Stored>
double squared_norm_of_chunk(const Chunk& chunk) {
  using T = typename ArithmeticOf<Stored>::type;
  const Tensor& tensor = *chunk.update->tensor;
  const Stored* g = static_cast<const Stored*>(chunk.update->grad);
  Scales<T> scales(tensor, T(1));
  Vec<double> sums[kVectors<double>];
  for (Vec<double>& sum : sums) sum = Vec<double>(0.0);
  const int64_t complete = std::min(chunk.end, tensor.numel / kBlock);
  for_each_block<kMasked>(
      chunk, complete, scales,
      [&](int64_t block, auto where) ALWAYS_INLINE_LAMBDA {
        for (int i = 0; i < kBlock; i += kLine<Stored>)
          __builtin_prefetch(g + block * kBlock + i, 0, where.value);
      },
      [&](int64_t block, unsigned active, const Vec<T>(&scale)[kVectors<T>])
          ALWAYS_INLINE_LAMBDA { add_squares<kMasked>(g + block * kBlock, active, scale, sums); });
  if (complete < chunk.end) {
    const int64_t element = complete * kBlock;
    Stored last[kBlock] = {};
    std::memcpy(last, g + element, static_cast<size_t>(tensor.numel - element) * sizeof(Stored));
    Vec<T> scale[kVectors<T>];
    scales.get(element, scale);
    add_squares<kMasked>(last, kMasked ? tensor.mask->bits()[complete] : 0xffffu, scale, sums);
  }
  double total = 0;
  for (const Vec<double>& sum : sums)
    for (int i = 0; i < Vec<double>::kCount; ++i) total += sum.v[i];
  return total;
}

double squared_norm(const Chunk& chunk, bool dense) {
  return with_stored(chunk.update->tensor->dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const bool masked = chunk.update->tensor->mask != nullptr && !dense;
    return masked ? squared_norm_of_chunk<true, Stored>(chunk) : squared_norm_of_chunk<false, Stored>(chunk);
  });
}

// Zeroes the elements of a block whose bit in `active` is 0. Writes nothing if all of them are 0 already.
template <class Stored>
SPARSEOPT_INLINE void zero_block(unsigned active, Stored* at) {
  using T = std::conditional_t<sizeof(Stored) == 8, double, float>;
  Vec<T> block[kVectors<T>], outside(T(0));
  for (int i = 0; i < kVectors<T>; ++i) {
    block[i] = load_raw(at + i * Vec<T>::kCount);
    outside = from_bits<T>(outside.bits() | kept(~active, i * Vec<T>::kCount, block[i]).bits());
  }
  if (!any_bit(outside)) return;
  for (int i = 0; i < kVectors<T>; ++i)
    store_raw(at + i * Vec<T>::kCount, kept(active, i * Vec<T>::kCount, block[i]));
}

template <class Stored>
void zero_stored(const uint8_t* mask, Stored* data, int64_t count) {
  int64_t at = 0;
  for (; at + kWord <= count; at += kWord) {
    const uint64_t word = pack_word(mask + at);
    for (int i = 0; i < kWord; i += kBlock) zero_block(unsigned(word >> i) & 0xffffu, data + at + i);
  }
  for (; at < count; ++at)
    if (mask[at] == 0) data[at] = 0;
}

void zero_outside(const uint8_t* mask, void* data, int64_t count, int element_bytes) {
  switch (element_bytes) {
    case 2:
      return zero_stored(mask, static_cast<uint16_t*>(data), count);
    case 4:
      return zero_stored(mask, static_cast<float*>(data), count);
    default:
      return zero_stored(mask, static_cast<double*>(data), count);
  }
}

}  // namespace

extern const Loops SPARSEOPT_LOOPS;
const Loops SPARSEOPT_LOOPS = {SPARSEOPT_ISA, update, squared_norm, zero_outside};

}  // namespace sparseopt::cpu
