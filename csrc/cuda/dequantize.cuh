// SPDX-License-Identifier: Apache-2.0
//
// From 4-bit codes to operands of the tensor cores, without a conversion instruction.
//
// In float16 the numbers from 1024 to 2047 are one apart: 0x6400 with a code in the lowest bits of the
// mantissa is 1024 + code, exactly. A code four bits higher makes 1024 + 16 code, and 1/16 of that is
// 64 + code. So one logical operation takes two codes out of a word and makes numbers of them, and one
// addition (or fused multiply-add by 1/16) of -(1024 + zero) (or -(64 + zero)) makes code - zero; all of it
// exact for zero points up to 16. bfloat16 has 7 bits of mantissa: 0x4300 with a code is 128 + code, and each
// pair has to be shifted to the lowest bits.
//
// Eight codes cost 9 instructions in float16 and 11 in bfloat16. The order of the codes in a word is that of
// layout/int4_fragment.h.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace fs::cuda {

// (a & b) | c, as one instruction: the compiler makes two of it when b and c are constants.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Two sums or fused products in 16 bits each.
__device__ __forceinline__ uint32_t add_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Byte i of x in the lower and the upper 16 bits.
__device__ __forceinline__ uint32_t twice_byte(uint32_t x, uint32_t i) {
  return __byte_perm(x, 0, 0x4040u | i * 0x101u);
}

// What is added to make `code - zero`, twice: for the rows g and g + 8 of a fragment.
template <class T>
struct MinusZero {
  uint32_t row[2];
  // Zero points of the two rows, each twice: in the lower and the upper 16 bits.
  __device__ __forceinline__ MinusZero(uint32_t low, uint32_t high);
};
template <>
__device__ __forceinline__ MinusZero<f16>::MinusZero(uint32_t low, uint32_t high)
    : row{0xe400e400u + low, 0xd400d400u + high * 16} {}  // -(1024 + low), -(64 + high)
template <>
__device__ __forceinline__ MinusZero<bf16>::MinusZero(uint32_t low, uint32_t high)
    : row{0xc300c300u + low, 0xc300c300u + high} {}  // -(128 + zero)

// Fragment a of a 16 x 16 block: its eight codes less the zero points of their rows.
template <class T>
__device__ __forceinline__ void dequantize(uint32_t (&a)[4], uint32_t codes, const MinusZero<T>& zero);
template <>
__device__ __forceinline__ void dequantize<f16>(uint32_t (&a)[4], uint32_t codes,
                                                const MinusZero<f16>& zero) {
  constexpr uint32_t kLow = 0x000f000fu, kHigh = 0x00f000f0u, k1024 = 0x64006400u, kSixteenth = 0x2c002c00u;
  const uint32_t later = codes >> 8;
  a[0] = add_f16x2(and_or(codes, kLow, k1024), zero.row[0]);
  a[1] = fma_f16x2(and_or(codes, kHigh, k1024), kSixteenth, zero.row[1]);
  a[2] = add_f16x2(and_or(later, kLow, k1024), zero.row[0]);
  a[3] = fma_f16x2(and_or(later, kHigh, k1024), kSixteenth, zero.row[1]);
}
template <>
__device__ __forceinline__ void dequantize<bf16>(uint32_t (&a)[4], uint32_t codes,
                                                 const MinusZero<bf16>& zero) {
  constexpr uint32_t kLow = 0x000f000fu, k128 = 0x43004300u, kOne = kOnes<bf16>;
  a[0] = fma_bf16x2(and_or(codes, kLow, k128), kOne, zero.row[0]);
  a[1] = fma_bf16x2(and_or(codes >> 4, kLow, k128), kOne, zero.row[1]);
  a[2] = fma_bf16x2(and_or(codes >> 8, kLow, k128), kOne, zero.row[0]);
  a[3] = fma_bf16x2(and_or(codes >> 12, kLow, k128), kOne, zero.row[1]);
}

}  // namespace fs::cuda
