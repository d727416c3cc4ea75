// SPDX-License-Identifier: Apache-2.0
//
// vf: a vector of kLanes floats, for kernel files that are compiled once per instruction set.
//
// The build defines FS_ISA (the namespace, a name of fs::Isa) and one of FS_SIMD_AVX512, FS_SIMD_AVX2 or
// neither; FS_SIMD_BF16 adds the bf16 dot product. Everything here is in namespace fs::FS_ISA: the same
// inline function compiled for two instruction sets must never be merged by the linker. For the same reason
// kernel files use no std:: containers or algorithms.
//
// Rounding: + - * fma are IEEE; a vector operation on lane i gives the same bits whatever the other lanes
// hold. The portable build has no fma instruction and uses a * b + c.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(FS_SIMD_EMULATED)
// The AVX-512 intrinsics in terms of what this machine has: tests run those sources where no AVX-512 is.
#define SIMDE_ENABLE_NATIVE_ALIASES
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wall"
#pragma GCC diagnostic ignored "-Wextra"
#pragma GCC diagnostic ignored "-Wpedantic"
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#pragma GCC diagnostic pop
#elif defined(FS_SIMD_AVX512) || defined(FS_SIMD_AVX2)
#include <immintrin.h>
#endif

namespace fs::FS_ISA {

// Asks for the line at p to come to L2. A function that does nothing else must be marked always_inline, too:
// GCC takes it for one without effects and leaves out calls of it.
__attribute__((always_inline)) inline void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

using bf16 = uint16_t;  // the upper half of a float
struct f16 {
  uint16_t bits;
};

inline float to_float(float x) {
  return x;
}
inline float to_float(bf16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16);
}
inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)
    return __builtin_bit_cast(float, sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shift exponent and mantissa into place; the product rebiases the exponent and handles subnormals exactly.
  const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, scaled));
}

// Round to nearest even; NaN stays NaN.
inline bf16 to_bf16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40u);
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(FS_SIMD_AVX512)

