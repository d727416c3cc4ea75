// SPDX-License-Identifier: Apache-2.0
#include "float16.h"

#include <bit>
#include <cmath>

namespace ptxsim {

float f16_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  float magnitude;
  if (exponent == 31)
    magnitude = mantissa != 0 ? std::bit_cast<float>(0x7fffffffu) : std::bit_cast<float>(0x7f800000u);
  else
    magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

uint16_t float_to_f16(float f) {
  const uint16_t sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(f) >> 16 & 0x8000);
  if (std::isnan(f)) return 0x7fff;
  const float magnitude = std::fabs(f);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  int exponent = magnitude == 0.0f ? -14 : std::ilogb(magnitude);
  if (exponent < -14) exponent = -14;
  // In units of the last place; a carry into the next exponent is what the addition below wants.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units));
}

float bf16_to_float(uint16_t h) {
  return std::bit_cast<float>(static_cast<uint32_t>(h) << 16);
}

uint16_t float_to_bf16(float f) {
  if (std::isnan(f)) return 0x7fff;
  const uint32_t b = std::bit_cast<uint32_t>(f);
  return static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

}  // namespace ptxsim
