// SPDX-License-Identifier: Apache-2.0
//
// Activations made ready for `linear_int4` and `linear_int8`: put in the weight's order of inputs, padded
// with zeros to blocks of 32, in the numbers that are multiplied.
#pragma once

#include "core/simd.h"
#include "cpu/parallel.h"
#include "layout/quantized_panel.h"

namespace fs::FS_ISA {

inline constexpr int kBlock = static_cast<int>(QuantizedPanels::kBlock);

// Rows of `depth` float32 inputs; column k is input order[k] of a row, or k if order is null.
struct Rows {
  const float* x;
  int64_t stride, count, depth;
  const int32_t* order;

  int64_t num_blocks() const { return (depth + kBlock - 1) / kBlock; }

  void load_block(float (&block)[kBlock], int64_t row, int64_t index) const {
    const float* source = x + row * stride;
    const int64_t first = index * kBlock;
    const int64_t rest = depth - first;
    if (order == nullptr && rest >= kBlock) {
      std::memcpy(block, source + first, sizeof(block));
      return;
    }
    for (int i = 0; i < kBlock; ++i) {
      block[i] = i >= rest ? 0.0f : source[order == nullptr ? first + i : order[first + i]];
    }
  }

  // f(row, block index, the block), in pieces that threads share.
  template <class F>
  void each_block(const F& f) const {
    parallel_rows(count, (1 << 14) / (depth + 1) + 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t index = 0; index < num_blocks(); ++index) {
          float block[kBlock];
          load_block(block, row, index);
          f(row, index, block);
        }
      }
    });
  }
};

// Integers of a block of activations: kPlanes == 1: q of 8 bits; 2: q = 16 * upper + lower of 12 bits, 32
// lower bytes in [0, 15] before 32 upper ones.
//
// x ~ scale * q. A row with NaN or infinity has the scale NaN in that block. `sum` adds up q. Written for the
// compiler's vectoriser: the same bits on every instruction set.
struct QuantizedBlock {
  float scale;
  int32_t sum;
};
template <int kPlanes>
[[gnu::always_inline]] inline QuantizedBlock quantize_block(int8_t* q, const float (&x)[kBlock]) {
  constexpr float kMost = kPlanes == 1 ? 127.0f : 2047.0f;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  // Below it a block counts as zero: kMost / largest could overflow, and a scale times a weight's be
  // subnormal.
  constexpr float kTiny = 1e-25f;
  uint32_t bits[kBlock], largest_bits = 0;  // magnitudes in order, NaN and infinity above all numbers
  std::memcpy(bits, x, sizeof(bits));
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t magnitude = bits[i] & 0x7fffffffu;
    largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
  }
  if (largest_bits >= 0x7f800000u) {
    std::memset(q, 0, kBlock * kPlanes);
    return {__builtin_nanf(""), 0};
  }
  const float largest = __builtin_bit_cast(float, largest_bits);
  const float inverse = largest < kTiny ? 0.0f : kMost / largest;
  int32_t sum = 0;
  for (int i = 0; i < kBlock; ++i) {
    const float moved = x[i] * inverse + kMagic;
    const int32_t rounded = __builtin_bit_cast(int32_t, moved) - __builtin_bit_cast(int32_t, kMagic);
    if constexpr (kPlanes == 1) {
      q[i] = static_cast<int8_t>(rounded);
    } else {
      q[i] = static_cast<int8_t>(rounded & 15);
      q[kBlock + i] = static_cast<int8_t>(rounded >> 4);
    }
    sum += rounded;
  }
  return {largest < kTiny ? 0.0f : largest * (1.0f / kMost), sum};
}

}  // namespace fs::FS_ISA
