// How weights are stored, and the type they are computed in. Conversions of half precision are branch-free
// integer arithmetic on the bits of floats, and round to nearest even. They are written over `Word`:
// uint32_t, or a vector of these.
#pragma once

#include <cstdint>
#include <cstring>

#include "names.h"
#include "update_rule.h"

namespace sparseopt {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// The float, or vector of floats, whose bits a Word holds; and the signed integer of its size.
template <class Word>
struct FloatOf;
template <>
struct FloatOf<uint32_t> {
  using type = float;
  using Signed = int32_t;
};

template <class Word>
SPARSEOPT_INLINE typename FloatOf<Word>::type float_of(Word bits) {
  typename FloatOf<Word>::type value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Word>
SPARSEOPT_INLINE Word bits_of(typename FloatOf<Word>::type value) {
  Word bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// a < b, of words below 2^31: processors compare vectors of signed integers alone.
template <class Word>
SPARSEOPT_INLINE auto is_less(Word a, Word b) {
  using Signed = typename FloatOf<Word>::Signed;
  return Signed(a) < Signed(b);
}

template <class Word>
SPARSEOPT_INLINE Word bfloat16_to_float(Word stored) {
  return stored << 16;
}

template <class Word>
SPARSEOPT_INLINE Word float_to_bfloat16(Word bits) {
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Word nan = Word{} + 0x7fc0u, infinity = Word{} + 0x7f800000u;
  return is_less<Word>(infinity, bits & 0x7fffffffu) ? nan : rounded;
}

template <class Word>
SPARSEOPT_INLINE Word half_to_float(Word stored) {
  const Word magnitude = (stored & 0x7fffu) << 13;
  const Word exponent = magnitude & 0x0f800000u;
  const Word rebased = magnitude + ((127u - 15u) << 23);
  const Word special = rebased + ((128u - 16u) << 23);  // infinities and NaN
  // Subnormal: 2^-14 * (1 + mantissa) - 2^-14, which stays exact when subnormal floats are flushed.
  const Word one = Word{} + (113u << 23);
  const Word subnormal = bits_of<Word>(float_of<Word>(rebased + (1u << 23)) - float_of<Word>(one));
  const Word finite = exponent == 0u ? subnormal : rebased;
  const Word value = exponent == 0x0f800000u ? special : finite;
  return value | ((stored & 0x8000u) << 16);
}

template <class Word>
SPARSEOPT_INLINE Word float_to_half(Word bits) {
  const Word magnitude = bits & 0x7fffffffu;
  const Word nan = Word{} + 0x7e00u, infinity = Word{} + 0x7c00u;
  const auto limit = [](uint32_t bits) { return Word{} + bits; };
  const Word special = is_less(limit(0x7f800000u), magnitude) ? nan : infinity;
  // Adding 0.5 leaves a subnormal half in the low mantissa bits, rounded by the addition itself.
  const Word a_half = Word{} + (126u << 23);
  const Word subnormal = bits_of<Word>(float_of<Word>(magnitude) + float_of<Word>(a_half)) - a_half;
  const Word normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Word finite = is_less(magnitude, limit(0x38800000u)) ? subnormal : normal;
  const Word half = is_less(magnitude, limit(0x47800000u)) ? finite : special;
  return half | ((bits >> 16) & 0x8000u);
}

SPARSEOPT_INLINE float load(float stored) { return stored; }
SPARSEOPT_INLINE double load(double stored) { return stored; }
SPARSEOPT_INLINE float load(BFloat16 stored) { return float_of(bfloat16_to_float(uint32_t(stored.bits))); }
SPARSEOPT_INLINE float load(Half stored) { return float_of(half_to_float(uint32_t(stored.bits))); }

SPARSEOPT_INLINE void store(float& to, float value) { to = value; }
SPARSEOPT_INLINE void store(double& to, double value) { to = value; }
SPARSEOPT_INLINE void store(BFloat16& to, float value) {
  to.bits = static_cast<uint16_t>(float_to_bfloat16(bits_of<uint32_t>(value)));
}
SPARSEOPT_INLINE void store(Half& to, float value) {
  to.bits = static_cast<uint16_t>(float_to_half(bits_of<uint32_t>(value)));
}

// Calls `body` with a value of the type that weights of a dtype are stored in. On the host: kernels are
// compiled for one type each.
template <class Body>
static auto with_stored(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::kFloat64:
      return body(double{});
    case Dtype::kBFloat16:
      return body(BFloat16{});
    case Dtype::kFloat16:
      return body(Half{});
    case Dtype::kFloat32:
      break;
  }
  return body(float{});
}

template <class Stored>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};

}  // namespace sparseopt
