// Vectors as wide as the instruction set that this is compiled for, so that loops are written once.
//
// Vec<T> has kCount lanes of type float or double, and takes the place of a number in update_rule.h. Half
// precision is converted by loads and stores. Built on the vector types of GCC and Clang, with intrinsics for
// what these cannot express. Internal linkage throughout, as in loops.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) || defined(__i386__)
// GCC 12 warns of its own intrinsics (its bug 105593).
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "../dtypes.h"
#include "../update_rule.h"

namespace sparseopt::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Numbers __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Numbers __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
};

template <class T>
struct Vec {
  using Numbers = typename VectorOf<T>::Numbers;
  using Bits = typename VectorOf<T>::Integers;  // lanes as integers; results of comparisons, 0 or -1
  using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  static constexpr int kCount = kVectorBytes / int(sizeof(T));

  Numbers v;

  Vec() = default;
  __attribute__((always_inline)) explicit Vec(T value) : v(value - Numbers{}) {}  // a sum would lose -0
  __attribute__((always_inline)) Vec(Numbers numbers) : v(numbers) {}
  __attribute__((always_inline)) Bits bits() const {
    Bits bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
  }
};

template <class T>
SPARSEOPT_INLINE Vec<T> from_bits(typename Vec<T>::Bits bits) {
  Vec<T> a;
  std::memcpy(&a.v, &bits, sizeof bits);
  return a;
}

// `first`, first + 1, first + 2, ...
template <class T>
SPARSEOPT_INLINE typename Vec<T>::Bits iota(int first) {
  typename Vec<T>::Bits numbers;
  for (int i = 0; i < Vec<T>::kCount; ++i) numbers[i] = first + i;
  return numbers;
}

// The same integer in all lanes.
template <class T>
SPARSEOPT_INLINE typename Vec<T>::Bits broadcast(int value) {
  return typename Vec<T>::Bits{} + typename Vec<T>::Integer(value);
}

template <class T>
SPARSEOPT_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return a.v + b.v;
}
template <class T>
SPARSEOPT_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return a.v - b.v;
}
template <class T>
SPARSEOPT_INLINE Vec<T> operator-(Vec<T> a) {
  return -a.v;
}
template <class T>
SPARSEOPT_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return a.v * b.v;
}
template <class T>
SPARSEOPT_INLINE typename Vec<T>::Bits operator<(Vec<T> a, Vec<T> b) {
  return a.v < b.v;
}
template <class T>
SPARSEOPT_INLINE typename Vec<T>::Bits operator>(Vec<T> a, Vec<T> b) {
  return a.v > b.v;
}
template <class T>
SPARSEOPT_INLINE typename Vec<T>::Bits operator==(Vec<T> a, Vec<T> b) {
  return a.v == b.v;
}

// `a` where the choice is -1, `b` where it is 0.
template <class T>
SPARSEOPT_INLINE Vec<T> select(typename Vec<T>::Bits choice, Vec<T> a, Vec<T> b) {
  return choice ? a.v : b.v;
}

// `a` in the lanes whose bit is set, where lane 0 has bit `first`; 0 in the others.
template <class T>
SPARSEOPT_INLINE Vec<T> kept(unsigned bits, int first, Vec<T> a) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits >> first), a.v);
  else
    return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits >> first), a.v);
#else
  const typename Vec<T>::Bits bit = broadcast<T>(1) << iota<T>(first);
  return from_bits<T>(((broadcast<T>(int(bits)) & bit) == bit) & a.bits());
#endif
}

// a * b + c, rounded as multiply_add of single numbers.
template <class T>
SPARSEOPT_INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_fmadd_ps(a.v, b.v, c.v);
  else
    return _mm512_fmadd_pd(a.v, b.v, c.v);
#elif defined(__FMA__)
  if constexpr (std::is_same_v<T, float>)
    return _mm256_fmadd_ps(a.v, b.v, c.v);
  else
    return _mm256_fmadd_pd(a.v, b.v, c.v);
