// The loops around the update rule. Compiled once per instruction set: SPARSEOPT_LOOPS names the table
// that this compilation defines, SPARSEOPT_ISA the instruction set. Everything else here has internal
// linkage, so that no code of one set is linked into another.
#include <cstring>
#include <type_traits>

#include "../dtypes.h"
#include "../update_rule.h"
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

// The rule with everything that does not change from weight to weight worked out.
template <class T>
struct Prepared {
  Coefficients<T> coefficients;
  T signed_gamma;
  bool corrected;
  double divisor;

  T scale(int64_t fan_in) const {
    return corrected ? static_cast<T>(correction_factor(fan_in, divisor)) * signed_gamma : signed_gamma;
  }
};

template <class T>
Prepared<T> prepare(const Update& update) {
  const Rule& rule = *update.rule;
  const PackedMask* mask = update.tensor->mask;
  Prepared<T> prepared;
  prepared.coefficients = {T(rule.lr),           T(rule.momentum),  T(1.0 - rule.dampening),
                           T(rule.weight_decay), T(rule.ham_alpha), T(rule.ham_beta)};
  prepared.signed_gamma = T(rule.maximize ? -rule.gamma : rule.gamma);
  // An empty mask has no weight to correct, and no mean fan-in to divide by.
  prepared.corrected = mask != nullptr && mask->nnz() > 0 && rule.correction != Correction::kNone;
  if (prepared.corrected)
    prepared.divisor = rule.correction == Correction::kLayer ? double(mask->nnz()) / double(mask->rows())
                                                             : double(mask->columns());
  return prepared;
}

int64_t count_bits(const uint8_t* bits, int64_t bytes) {
  int64_t count = 0;
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, bits + i, 8);
    count += __builtin_popcountll(word);
  }
  return count;
}

SPARSEOPT_INLINE unsigned block_bits(const uint8_t* bits, int64_t element) {
  const uint8_t* at = bits + element / 8;
  return at[0] | unsigned(at[1]) << 8;
}

// The bit of each lane in the mask of a block: from a table, since not all vectors can shift by lane.
alignas(64) constexpr uint32_t kBitOfLane[kLanes] = {
    1u << 0, 1u << 1, 1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
    1u << 8, 1u << 9, 1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15};

// `value`, or 0 where `keep` is false. Not a choice, which compilers make a branch of: bits, which they
// vectorise.
template <class T>
SPARSEOPT_INLINE T kept(T value, bool keep) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= keep ? ~Bits(0) : Bits(0);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// `count` consecutive weights, of which those with a bit in `active` are updated and the others zeroed.
template <Momentum kMomentum, bool kHam, bool kMasked, class Stored, class T>
SPARSEOPT_INLINE void update_lanes(Pointers<Stored> at, int count, unsigned active, T scale,
                                   const Coefficients<T>& k) {
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    T p = load(at.p[i]);
    T b = kMomentum == Momentum::kNone ? T(0) : load(at.b[i]);
    update_weight<kMomentum, kHam>(p, scale * load(at.g[i]), b, k);
    const bool keep = !kMasked || (active & kBitOfLane[i]) != 0;
    store(at.p[i], kept(p, keep));
    if (kMomentum != Momentum::kNone) store(at.b[i], kept(b, keep));
  }
}

template <Momentum kMomentum, bool kHam, class Stored, class T>
SPARSEOPT_INLINE void update_run(Pointers<Stored> at, int64_t length, const uint8_t* bits, T scale,
                                 const Coefficients<T>& k) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes)
    update_lanes<kMomentum, kHam, true>(at.at(i), kLanes, block_bits(bits, i), scale, k);
  if (i < length) {
    // The last block may end at an odd byte of its segment: its second byte is another segment's.
    const int rest = static_cast<int>(length - i);
    const unsigned active = rest > 8 ? block_bits(bits, i) : bits[i / 8];
    update_lanes<kMomentum, kHam, true>(at.at(i), rest, active, scale, k);
  }
}

template <Momentum kMomentum, bool kHam, class Stored, class T>
SPARSEOPT_INLINE void update_active_blocks(Pointers<Stored> tensor, const PackedMask& mask, int64_t row,
                                           T scale, const Coefficients<T>& k) {
  const uint32_t* offset = mask.block_offset();
  const uint16_t* bits = mask.block_bits();
  const int64_t row_end = mask.row_offset(row) + mask.length();
  const int64_t end = mask.block_end(row), list_end = mask.block_end(mask.rows() - 1);
  for (int64_t i = mask.block_begin(row); i < end; ++i) {
    if (i + kPrefetchDistance < list_end) {
      const int64_t ahead = offset[i + kPrefetchDistance];
      __builtin_prefetch(tensor.p + ahead, 1);
      __builtin_prefetch(tensor.g + ahead, 0);
      if (kMomentum != Momentum::kNone) __builtin_prefetch(tensor.b + ahead, 1);
    }
    const int64_t element = offset[i];
    if (element + kLanes <= row_end)
      update_lanes<kMomentum, kHam, true>(tensor.at(element), kLanes, bits[i], scale, k);
    else
      update_lanes<kMomentum, kHam, true>(tensor.at(element), int(row_end - element), bits[i], scale, k);
  }
}

