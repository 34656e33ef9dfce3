// The loops around the update rule. Compiled once per instruction set: SPARSEOPT_LOOPS names the table
// that this compilation defines, SPARSEOPT_ISA the instruction set. Everything else here has internal
// linkage, so that no code of one set is linked into another.
#include <algorithm>
#include <cstring>
#include <limits>

#include "../dtypes.h"
#include "../update_rule.h"
#include "lanes.h"
#include "step.h"

namespace sparseopt::cpu {
namespace {

// Blocks of the list to prefetch ahead: 24 was better than 8, 64 and none.
constexpr int64_t kPrefetchDistance = 24;

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
Coefficients<Lanes<T>> coefficients(const Rule& rule) {
  const auto lanes = [](double value) { return Lanes<T>(T(value)); };
  return {lanes(rule.lr),           lanes(rule.momentum),  lanes(1.0 - rule.dampening),
          lanes(rule.weight_decay), lanes(rule.ham_alpha), lanes(rule.ham_beta)};
}

// What the gradients of a block are multiplied with, weight by weight: c_i of the run that it lies in, times
// `gamma`. To be asked for blocks in ascending order.
template <class T>
class Scales {
 public:
  Scales(const PackedMask* mask, Correction correction, T gamma) : gamma_(gamma) {
    if (mask && !mask->factors(correction).empty()) {
      factors_ = mask->factors(correction).data();
      runs_ = static_cast<int64_t>(mask->factors(correction).size());
      length_ = mask->length();
      end_ = 0;
    } else {
      fill(current_, gamma);
    }
  }

  // Of the weights `element` to `element + kBlock - 1`.
  __attribute__((always_inline)) inline const T* at(int64_t element) {
    if (element + kBlock <= end_) return current_;
    return at_another(element);
  }

 private:
  static void fill(T (&block)[kBlock], T value) {
    for (T& lane : block) lane = value;
  }

  T factor(int64_t run) const { return static_cast<T>(factors_[run]) * gamma_; }

  __attribute__((noinline)) const T* at_another(int64_t element) {
    if (element >= end_) {
      const int64_t near = 8 * length_;
      if (element < end_ + near)
        for (; element >= end_; end_ += length_) ++run_;
      else {
        run_ = element / length_;
        end_ = (run_ + 1) * length_;
      }
      fill(current_, factor(run_));
    }
    if (element + kBlock <= end_) return current_;
    std::copy(current_, current_ + kBlock, mixed_);
    int64_t run = run_, begin = end_;
    for (; begin < element + kBlock && ++run < runs_; begin += length_) fill_from(int(begin - element), factor(run));
    return mixed_;
  }

  // Lanes of a block of several runs: the later ones have the factor of the next run.
  void fill_from(int lane, T value) {
    using L = Lanes<T>;
    using Integer = typename L::Integer;
    const L next(value);
    for (int first = 0; first < kBlock; first += L::kCount) {
      const typename L::Bits later = lane_numbers<T>() + Integer(first) >= (typename L::Bits{} + Integer(lane));
      store_lanes(mixed_ + first, select(later, next, load_lanes(mixed_ + first)));
    }
  }

