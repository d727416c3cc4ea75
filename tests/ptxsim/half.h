// SPDX-License-Identifier: Apache-2.0
// Conversions between f32 and the 16-bit formats, exact or correctly rounded. For handler files (internal
// linkage).
#pragma once

#include "lanes.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

// ---- bf16: the upper half of an f32
PTXSIM_INLINE float from_bf16(uint16_t h) {
  return bits_as<float>(static_cast<uint32_t>(h) << 16);
}
PTXSIM_INLINE uint16_t to_bf16(float f) {  // to nearest, ties to even; every NaN becomes 0x7fff
  const uint32_t b = bits_as<uint32_t>(f);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded);
}

// ---- f16
PTXSIM_INLINE float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  // place the exponent for f32 and let one multiplication normalise subnormals
  const uint32_t shifted = magnitude << 13;
  const float scaled = bits_as<float>(shifted) * 5.192296858534828e33f;  // 2^112
  const uint32_t b = magnitude >= 0x7c00u ? shifted | 0x7f800000u : bits_as<uint32_t>(scaled);
  return bits_as<float>(b | sign);
}
PTXSIM_INLINE uint16_t to_f16(float f) {  // to nearest, ties to even; every NaN becomes 0x7fff
  const uint32_t b = bits_as<uint32_t>(f), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
  if (magnitude < 0x38800000u) {  // below 2^-14: the addition rounds
    const float sum = bits_as<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_as<uint32_t>(sum) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

template <int N>
PTXSIM_INLINE void load_f16(const uint16_t* in, float* out) {
#ifdef __F16C__
  for (int k = 0; k < N; k += 8)
    _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + k))));
#else
  for (int k = 0; k < N; ++k) out[k] = from_f16(in[k]);
#endif
}
template <int N>
PTXSIM_INLINE void store_f16(const float* in, uint16_t* out) {
#ifdef __F16C__
  for (int k = 0; k < N; k += 8) {
    __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(in + k), _MM_FROUND_TO_NEAREST_INT);
    const __m128i nan = _mm_cmpgt_epi16(_mm_and_si128(h, _mm_set1_epi16(0x7fff)), _mm_set1_epi16(0x7c00));
    h = _mm_blendv_epi8(h, _mm_set1_epi16(0x7fff), nan);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), h);
  }
#else
  for (int k = 0; k < N; ++k) out[k] = to_f16(in[k]);
#endif
}
template <int N>
PTXSIM_INLINE void load_bf16(const uint16_t* in, float* out) {
#pragma GCC ivdep
  for (int k = 0; k < N; ++k) out[k] = from_bf16(in[k]);
}
template <int N>
PTXSIM_INLINE void store_bf16(const float* in, uint16_t* out) {
#pragma GCC ivdep
  for (int k = 0; k < N; ++k) out[k] = to_bf16(in[k]);
}

struct F16 {
  template <int N>
  static void load(const uint16_t* in, float* out) {
    load_f16<N>(in, out);
  }
  template <int N>
  static void store(const float* in, uint16_t* out) {
    store_f16<N>(in, out);
  }
  static constexpr uint16_t kOne = 0x3c00, kInfinity = 0x7c00;
};
struct Bf16 {
  template <int N>
  static void load(const uint16_t* in, float* out) {
    load_bf16<N>(in, out);
  }
  template <int N>
  static void store(const float* in, uint16_t* out) {
    store_bf16<N>(in, out);
  }
  static constexpr uint16_t kOne = 0x3f80, kInfinity = 0x7f80;
};

// a * b + c rounded to odd: if inexact, the last bit is one. Rounding that once more to a format at least two
// bits shorter gives the correctly rounded result. `product` must be exact. All without branches, so that
// compilers turn the loops around it into vectors.
PTXSIM_INLINE float add_to_odd(float product, float c) {
  const float s = product + c;
  const float virtual_c = s - product;
  const float error = (product - (s - virtual_c)) + (c - virtual_c);  // NaN if s is no number
  const int32_t b = bits_as<int32_t>(s);
  const int32_t toward = ((bits_as<int32_t>(error) ^ b) >> 31) | 1;  // away from zero if the signs agree
  const int32_t inexact = (error > 0.0f) | (error < 0.0f);
  return bits_as<float>(b + (toward & -(inexact & ~b)));
}
PTXSIM_INLINE double add_to_odd(double product, double c) {
  const double s = product + c;
  const double virtual_c = s - product;
  const double error = (product - (s - virtual_c)) + (c - virtual_c);
  const int64_t b = bits_as<int64_t>(s);
  const int64_t toward = ((bits_as<int64_t>(error) ^ b) >> 63) | 1;
  const int64_t inexact = (error > 0.0) | (error < 0.0);
  return bits_as<double>(b + (toward & -(inexact & ~b)));
}
PTXSIM_INLINE float narrow_to_odd(double d) {
  const float f = static_cast<float>(d);
  const double error = d - static_cast<double>(f);  // NaN if d is no number; -infinity if it overflows
  const int32_t b = bits_as<int32_t>(f);
  const int32_t toward = static_cast<int32_t>((bits_as<int64_t>(error) ^ bits_as<int64_t>(d)) >> 63) | 1;
  const int32_t inexact = (error > 0.0) | (error < 0.0);
  return bits_as<float>(b + (toward & -(inexact & ~b)));
}

}  // namespace
}  // namespace ptxsim::PTXSIM_ISA