template <Momentum kMomentum, bool kHam, class Stored>
void update_masked(const Chunk& chunk, Pointers<Stored> tensor) {
  using T = typename ArithmeticOf<Stored>::type;
  const PackedMask& mask = *chunk.update->tensor->mask;
  const Prepared<T> prepared = prepare<T>(*chunk.update);
  for (int64_t row = chunk.begin; row < chunk.end; ++row) {
    const uint8_t* bits = mask.row_bits(row);
    const T scale = prepared.scale(count_bits(bits, mask.row_bytes()));
    if (mask.has_active_blocks()) {
      update_active_blocks<kMomentum, kHam>(tensor, mask, row, scale, prepared.coefficients);
      continue;
    }
    const Pointers<Stored> at = tensor.at(mask.row_offset(row));
    for (int64_t segment = 0; segment < mask.segments(); ++segment)
      update_run<kMomentum, kHam>(at.at(segment * mask.segment_stride()), mask.length(),
                                  bits + segment * mask.segment_bytes(), scale, prepared.coefficients);
  }
}

template <Momentum kMomentum, bool kHam, class Stored>
void update_dense(const Chunk& chunk, Pointers<Stored> tensor) {
  using T = typename ArithmeticOf<Stored>::type;
  const Prepared<T> prepared = prepare<T>(*chunk.update);
  const T scale = prepared.signed_gamma;
  int64_t i = chunk.begin;
  for (; i + kLanes <= chunk.end; i += kLanes)
    update_lanes<kMomentum, kHam, false>(tensor.at(i), kLanes, 0, scale, prepared.coefficients);
  update_lanes<kMomentum, kHam, false>(tensor.at(i), int(chunk.end - i), 0, scale, prepared.coefficients);
}

template <Momentum kMomentum, bool kHam, class Stored>
void update_chunk(const Chunk& chunk, Pointers<Stored> tensor) {
  if (chunk.update->tensor->mask)
    update_masked<kMomentum, kHam>(chunk, tensor);
  else
    update_dense<kMomentum, kHam>(chunk, tensor);
}

template <Momentum kMomentum, class Stored>
void with_ham(const Chunk& chunk, Pointers<Stored> tensor) {
  const Rule& rule = *chunk.update->rule;
  if (chunk.update->tensor->ham && (rule.ham_alpha != 0 || rule.ham_beta != 0))
    update_chunk<kMomentum, true>(chunk, tensor);
  else
    update_chunk<kMomentum, false>(chunk, tensor);
}

template <class Stored>
Pointers<Stored> pointers(const Chunk& chunk) {
  const Tensor& tensor = *chunk.update->tensor;
  return {static_cast<Stored*>(tensor.parameter), static_cast<const Stored*>(chunk.update->grad),
          static_cast<Stored*>(tensor.momentum_buffer)};
}

template <class Stored>
void update_stored(const Chunk& chunk) {
  const Pointers<Stored> tensor = pointers<Stored>(chunk);
  if (!tensor.b)
    with_ham<Momentum::kNone>(chunk, tensor);
  else if (chunk.update->rule->nesterov)
    with_ham<Momentum::kNesterov>(chunk, tensor);
  else
    with_ham<Momentum::kHeavyBall>(chunk, tensor);
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

// One sum per lane, so that the order of additions does not depend on how a compiler vectorises it.
struct LaneSums {
  double lane[kLanes] = {};

  double total() const {
    double sum = 0;
    for (double value : lane) sum += value;
    return sum;
  }
};

template <class Stored, class T>
SPARSEOPT_INLINE void add_squares(LaneSums& sums, const Stored* __restrict g, int count, unsigned active,
                                  T scale) {
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const double value = ((active >> i) & 1u) != 0 ? double(scale * load(g[i])) : 0.0;
    sums.lane[i] = multiply_add(value, value, sums.lane[i]);
  }
}

template <class Stored>
double squared_norm_stored(const Chunk& chunk) {
  using T = typename ArithmeticOf<Stored>::type;
  const PackedMask* mask = chunk.update->tensor->mask;
  const Stored* g = static_cast<const Stored*>(chunk.update->grad);
  LaneSums sums;
  if (!mask) {
    int64_t i = chunk.begin;
    for (; i + kLanes <= chunk.end; i += kLanes) add_squares(sums, g + i, kLanes, 0xffffu, T(1));
    add_squares(sums, g + i, int(chunk.end - i), 0xffffu, T(1));
    return sums.total();
  }
  Prepared<T> prepared = prepare<T>(*chunk.update);
  prepared.signed_gamma = T(1);
  for (int64_t row = chunk.begin; row < chunk.end; ++row) {
    const uint8_t* bits = mask->row_bits(row);
    const T scale = prepared.scale(count_bits(bits, mask->row_bytes()));
    for (int64_t segment = 0; segment < mask->segments(); ++segment) {
      const Stored* run = g + mask->row_offset(row) + segment * mask->segment_stride();
      const uint8_t* run_bits = bits + segment * mask->segment_bytes();
      int64_t i = 0;
      for (; i + kLanes <= mask->length(); i += kLanes) {
        const unsigned active = block_bits(run_bits, i);
        if (active) add_squares(sums, run + i, kLanes, active, scale);
      }
      const int rest = int(mask->length() - i);
      if (rest > 0)
        add_squares(sums, run + i, rest, rest > 8 ? block_bits(run_bits, i) : run_bits[i / 8], scale);
    }
  }
  return sums.total();
}

double squared_norm(const Chunk& chunk) {
  return with_stored(chunk, [&](auto stored) { return squared_norm_stored<decltype(stored)>(chunk); });
}

}  // namespace

extern const Loops SPARSEOPT_LOOPS;
const Loops SPARSEOPT_LOOPS = {SPARSEOPT_ISA, update, squared_norm};

}  // namespace sparseopt::cpu
