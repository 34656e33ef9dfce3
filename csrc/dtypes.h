// The types in which weights are stored, and the one in which each is computed. Conversions of half precision
// are branch-free integer arithmetic on the bits of floats, and round to nearest even. `Bits` is uint32_t, or
// a vector of these.
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

// The float type that has these bits, and the signed integer type of the same size.
template <class Bits>
struct FloatOf;
template <>
struct FloatOf<uint32_t> {
  using type = float;
  using Signed = int32_t;
};

template <class Bits>
SPARSEOPT_INLINE typename FloatOf<Bits>::type float_of(Bits bits) {
  typename FloatOf<Bits>::type value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Bits>
SPARSEOPT_INLINE Bits bits_of(typename FloatOf<Bits>::type value) {
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// a < b, both below 2^31. The comparison is signed, because SSE2 and AVX2 have no other for vectors.
template <class Bits>
SPARSEOPT_INLINE auto is_less(Bits a, Bits b) {
  using Signed = typename FloatOf<Bits>::Signed;
  return Signed(a) < Signed(b);
}

template <class Bits>
SPARSEOPT_INLINE Bits bfloat16_to_float(Bits stored) {
  return stored << 16;
}

template <class Bits>
SPARSEOPT_INLINE Bits float_to_bfloat16(Bits bits) {
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits nan = Bits{} + 0x7fc0u, infinity = Bits{} + 0x7f800000u;
  return is_less<Bits>(infinity, bits & 0x7fffffffu) ? nan : rounded;
}

template <class Bits>
SPARSEOPT_INLINE Bits half_to_float(Bits stored) {
  const Bits magnitude = (stored & 0x7fffu) << 13;
  const Bits exponent = magnitude & 0x0f800000u;
  const Bits rebased = magnitude + ((127u - 15u) << 23);
  const Bits special = rebased + ((128u - 16u) << 23);  // infinities and NaN
  // Subnormal: 2^-14 * (1 + mantissa) - 2^-14, which stays exact when subnormal floats are flushed.
  const Bits one = Bits{} + (113u << 23);
  const Bits subnormal = bits_of<Bits>(float_of<Bits>(rebased + (1u << 23)) - float_of<Bits>(one));
  const Bits finite = exponent == 0u ? subnormal : rebased;
  const Bits value = exponent == 0x0f800000u ? special : finite;
  return value | ((stored & 0x8000u) << 16);
}

template <class Bits>
SPARSEOPT_INLINE Bits float_to_half(Bits bits) {
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits nan = Bits{} + 0x7e00u, infinity = Bits{} + 0x7c00u;
  const auto limit = [](uint32_t bits) { return Bits{} + bits; };
  const Bits special = is_less(limit(0x7f800000u), magnitude) ? nan : infinity;
  // Adding 0.5 leaves a subnormal half in the low mantissa bits, rounded by the addition itself.
  const Bits a_half = Bits{} + (126u << 23);
  const Bits subnormal = bits_of<Bits>(float_of<Bits>(magnitude) + float_of<Bits>(a_half)) - a_half;
  const Bits normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits finite = is_less(magnitude, limit(0x38800000u)) ? subnormal : normal;
  const Bits half = is_less(magnitude, limit(0x47800000u)) ? finite : special;
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

// Calls `body` with a value of the type in which weights of a dtype are stored. For the host alone: each
// kernel is compiled for one type.
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
