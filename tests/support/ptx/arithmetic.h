// What PTX instructions that look at one lane alone make of their operands: functions from bits to bits, by
// the instruction's opcode. Of those instructions that have a rounding mode, only the modes that the
// compilers of this project's kernels write are there.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <unordered_map>

namespace ptx {

using Bits = uint64_t;
using Function = Bits (*)(const Bits* operands);
using Functions = std::unordered_map<std::string, Function>;

// The value whose bits are the lowest ones.
template <class T>
T of(Bits bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
Bits bits_of(T value) {
  Bits bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

// Half precision, rounded to the nearest number, of which the even one of two.
inline Bits to_float16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const Bits sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isinf(value)) return sign | 0x7c00;
  const int exponent = value == 0 ? -14 : std::max(std::ilogb(value), -14);
  const auto units = static_cast<Bits>(std::nearbyint(std::ldexp(std::fabs(value), 10 - exponent)));
  return sign | std::min<Bits>((static_cast<Bits>(exponent + 14) << 10) + units, 0x7c00);
}

inline float from_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, units = bits & 1023;
  float value =
      exponent == 0 ? std::ldexp(float(units), -24) : std::ldexp(float(1024 + units), exponent - 25);
  if (exponent == 31) value = units == 0 ? INFINITY : NAN;
  return (bits & 0x8000) != 0 ? -value : value;
}

