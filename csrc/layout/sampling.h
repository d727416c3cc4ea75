// SPDX-License-Identifier: Apache-2.0
//
// The arithmetic of sampling, element by element, shared by all devices so that they pick the same token from
// the same logits. Only + - * / in float32, each rounded on its own: no fused multiply-add, no math library.
// Whatever is summed over tokens is summed in integers, which any order of threads does exactly.
#pragma once

#include <cstdint>

#include "layout/host_device.h"

namespace fs {

// Below this temperature a row is greedy.
inline constexpr float kGreedyTemperature = 1e-5f;
inline constexpr float kLog2E = 1.44269504f;
inline constexpr float kLn2 = 0.693147181f;
inline constexpr float kLargestFloat = 3.40282347e+38f;

#if defined(__CUDA_ARCH__)
FS_HOST_DEVICE float rounded_add(float a, float b) {
  return __fadd_rn(a, b);
}
FS_HOST_DEVICE float rounded_mul(float a, float b) {
  return __fmul_rn(a, b);
}
FS_HOST_DEVICE float float_from_bits(uint32_t bits) {
  return __uint_as_float(bits);
}
FS_HOST_DEVICE uint32_t bits_of(float x) {
  return __float_as_uint(x);
}
#else  // the host compiler is told -ffp-contract=off
FS_HOST_DEVICE float rounded_add(float a, float b) {
  return a + b;
}
FS_HOST_DEVICE float rounded_mul(float a, float b) {
  return a * b;
}
FS_HOST_DEVICE float float_from_bits(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
FS_HOST_DEVICE uint32_t bits_of(float x) {
  return __builtin_bit_cast(uint32_t, x);
}
#endif

// x if `keep`, else 0; by a mask, because a branch would keep compilers from vectorising the loop around it.
FS_HOST_DEVICE float zero_unless(bool keep, float x) {
  return float_from_bits(bits_of(x) & (keep ? 0xffffffffu : 0u));
}

// An unsigned integer that orders like the float; -0 and +0 are equal. Not for NaN.
FS_HOST_DEVICE uint32_t order_key(float x) {
  const uint32_t bits = bits_of(rounded_add(x, 0.0f));
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
FS_HOST_DEVICE float float_from_order_key(uint32_t key) {
  return float_from_bits((key & 0x80000000u) != 0 ? key ^ 0x80000000u : ~key);
}

// 2^t for t <= 0, relative error below 3e-7; exactly 1 at 0, never above 1; 0 below -126 (-infinity too).
FS_HOST_DEVICE float power_of_two(float t) {
  // Adding 1.5 * 2^23 rounds to the nearest integer, which then is in the low bits.
  constexpr float magic = 12582912.0f;
  const float shifted = rounded_add(t, magic);
  const float f = rounded_add(t, -rounded_add(shifted, -magic));  // [-0.5, 0.5], exact
  const uint32_t exponent = (bits_of(shifted) - bits_of(magic) + 127u) << 23;
  // Taylor coefficients of exp(f ln 2): ln2^k / k!
  float p = 1.5403530e-4f;
  p = rounded_add(rounded_mul(p, f), 1.3333558e-3f);
  p = rounded_add(rounded_mul(p, f), 9.6181291e-3f);
  p = rounded_add(rounded_mul(p, f), 5.5504109e-2f);
  p = rounded_add(rounded_mul(p, f), 2.4022651e-1f);
  p = rounded_add(rounded_mul(p, f), 6.9314718e-1f);
  p = rounded_add(rounded_mul(p, f), 1.0f);
  return zero_unless(t >= -126.0f, rounded_mul(p, float_from_bits(exponent)));
}

// log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], relative error below 1e-7.
FS_HOST_DEVICE float log1p_near_zero(float f) {
  // A polynomial of degree 7 through the Chebyshev nodes of (log(1 + f) - f + f^2 / 2) / f^3.
  float p = -8.10155869e-2f;
  p = rounded_add(rounded_mul(p, f), 1.27123073e-1f);
  p = rounded_add(rounded_mul(p, f), -1.29722387e-1f);
  p = rounded_add(rounded_mul(p, f), 1.42021745e-1f);
  p = rounded_add(rounded_mul(p, f), -1.66422471e-1f);
  p = rounded_add(rounded_mul(p, f), 2.00014681e-1f);
  p = rounded_add(rounded_mul(p, f), -2.50002980e-1f);
  p = rounded_add(rounded_mul(p, f), 3.33333284e-1f);
  return rounded_add(f, rounded_mul(rounded_mul(f, f), rounded_add(rounded_mul(p, f), -0.5f)));
}

// x = 2^exponent * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), for normal x > 0.
struct SplitFloat {
  float exponent, f;
};
FS_HOST_DEVICE SplitFloat split(float x) {
  const auto exponent = static_cast<int32_t>(bits_of(x) - 0x3f3504f3u) >> 23;
  const float mantissa = float_from_bits(bits_of(x) - (static_cast<uint32_t>(exponent) << 23));
  return {static_cast<float>(exponent), rounded_add(mantissa, -1.0f)};
}

FS_HOST_DEVICE float log2_of(float x) {
  const SplitFloat s = split(x);
  return rounded_add(s.exponent, rounded_mul(log1p_near_zero(s.f), kLog2E));
}

// An exponentially distributed number from 32 random bits: -log(1 - v) with v = (bits + 1/2) / 2^32. Small
// values, which decide a race, keep all 32 bits of resolution; the smallest is 2^-33, and it is never below
// v.
FS_HOST_DEVICE float exponential(uint32_t bits) {
  if (bits < 0x40000000u) {  // v < 1/4
    const float v = rounded_mul(rounded_add(static_cast<float>(static_cast<int32_t>(bits)), 0.5f), 0x1p-32f);
    return -log1p_near_zero(-v);
  }
  const auto complement = static_cast<int32_t>(~bits >> 1);
  const SplitFloat s = split(rounded_mul(rounded_add(static_cast<float>(complement), 0.5f), 0x1p-31f));
  return -rounded_add(rounded_mul(s.exponent, kLn2), log1p_near_zero(s.f));
}

// A weight in [0, 1] as an integer, for exact sums: 2^30 is weight 1.
FS_HOST_DEVICE uint32_t mass_of(float weight) {
  return static_cast<uint32_t>(static_cast<int32_t>(rounded_add(rounded_mul(weight, 0x1p30f), 0.5f)));
}

}  // namespace fs
