// SPDX-License-Identifier: Apache-2.0
// Scalar conversions between f32 and the 16-bit formats, for code outside the handler files.
#pragma once

#include <cstdint>

namespace ptxsim {

float f16_to_float(uint16_t h);
uint16_t float_to_f16(float f);  // to nearest, ties to even; NaN becomes 0x7fff
float bf16_to_float(uint16_t h);
uint16_t float_to_bf16(float f);

}  // namespace ptxsim