inline Bits to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const Bits bits = bits_of(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float from_bfloat16(uint16_t bits) { return of<float>(Bits(bits) << 16); }

[[gnu::noinline]] inline float fma_downwards(float a, float b, float c) {
  const int before = std::fegetround();
  std::fesetround(FE_DOWNWARD);
  const float result = std::fma(a, b, c);
  std::fesetround(before);
  return result;
}

// What .ftz makes of a number.
inline float without_subnormals(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

inline float exp2_of(float x) { return static_cast<float>(std::exp2(double(x))); }

template <class T>
using Wider = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                 std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;

// The unsigned type of a size: sums of signed numbers must not overflow.
template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class T>
void add_comparisons(Functions& to, const std::string& type) {
  to["setp.eq." + type] = [](const Bits* x) { return Bits(of<T>(x[0]) == of<T>(x[1])); };
  to["setp.ne." + type] = [](const Bits* x) {
    return Bits(of<T>(x[0]) < of<T>(x[1]) || of<T>(x[0]) > of<T>(x[1]));  // not if one of them is NaN
  };
  to["setp.lt." + type] = [](const Bits* x) { return Bits(of<T>(x[0]) < of<T>(x[1])); };
  to["setp.le." + type] = [](const Bits* x) { return Bits(of<T>(x[0]) <= of<T>(x[1])); };
  to["setp.gt." + type] = [](const Bits* x) { return Bits(of<T>(x[0]) > of<T>(x[1])); };
  to["setp.ge." + type] = [](const Bits* x) { return Bits(of<T>(x[0]) >= of<T>(x[1])); };
}

template <class T>
void add_selection(Functions& to, const std::string& type) {
  to["selp." + type] = [](const Bits* x) { return bits_of(x[2] != 0 ? of<T>(x[0]) : of<T>(x[1])); };
}

template <class T>
void add_integers(Functions& to, const std::string& type) {
  using U = Unsigned<T>;
  add_comparisons<T>(to, type);
  add_selection<T>(to, type);
  to["add." + type] = [](const Bits* x) { return bits_of(U(of<U>(x[0]) + of<U>(x[1]))); };
  to["sub." + type] = [](const Bits* x) { return bits_of(U(of<U>(x[0]) - of<U>(x[1]))); };
  to["neg." + type] = [](const Bits* x) { return bits_of(U(-of<U>(x[0]))); };
  to["mul.lo." + type] = [](const Bits* x) { return bits_of(U(of<U>(x[0]) * Bits(of<U>(x[1])))); };
  to["mad.lo." + type] = [](const Bits* x) {
    return bits_of(U(of<U>(x[0]) * Bits(of<U>(x[1])) + of<U>(x[2])));
  };
  to["min." + type] = [](const Bits* x) { return bits_of(std::min(of<T>(x[0]), of<T>(x[1]))); };
  to["max." + type] = [](const Bits* x) { return bits_of(std::max(of<T>(x[0]), of<T>(x[1]))); };
  to["div." + type] = [](const Bits* x) {
    const T divisor = of<T>(x[1]);
    if (std::is_signed_v<T> && divisor == T(-1)) return bits_of(U(-of<U>(x[0])));
    return bits_of(divisor == 0 ? T(-1) : T(of<T>(x[0]) / divisor));  // by 0: anything
  };
  to["shr." + type] = [](const Bits* x) {
    const unsigned most = 8 * sizeof(T) - 1, by = of<uint32_t>(x[1]);
    if (by > most) return bits_of(T(std::is_signed_v<T> && of<T>(x[0]) < 0 ? -1 : 0));
    return bits_of(T(of<T>(x[0]) >> by));
  };
  if constexpr (sizeof(T) < 8) {
    using W = Wider<T>;
    to["mul.wide." + type] = [](const Bits* x) { return bits_of(W(W(of<T>(x[0])) * W(of<T>(x[1])))); };
    to["mad.wide." + type] = [](const Bits* x) {
      return bits_of(W(Bits(W(of<T>(x[0])) * W(of<T>(x[1]))) + of<Unsigned<W>>(x[2])));
    };
  }
  if constexpr (sizeof(T) == 4) {
    to["bfe." + type] = [](const Bits* x) {
      const unsigned start = of<uint8_t>(x[1]), count = std::min<unsigned>(of<uint8_t>(x[2]), 32);
      if (count == 0) return Bits(0);
      const int64_t shifted = int64_t(of<T>(x[0])) >> std::min(start, 63u);
      const int64_t field = shifted & ((int64_t(1) << count) - 1);
      const bool is_negative = std::is_signed_v<T> && (field >> (count - 1) & 1) != 0;
      return bits_of(static_cast<uint32_t>(is_negative ? field - (int64_t(1) << count) : field));
    };
  }
}

template <class U>
void add_bits(Functions& to, const std::string& type) {
  to["setp.eq." + type] = [](const Bits* x) { return Bits(of<U>(x[0]) == of<U>(x[1])); };
  to["setp.ne." + type] = [](const Bits* x) { return Bits(of<U>(x[0]) != of<U>(x[1])); };
  add_selection<U>(to, type);
  to["and." + type] = [](const Bits* x) { return bits_of(U(of<U>(x[0]) & of<U>(x[1]))); };
  to["or." + type] = [](const Bits* x) { return bits_of(U(of<U>(x[0]) | of<U>(x[1]))); };
  to["xor." + type] = [](const Bits* x) { return bits_of(U(of<U>(x[0]) ^ of<U>(x[1]))); };
  to["not." + type] = [](const Bits* x) { return bits_of(U(~of<U>(x[0]))); };
  to["shl." + type] = [](const Bits* x) {
    const unsigned by = of<uint32_t>(x[1]);
    return bits_of(U(by < 8 * sizeof(U) ? of<U>(x[0]) << by : 0));
  };
  to["shr." + type] = [](const Bits* x) {
    const unsigned by = of<uint32_t>(x[1]);
    return bits_of(U(by < 8 * sizeof(U) ? of<U>(x[0]) >> by : 0));
  };
  to["popc." + type] = [](const Bits* x) { return Bits(__builtin_popcountll(of<U>(x[0]))); };
  to["bfi." + type] = [](const Bits* x) {
    const unsigned start = of<uint8_t>(x[2]), count = of<uint8_t>(x[3]);
    const Bits ones = count >= 64 ? ~Bits(0) : (Bits(1) << count) - 1;
    const Bits mask = start >= 64 ? 0 : ones << start, field = start >= 64 ? 0 : x[0] << start;
    return bits_of(U((x[1] & ~mask) | (field & mask)));
  };
}

template <class T>
void add_floats(Functions& to, const std::string& type) {
  add_comparisons<T>(to, type);
  add_selection<T>(to, type);
  // Those with a "u" are true of NaN.
  to["setp.equ." + type] = [](const Bits* x) {
    return Bits(!(of<T>(x[0]) < of<T>(x[1]) || of<T>(x[0]) > of<T>(x[1])));
  };
  to["setp.neu." + type] = [](const Bits* x) { return Bits(of<T>(x[0]) != of<T>(x[1])); };
  to["setp.ltu." + type] = [](const Bits* x) { return Bits(!(of<T>(x[0]) >= of<T>(x[1]))); };
  to["setp.leu." + type] = [](const Bits* x) { return Bits(!(of<T>(x[0]) > of<T>(x[1]))); };
  to["setp.gtu." + type] = [](const Bits* x) { return Bits(!(of<T>(x[0]) <= of<T>(x[1]))); };
  to["setp.geu." + type] = [](const Bits* x) { return Bits(!(of<T>(x[0]) < of<T>(x[1]))); };
  to["setp.nan." + type] = [](const Bits* x) {
    return Bits(std::isnan(of<T>(x[0])) || std::isnan(of<T>(x[1])));
  };
  to["add.rn." + type] = [](const Bits* x) { return bits_of(T(of<T>(x[0]) + of<T>(x[1]))); };
  to["sub.rn." + type] = [](const Bits* x) { return bits_of(T(of<T>(x[0]) - of<T>(x[1]))); };
  to["mul.rn." + type] = [](const Bits* x) { return bits_of(T(of<T>(x[0]) * of<T>(x[1]))); };
  to["div.rn." + type] = [](const Bits* x) { return bits_of(T(of<T>(x[0]) / of<T>(x[1]))); };
  to["sqrt.rn." + type] = [](const Bits* x) { return bits_of(T(std::sqrt(of<T>(x[0])))); };
  to["fma.rn." + type] = [](const Bits* x) {
    return bits_of(std::fma(of<T>(x[0]), of<T>(x[1]), of<T>(x[2])));
  };
  to["neg." + type] = [](const Bits* x) { return bits_of(-of<T>(x[0])); };
  to["abs." + type] = [](const Bits* x) { return bits_of(std::fabs(of<T>(x[0]))); };
}

// From one integer to another, and to and from floating-point numbers. An integer is extended by its sign.
template <class To, class From>
void add_conversion(Functions& to, const std::string& to_type, const std::string& from_type) {
  const std::string types = "." + to_type + "." + from_type;
  if constexpr (std::is_integral_v<To> && std::is_integral_v<From>) {
    to["cvt" + types] = [](const Bits* x) {
      const To value = static_cast<To>(of<From>(x[0]));
      return std::is_signed_v<To> ? bits_of(static_cast<int64_t>(value)) : bits_of(value);
    };
  } else if constexpr (std::is_integral_v<From>) {
    to["cvt.rn" + types] = [](const Bits* x) { return bits_of(static_cast<To>(of<From>(x[0]))); };
  } else if constexpr (std::is_integral_v<To>) {
    to["cvt.rzi" + types] = [](const Bits* x) {
      const From value = of<From>(x[0]), most = static_cast<From>(std::numeric_limits<To>::max());
      const From least = static_cast<From>(std::numeric_limits<To>::min());
      if (std::isnan(value))
        return sizeof(To) == 8 || sizeof(From) == 8 ? Bits(1) << (8 * sizeof(To) - 1) : Bits(0);
      if (value >= most) return bits_of(std::numeric_limits<To>::max());
      return bits_of(value <= least ? std::numeric_limits<To>::min() : static_cast<To>(value));
    };
  }
}

template <class To>
void add_conversions(Functions& to, const std::string& type) {
  add_conversion<To, uint8_t>(to, type, "u8"), add_conversion<To, int8_t>(to, type, "s8");
  add_conversion<To, uint16_t>(to, type, "u16"), add_conversion<To, int16_t>(to, type, "s16");
  add_conversion<To, uint32_t>(to, type, "u32"), add_conversion<To, int32_t>(to, type, "s32");
  add_conversion<To, uint64_t>(to, type, "u64"), add_conversion<To, int64_t>(to, type, "s64");
  add_conversion<To, float>(to, type, "f32"), add_conversion<To, double>(to, type, "f64");
}

inline Functions all_functions() {
  Functions to;
  add_integers<int16_t>(to, "s16"), add_integers<uint16_t>(to, "u16");
  add_integers<int32_t>(to, "s32"), add_integers<uint32_t>(to, "u32");
  add_integers<int64_t>(to, "s64"), add_integers<uint64_t>(to, "u64");
  add_bits<uint16_t>(to, "b16"), add_bits<uint32_t>(to, "b32"), add_bits<uint64_t>(to, "b64");
  add_floats<float>(to, "f32"), add_floats<double>(to, "f64");
  add_conversions<uint8_t>(to, "u8"), add_conversions<int8_t>(to, "s8");
  add_conversions<uint16_t>(to, "u16"), add_conversions<int16_t>(to, "s16");
  add_conversions<uint32_t>(to, "u32"), add_conversions<int32_t>(to, "s32");
  add_conversions<uint64_t>(to, "u64"), add_conversions<int64_t>(to, "s64");
  add_conversions<float>(to, "f32"), add_conversions<double>(to, "f64");

  to["and.pred"] = [](const Bits* x) { return x[0] & x[1]; };
  to["or.pred"] = [](const Bits* x) { return x[0] | x[1]; };
  to["xor.pred"] = [](const Bits* x) { return x[0] ^ x[1]; };
  to["not.pred"] = [](const Bits* x) { return x[0] ^ 1; };
  to["add.s16x2"] = [](const Bits* x) {
    const uint32_t low = (x[0] + x[1]) & 0xffff, high = (x[0] >> 16) + (x[1] >> 16);
    return Bits(low | high << 16);
  };
  to["prmt.b32"] = [](const Bits* x) {
    const Bits bytes = (x[0] & 0xffffffff) | x[1] << 32;
    Bits result = 0;
    for (int i = 0; i < 4; ++i) {
      const unsigned choice = x[2] >> (4 * i) & 15;
      Bits byte = bytes >> (8 * (choice & 7)) & 255;
      if ((choice & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;
      result |= byte << (8 * i);
    }
    return result;
  };

  to["fma.rm.f32"] = [](const Bits* x) {
    return bits_of(fma_downwards(of<float>(x[0]), of<float>(x[1]), of<float>(x[2])));
  };
  to["ex2.approx.f32"] = [](const Bits* x) { return bits_of(exp2_of(of<float>(x[0]))); };
  to["ex2.approx.ftz.f32"] = [](const Bits* x) {
    return bits_of(without_subnormals(exp2_of(without_subnormals(of<float>(x[0])))));
  };
  to["sqrt.rn.ftz.f32"] = [](const Bits* x) {
    return bits_of(std::sqrt(without_subnormals(of<float>(x[0]))));
  };
  to["div.rn.ftz.f32"] = [](const Bits* x) {
    return bits_of(
        without_subnormals(without_subnormals(of<float>(x[0])) / without_subnormals(of<float>(x[1]))));
  };
  to["cvt.sat.f32.f32"] = [](const Bits* x) {
    const float value = of<float>(x[0]);
    return bits_of(value > 0 ? std::min(value, 1.0f) : 0.0f);  // of NaN, too
  };
  to["cvt.f64.f32"] = [](const Bits* x) { return bits_of(double(of<float>(x[0]))); };
  to["cvt.rn.f32.f64"] = [](const Bits* x) { return bits_of(float(of<double>(x[0]))); };
  to["cvt.f32.f16"] = [](const Bits* x) { return bits_of(from_float16(of<uint16_t>(x[0]))); };
  to["cvt.f32.bf16"] = [](const Bits* x) { return bits_of(from_bfloat16(of<uint16_t>(x[0]))); };
  to["cvt.rn.f16.f32"] = [](const Bits* x) { return to_float16(of<float>(x[0])); };
  to["cvt.rn.bf16.f32"] = [](const Bits* x) { return to_bfloat16(of<float>(x[0])); };
  to["cvt.rz.bf16.f32"] = [](const Bits* x) {
    return std::isnan(of<float>(x[0])) ? Bits(0x7fff) : x[0] >> 16 & 0xffff;
  };
  // The first operand becomes the high half.
  to["cvt.rn.f16x2.f32"] = [](const Bits* x) {
    return to_float16(of<float>(x[0])) << 16 | to_float16(of<float>(x[1]));
  };
  to["cvt.rn.bf16x2.f32"] = [](const Bits* x) {
    return to_bfloat16(of<float>(x[0])) << 16 | to_bfloat16(of<float>(x[1]));
  };
  return to;
}

}  // namespace ptx