#elif defined(__aarch64__)
  if constexpr (std::is_same_v<T, float>)
    return vfmaq_f32(c.v, a.v, b.v);
  else
    return vfmaq_f64(c.v, a.v, b.v);
#else
  return a * b + c;
#endif
}

// e to the power of x, for x in [-5, 5] or NaN, within 2 units in the last place: 2^n * e^r, where n is an
// integer and e^r the first terms of its series, |r| <= ln(2) / 2.
template <class T>
SPARSEOPT_INLINE Vec<T> exponential(Vec<T> x) {
  constexpr bool kSingle = std::is_same_v<T, float>;
  constexpr int kMantissa = kSingle ? 23 : 52;
  constexpr T kLog2E = T(1.4426950408889634);
  // The upper part has so few bits that n times it is exact.
  constexpr T kLn2Upper = kSingle ? T(0x1.62ep-1) : T(0x1.62e42feep-1);
  constexpr T kLn2Lower = kSingle ? T(0x1.0bfbe8p-15) : T(0x1.a39ef35793c76p-33);
  // Added to a small number, it leaves the number's nearest integer in the lowest bits.
  constexpr T kRounder = kSingle ? T(0x1.8p23) : T(0x1.8p52);
  constexpr int kTerms = kSingle ? 7 : 13;
  constexpr double kInverseFactorials[] = {1.0,
                                           1.0,
                                           1.0 / 2,
                                           1.0 / 6,
                                           1.0 / 24,
                                           1.0 / 120,
                                           1.0 / 720,
                                           1.0 / 5040,
                                           1.0 / 40320,
                                           1.0 / 362880,
                                           1.0 / 3628800,
                                           1.0 / 39916800,
                                           1.0 / 479001600,
                                           1.0 / 6227020800};
  const Vec<T> rounded = multiply_add(x, Vec<T>(kLog2E), Vec<T>(kRounder));
  const Vec<T> n = rounded - Vec<T>(kRounder);
  Vec<T> r = multiply_add(n, Vec<T>(-kLn2Upper), x);
  r = multiply_add(n, Vec<T>(-kLn2Lower), r);
  Vec<T> sum{T(kInverseFactorials[kTerms])};
  for (int term = kTerms - 1; term >= 0; --term)
    sum = multiply_add(sum, r, Vec<T>(T(kInverseFactorials[term])));
  const Vec<T> power = from_bits<T>((rounded.bits() << kMantissa) + Vec<T>(T(1)).bits());
  return sum * power;
}

typedef uint16_t Uint16Vec __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Uint32Vec __attribute__((vector_size(kVectorBytes)));

}  // namespace
}  // namespace sparseopt::cpu

namespace sparseopt {
template <>
struct FloatOf<cpu::Uint32Vec> {
  using type = cpu::Vec<float>::Numbers;
  using Signed = cpu::Vec<float>::Bits;
};
}  // namespace sparseopt

