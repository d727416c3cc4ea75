// SPDX-License-Identifier: Apache-2.0
//
// From 4-bit codes to operands of the tensor cores, without a conversion instruction.
//
// Floats are evenly spaced from zero to the end of the first binade of normal numbers: the bits 0 to 2047 of
// a float16 stand for that many times 2^-24, the bits 0 to 255 of a bfloat16 for that many times 2^-133. So a
// mask that takes two codes out of a word, in the lowest bits of two 16-bit halves or four bits higher,
// leaves numbers, and one fused multiply-add by a power of two (in the other case a sixteenth of it) and a
// // multiple of the zero point makes step * (code - zero) of them. The step is as large as the largest
// factor of the format allows: 2^-24 * 2^15 and 2^-133 * 2^127. All of it is exact for zero points up to 16;
// what is summed from such operands is divided by the step in the end.
//
// Eight codes of 4 bits cost 9 instructions, eight of 8 bits, by the same means, 8. Their order in a word is
// that of layout/int4_fragment.h and layout/int8_fragment.h.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace fs::cuda {

// a b + c for two numbers each, rounded once.
template <class T>
__device__ __forceinline__ uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ __forceinline__ uint32_t fma_pairs<f16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <>
__device__ __forceinline__ uint32_t fma_pairs<bf16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Byte i of x in the lower and the upper 16 bits.
__device__ __forceinline__ uint32_t twice_byte(uint32_t x, uint32_t i) {
  return __byte_perm(x, 0, 0x4040u | i * 0x101u);
}

// How a format holds codes; numbers twice, in both halves of a word.
template <class T>
struct CodeFormat;
template <>
struct CodeFormat<f16> {
  static constexpr uint32_t kFactor = 0x78007800u, kSixteenth = 0x68006800u;  // 2^15, 2^11
  static constexpr uint32_t kMinusFactor = 0xf800f800u;
  static constexpr uint32_t kStepPair = 0x18001800u;  // 2^-9
  static constexpr uint32_t kMinus128 = 0xb400b400u;  // steps
  static constexpr float kStep = 1.0f / 512;
};
template <>
struct CodeFormat<bf16> {
  static constexpr uint32_t kFactor = 0x7f007f00u, kSixteenth = 0x7d007d00u;  // 2^127, 2^123
  static constexpr uint32_t kMinusFactor = 0xff00ff00u;
  static constexpr uint32_t kStepPair = 0x3c803c80u;  // 2^-6
  static constexpr uint32_t kMinus128 = 0xc000c000u;
  static constexpr float kStep = 1.0f / 64;
};

// What is added to make `step * (code - zero)`: for the rows g and g + 8 of a fragment.
template <class T>
struct MinusZero {
  uint32_t row[2];
  // Zero points of the two rows, each twice: in the lower and the upper 16 bits.
  __device__ __forceinline__ MinusZero(uint32_t low, uint32_t high)
      : row{fma_pairs<T>(low, CodeFormat<T>::kMinusFactor, 0),
            fma_pairs<T>(high, CodeFormat<T>::kMinusFactor, 0)} {}
};

// Fragment a of a 16 x 16 block: its eight codes less the zero points of their rows, in steps.
template <class T>
__device__ __forceinline__ void dequantize(uint32_t (&a)[4], uint32_t codes, const MinusZero<T>& zero) {
  constexpr uint32_t kLow = 0x000f000fu, kHigh = 0x00f000f0u;
  const uint32_t later = codes >> 8;
  a[0] = fma_pairs<T>(codes & kLow, CodeFormat<T>::kFactor, zero.row[0]);
  a[1] = fma_pairs<T>(codes & kHigh, CodeFormat<T>::kSixteenth, zero.row[1]);
  a[2] = fma_pairs<T>(later & kLow, CodeFormat<T>::kFactor, zero.row[0]);
  a[3] = fma_pairs<T>(later & kHigh, CodeFormat<T>::kSixteenth, zero.row[1]);
}

// Fragment b of a 16 x 8 block: its four codes of 8 bits, plus 128 as they lie, less that, in steps.
template <class T>
__device__ __forceinline__ void dequantize_bytes(uint32_t (&b)[2], uint32_t codes) {
  b[0] = fma_pairs<T>(codes & 0x00ff00ffu, CodeFormat<T>::kFactor, CodeFormat<T>::kMinus128);
  b[1] = fma_pairs<T>(__byte_perm(codes, 0, 0x4341), CodeFormat<T>::kFactor, CodeFormat<T>::kMinus128);
}

}  // namespace fs::cuda