inline constexpr int kLanes = 16;
struct vf {
  __m512 v;
};
inline vf zero() {
  return {_mm512_setzero_ps()};
}
inline vf set1(float x) {
  return {_mm512_set1_ps(x)};
}
inline vf load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
inline vf load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline vf load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store(float* p, vf x) {
  _mm512_storeu_ps(p, x.v);
}
inline vf operator+(vf a, vf b) {
  return {_mm512_add_ps(a.v, b.v)};
}
inline vf operator-(vf a, vf b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
inline vf operator*(vf a, vf b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
inline vf operator/(vf a, vf b) {
  return {_mm512_div_ps(a.v, b.v)};
}
inline vf fma(vf a, vf b, vf c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline vf max(vf a, vf b) {
  return {_mm512_max_ps(a.v, b.v)};
}
inline vf min(vf a, vf b) {
  return {_mm512_min_ps(a.v, b.v)};
}
inline vf round_even(vf a) {
  return {_mm512_roundscale_ps(a.v, 8)};
}
// a * 2^n for integral n in [-126, 127]
inline vf scale_by_power(vf a, vf n) {
  const __m512i bits =
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(bits))};
}

#elif defined(FS_SIMD_AVX2)

inline constexpr int kLanes = 8;
struct vf {
  __m256 v;
};
inline vf zero() {
  return {_mm256_setzero_ps()};
}
inline vf set1(float x) {
  return {_mm256_set1_ps(x)};
}
inline vf load(const float* p) {
  return {_mm256_loadu_ps(p)};
}
inline vf load(const bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline vf load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store(float* p, vf x) {
  _mm256_storeu_ps(p, x.v);
}
inline vf operator+(vf a, vf b) {
  return {_mm256_add_ps(a.v, b.v)};
}
inline vf operator-(vf a, vf b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
inline vf operator*(vf a, vf b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
inline vf operator/(vf a, vf b) {
  return {_mm256_div_ps(a.v, b.v)};
}
inline vf fma(vf a, vf b, vf c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
inline vf max(vf a, vf b) {
  return {_mm256_max_ps(a.v, b.v)};
}
inline vf min(vf a, vf b) {
  return {_mm256_min_ps(a.v, b.v)};
}
inline vf round_even(vf a) {
  return {_mm256_round_ps(a.v, 8)};
}
inline vf scale_by_power(vf a, vf n) {
  const __m256i bits =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(bits))};
}

#else  // portable: GNU vectors of four floats

inline constexpr int kLanes = 4;
typedef float v4f __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));
struct vf {
  v4f v;
};
inline vf zero() {
  return {v4f{0, 0, 0, 0}};
}
inline vf set1(float x) {
  return {v4f{x, x, x, x}};
}
inline vf load(const float* p) {
  vf x;
  std::memcpy(&x.v, p, sizeof(x.v));
  return x;
}
inline vf load(const bf16* p) {
  return {v4f{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
inline vf load(const f16* p) {
  return {v4f{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
inline void store(float* p, vf x) {
  std::memcpy(p, &x.v, sizeof(x.v));
}
inline vf operator+(vf a, vf b) {
  return {a.v + b.v};
}
inline vf operator-(vf a, vf b) {
  return {a.v - b.v};
}
inline vf operator*(vf a, vf b) {
  return {a.v * b.v};
}
inline vf operator/(vf a, vf b) {
  return {a.v / b.v};
}
inline vf fma(vf a, vf b, vf c) {
  return {a.v * b.v + c.v};
}
inline vf max(vf a, vf b) {
  return {a.v > b.v ? a.v : b.v};
}
inline vf min(vf a, vf b) {
  return {a.v < b.v ? a.v : b.v};
}
// Adding and taking away 1.5 * 2^23 leaves the nearest integer for |a| < 2^22.
inline vf round_even(vf a) {
  const v4f magic = set1(12582912.0f).v;
  return {(a.v + magic) - magic};
}
inline vf scale_by_power(vf a, vf n) {
  const v4i bits = (__builtin_convertvector(n.v, v4i) + 127) << 23;
  return {a.v * __builtin_bit_cast(v4f, bits)};
}

#endif

// The first `count` lanes from memory, the rest zero.
inline vf load_first(const float* p, int count) {
  float lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline void store_first(float* p, vf x, int count) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

// Lane i with lane i + kLanes/2, then quarters, ...: one fixed order.
inline float reduce_add(vf x) {
#if defined(FS_SIMD_AVX512) || defined(FS_SIMD_AVX2)
#if defined(FS_SIMD_AVX512)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
#else
  const __m256 half = x.v;
#endif
  __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
  return _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)));
#else
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#endif
}
inline float reduce_max(vf x) {
#if defined(FS_SIMD_AVX512) || defined(FS_SIMD_AVX2)
#if defined(FS_SIMD_AVX512)
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
#else
  const __m256 half = x.v;
#endif
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
#else
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
#endif
}

// 2^f for f in [-0.5, 0.5], by the Taylor coefficients of exp(f ln 2), ln2^k / k!.
inline vf exp2_fraction(vf f) {
  vf p = set1(1.5403530e-4f);
  p = fma(p, f, set1(1.3333558e-3f));
  p = fma(p, f, set1(9.6181291e-3f));
  p = fma(p, f, set1(5.5504109e-2f));
  p = fma(p, f, set1(2.4022651e-1f));
  p = fma(p, f, set1(6.9314718e-1f));
  return fma(p, f, set1(1.0f));
}
// 2^x, relative error below 3e-7 for x in [-126, 127]; smaller x gives 2^-126, larger 2^127.5. NaN stays NaN:
// of two operands, one of them NaN, max and min return the second.
inline vf exp2(vf x) {
  const vf clamped = min(set1(127.5f), max(set1(-126.0f), x));
  const vf n = min(round_even(clamped), set1(127.0f));
  return scale_by_power(exp2_fraction(clamped - n), n);
}
inline vf exp(vf x) {
  return exp2(x * set1(1.44269504f));
}

}  // namespace fs::FS_ISA