  T gamma_;
  const double* factors_ = nullptr;
  int64_t runs_ = 0, length_ = 0;
  int64_t run_ = -1, end_ = std::numeric_limits<int64_t>::max();  // the run that current_ is of, and its end
  alignas(64) T current_[kBlock];
  alignas(64) T mixed_[kBlock];
};

// One block: the weights with a bit in `active` are updated, the others become zeros.
template <Momentum kMomentum, bool kHam, bool kMasked, class Stored, class T>
SPARSEOPT_INLINE void update_block(Pointers<Stored> at, unsigned active, const T* scales,
                                   const Coefficients<Lanes<T>>& k) {
  for (int i = 0; i < kBlock; i += Lanes<T>::kCount) {
    Lanes<T> p = load_lanes(at.p + i);
    Lanes<T> b(T(0));
    if (kMomentum != Momentum::kNone) b = load_lanes(at.b + i);
    update_weight<kMomentum, kHam>(p, load_lanes(scales + i) * load_lanes(at.g + i), b, k);
    if (kMasked) {
      const auto choice = expanded<T>(active, i);
      p = kept(choice, p);
      b = kept(choice, b);
    }
    store_lanes(at.p + i, p);
    if (kMomentum != Momentum::kNone) store_lanes(at.b + i, b);
  }
}

// Calls visit(block, bits) for the blocks of a chunk.
template <bool kMasked, class Visit, class Prefetch>
SPARSEOPT_INLINE void for_each_block(const Chunk& chunk, int64_t end, Prefetch prefetch, Visit visit) {
  const PackedMask* mask = chunk.update->tensor->mask;
  if (!kMasked) {
    for (int64_t block = chunk.begin; block < end; ++block) visit(block, 0xffffu);
    return;
  }
  const uint16_t* bits = mask->bits().data();
  if (chunk.strategy == Strategy::kStream) {
    for (int64_t block = chunk.begin; block < end; ++block) visit(block, bits[block]);
    return;
  }
  const std::vector<uint32_t>& list = mask->live_blocks();
  const uint32_t* at = std::lower_bound(list.data(), list.data() + list.size(), chunk.begin);
  const uint32_t* list_end = list.data() + list.size();
  for (; at < list_end && *at < end; ++at) {
    if (at + kPrefetchDistance < list_end) prefetch(at[kPrefetchDistance]);
    visit(*at, bits[*at]);
  }
}

// Calls `inside` for every complete block of a chunk, and `rest` for one that ends with the tensor.
template <Momentum kMomentum, bool kHam, bool kMasked, class Stored>
void update_chunk(const Chunk& chunk) {
  using T = typename ArithmeticOf<Stored>::type;
  const Tensor& tensor = *chunk.update->tensor;
  const Rule& rule = *chunk.update->rule;
  const Pointers<Stored> all = pointers<Stored>(chunk);
  const Coefficients<Lanes<T>> k = coefficients<T>(rule);
  Scales<T> scales(kMasked ? tensor.mask : nullptr, rule.correction, T(rule.maximize ? -rule.gamma : rule.gamma));
  const int64_t complete = std::min(chunk.end, tensor.numel / kBlock);
  for_each_block<kMasked>(
      chunk, complete,
      [&](int64_t block) {
        const Pointers<Stored> ahead = all.at(block * kBlock);
        __builtin_prefetch(ahead.p, 1);
        __builtin_prefetch(ahead.g, 0);
        if (kMomentum != Momentum::kNone) __builtin_prefetch(ahead.b, 1);
      },
      [&](int64_t block, unsigned active) {
        const int64_t element = block * kBlock;
        update_block<kMomentum, kHam, kMasked>(all.at(element), active, scales.at(element), k);
      });
  if (complete == chunk.end) return;
  // The tensor ends within this block.
  const int64_t element = complete * kBlock;
  const size_t size = static_cast<size_t>(tensor.numel - element) * sizeof(Stored);
  Stored p[kBlock] = {}, g[kBlock] = {}, b[kBlock] = {};
  const Pointers<Stored> last = all.at(element);
  std::memcpy(p, last.p, size);
  std::memcpy(g, last.g, size);
  if (kMomentum != Momentum::kNone) std::memcpy(b, last.b, size);
  const unsigned active = kMasked ? tensor.mask->bits()[complete] : 0xffffu;
  update_block<kMomentum, kHam, kMasked>(Pointers<Stored>{p, g, b}, active, scales.at(element), k);
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

// Calls `loop` with a value of the type the tensor is stored in.
template <class Loop>
SPARSEOPT_INLINE auto with_stored(const Chunk& chunk, Loop loop) {
  switch (chunk.update->tensor->dtype) {
    case Dtype::kFloat64:
      return loop(double{});
    case Dtype::kBFloat16:
      return loop(BFloat16{});
    case Dtype::kFloat16:
      return loop(Half{});
    case Dtype::kFloat32:
      break;
  }
  return loop(float{});
}

void update(const Chunk& chunk) {
  with_stored(chunk, [&](auto stored) { update_stored<decltype(stored)>(chunk); });
}

// A sum for each weight of a block, so that the order of additions depends on nothing else.
struct BlockSums {
  static constexpr int kVectors = kBlock / Lanes<double>::kCount;
  Lanes<double> sums[kVectors];

  BlockSums() {
    for (Lanes<double>& sum : sums) sum = Lanes<double>(0.0);
  }

  template <class T>
  __attribute__((always_inline)) inline void add_squares(const T (&values)[kBlock]) {
    for (int i = 0; i < kVectors; ++i) {
      const Lanes<double> value = load_doubles(values + i * Lanes<double>::kCount);
      sums[i] = multiply_add(value, value, sums[i]);
    }
  }

  double total() const {
    double total = 0;
    for (const Lanes<double>& lanes : sums)
      for (int i = 0; i < Lanes<double>::kCount; ++i) total += lanes.v[i];
    return total;
  }
};

template <bool kMasked, class Stored>
double squared_norm_of_chunk(const Chunk& chunk) {
  using T = typename ArithmeticOf<Stored>::type;
  const Tensor& tensor = *chunk.update->tensor;
  const Stored* g = static_cast<const Stored*>(chunk.update->grad);
  Scales<T> scales(kMasked ? tensor.mask : nullptr, chunk.update->rule->correction, T(1));
  BlockSums sums;
  const auto add_block = [&](const Stored* at, unsigned active, const T* scale) __attribute__((always_inline)) {
    T values[kBlock];
    for (int i = 0; i < kBlock; i += Lanes<T>::kCount) {
      Lanes<T> value = load_lanes(scale + i) * load_lanes(at + i);
      if (kMasked) value = kept(expanded<T>(active, i), value);
      store_lanes(values + i, value);
    }
    sums.add_squares(values);
  };
  const int64_t complete = std::min(chunk.end, tensor.numel / kBlock);
  for_each_block<kMasked>(
      chunk, complete, [&](int64_t block) { __builtin_prefetch(g + block * kBlock, 0); },
      [&](int64_t block, unsigned active) {
        add_block(g + block * kBlock, active, scales.at(block * kBlock));
      });
  if (complete < chunk.end) {
    const int64_t element = complete * kBlock;
    Stored last[kBlock] = {};
    std::memcpy(last, g + element, static_cast<size_t>(tensor.numel - element) * sizeof(Stored));
    add_block(last, kMasked ? tensor.mask->bits()[complete] : 0xffffu, scales.at(element));
  }
  return sums.total();
}

double squared_norm(const Chunk& chunk) {
  return with_stored(chunk, [&](auto stored) {
    using Stored = decltype(stored);
    return chunk.update->tensor->mask ? squared_norm_of_chunk<true, Stored>(chunk)
                                      : squared_norm_of_chunk<false, Stored>(chunk);
  });
}

}  // namespace

extern const Loops SPARSEOPT_LOOPS;
const Loops SPARSEOPT_LOOPS = {SPARSEOPT_ISA, update, squared_norm};

}  // namespace sparseopt::cpu
