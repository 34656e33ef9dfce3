// How weights are stored, and the type they are computed in. Conversions are branch-free integer
// arithmetic, which compilers vectorise for every instruction set, and round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "update_rule.h"

namespace sparseopt {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

SPARSEOPT_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

SPARSEOPT_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SPARSEOPT_INLINE float load(float stored) { return stored; }
SPARSEOPT_INLINE double load(double stored) { return stored; }
SPARSEOPT_INLINE float load(BFloat16 stored) { return float_of(uint32_t(stored.bits) << 16); }

SPARSEOPT_INLINE float load(Half stored) {
  const uint32_t magnitude = uint32_t(stored.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t rebased = magnitude + ((127u - 15u) << 23);
  const uint32_t special = rebased + ((128u - 16u) << 23);  // infinities and NaN
  // Subnormal: 2^-14 * (1 + mantissa) - 2^-14, which stays exact when subnormal floats are flushed.
  const uint32_t subnormal = bits_of(float_of(rebased + (1u << 23)) - float_of(113u << 23));
  const uint32_t value = exponent == 0x0f800000u ? special : (exponent == 0 ? subnormal : rebased);
  return float_of(value | (uint32_t(stored.bits & 0x8000u) << 16));
}

SPARSEOPT_INLINE void store(float& to, float value) { to = value; }
SPARSEOPT_INLINE void store(double& to, double value) { to = value; }

SPARSEOPT_INLINE void store(BFloat16& to, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

SPARSEOPT_INLINE void store(Half& to, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // Adding 0.5 leaves a subnormal half in the low mantissa bits, rounded by the addition itself.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t half = magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? subnormal : normal);
  to.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
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