namespace sparseopt::cpu {
namespace {

template <class T>
SPARSEOPT_INLINE Vec<T> load_vec(const T* at) {
  typename Vec<T>::Numbers v;
  std::memcpy(&v, at, sizeof v);
#if defined(__AVX512F__)
  // A compiler would put the load and a mask into one instruction, which processors do not prefetch for: on a
  // Zen 5, a norm took three times as long.
  asm("" : "+v"(v));
#endif
  return v;
}

template <class T>
SPARSEOPT_INLINE void store_vec(T* at, Vec<T> a) {
  std::memcpy(at, &a.v, sizeof a.v);
}

// True if any bit of any lane is set, the sign of -0 included.
template <class T>
SPARSEOPT_INLINE bool any_bit(Vec<T> a) {
#if defined(__AVX512F__)
  const __m512i bits = __m512i(a.v);
  return _mm512_test_epi32_mask(bits, bits) != 0;
#elif defined(__AVX2__)
  const __m256i bits = __m256i(a.v);
  return _mm256_testz_si256(bits, bits) == 0;
#else
  uint64_t parts[kVectorBytes / 8], any = 0;
  std::memcpy(parts, &a.v, sizeof parts);
  for (uint64_t part : parts) any |= part;
  return any != 0;
#endif
}

SPARSEOPT_INLINE void to_doubles(Vec<double> value, Vec<double> (&parts)[1]) { parts[0] = value; }
SPARSEOPT_INLINE void to_doubles(Vec<float> value, Vec<double> (&parts)[2]) {
#if defined(__AVX512F__)
  parts[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(value.v));
  parts[1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(value.v, 1));
#elif defined(__AVX2__)
  parts[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(value.v));
  parts[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(value.v, 1));
#elif defined(__SSE2__)
  parts[0] = _mm_cvtps_pd(value.v);
  parts[1] = _mm_cvtps_pd(_mm_movehl_ps(value.v, value.v));
#else
  typedef float HalfVec __attribute__((vector_size(kVectorBytes / 2)));
  HalfVec halves[2];
  std::memcpy(halves, &value.v, sizeof halves);
  for (int i = 0; i < 2; ++i) parts[i] = __builtin_convertvector(halves[i], Vec<double>::Numbers);
#endif
}

// Loads 16 bits into each lane. Intrinsics, because compilers find no single instruction for it.
template <class Stored>
SPARSEOPT_INLINE Uint32Vec load_widened(const Stored* at) {
#if defined(__AVX512F__)
  return Uint32Vec(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
#elif defined(__AVX2__)
  return Uint32Vec(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#elif defined(__SSE2__)
  return Uint32Vec(
      _mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)), _mm_setzero_si128()));
#else
  Uint16Vec halves;
  std::memcpy(&halves, at, sizeof halves);
  return __builtin_convertvector(halves, Uint32Vec);
#endif
}

// Stores lanes below 2^16 as 16 bits each.
template <class Stored>
SPARSEOPT_INLINE void store_narrowed(Stored* at, Uint32Vec a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(__m512i(a)));
#elif defined(__AVX2__)
  const __m256i all = __m256i(a);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), halves);
#elif defined(__SSE2__)
  const __m128i extended = _mm_srai_epi32(_mm_slli_epi32(__m128i(a), 16), 16);  // packs saturates none
  _mm_storel_epi64(reinterpret_cast<__m128i*>(at), _mm_packs_epi32(extended, extended));
#else
  const Uint16Vec halves = __builtin_convertvector(a, Uint16Vec);
  std::memcpy(at, &halves, sizeof halves);
#endif
}

// Loads and stores of weights without conversion, for kernels that keep their bits or zero them.
template <class T>
SPARSEOPT_INLINE Vec<T> load_raw(const T* at) {
  return load_vec(at);
}
template <class T>
SPARSEOPT_INLINE void store_raw(T* at, Vec<T> a) {
  store_vec(at, a);
}
SPARSEOPT_INLINE Vec<float> load_raw(const uint16_t* at) { return float_of(load_widened(at)); }
SPARSEOPT_INLINE void store_raw(uint16_t* at, Vec<float> a) { store_narrowed(at, bits_of<Uint32Vec>(a.v)); }

SPARSEOPT_INLINE Vec<float> load_vec(const BFloat16* at) {
  return float_of(bfloat16_to_float(load_widened(at)));
}

SPARSEOPT_INLINE void store_vec(BFloat16* at, Vec<float> a) {
  store_narrowed(at, float_to_bfloat16(bits_of<Uint32Vec>(a.v)));
}

// The processor converts half precision, unless it is x86 without F16C. It keeps more bits of a NaN.
SPARSEOPT_INLINE Vec<float> load_vec(const Half* at) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&at->bits)));
#else
  return float_of(half_to_float(load_widened(at)));
#endif
}

SPARSEOPT_INLINE void store_vec(Half* at, Vec<float> a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16(&at->bits, vreinterpret_u16_f16(vcvt_f16_f32(a.v)));
#else
  store_narrowed(at, float_to_half(bits_of<Uint32Vec>(a.v)));
#endif
}

}  // namespace
}  // namespace sparseopt::cpu
