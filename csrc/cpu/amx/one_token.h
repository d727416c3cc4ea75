// SPDX-License-Identifier: Apache-2.0
//
// The product of multiply_on_tiles for one token, bit for bit, in vector registers.
//
// A tile costs as much for one token as for sixteen, and weights of 4 bits must be written to memory before a
// tile can be loaded with them. Here they are multiplied where they were dequantised, as float32 with the
// lower half cut off. What a tile instruction does with 32 inputs (tile.h) is done by hand: a chain of fused
// multiply-adds from zero for the even inputs and one for the odd ones, then their sum added to the sum so
// far, all with subnormals as zeros. Dequantised weights are never subnormal: float16 scales are multiples of
// 2^-24.
//
// Per 16 rows and input: 3.5 instructions for the weight and one for the product. With two tokens tiles are
// as fast.
#pragma once

#include "cpu/amx/dequantize.h"
#include "cpu/amx/product.h"

namespace fs::FS_ISA {

// Subnormal operands and results count as zero while this lives.
class SubnormalsAreZero {
 public:
  SubnormalsAreZero() : control_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(control_ | 0x8040u); }
  ~SubnormalsAreZero() { __builtin_ia32_ldmxcsr(control_); }
  SubnormalsAreZero(const SubnormalsAreZero&) = delete;
  SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;

 private:
  unsigned control_;
};

// A token's activations rounded to bfloat16, as float32: [K / 32][32].
inline const float* round_token(float* to, const Rows& rows) {
  rows.each_block([&](int64_t, int64_t index, const float (&block)[kBlock]) {
    float* x = to + index * kBlock;
    for (int i = 0; i < kBlock; ++i) x[i] = to_float(to_bf16(block[i]));
  });
  return to;
}

inline const float* widen_token(float* to, const bf16* x, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kLanes) store(to + k, load(x + k));
  return to;
}

// Sums of a panel. Not inlined, so that none of it moves to where subnormals count.
template <int kBits>
[[gnu::noinline]] void sum_panel(TileSums& result, const DequantizedPanels<kBits>& weights, const float* x,
                                 int64_t panel) {
  constexpr int kLineBytes = kBits == 4 ? 64 : 128;
  constexpr int64_t kAhead = 2 * 1024;  // bytes of the stream: memory is always asked for something
  const QuantizedPanels panels = weights.panels;
  const vf upper = {_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xffff0000u)))};
  const auto cut = [&](vf weight) FS_INLINE { return vf{_mm512_and_ps(weight.v, upper.v)}; };
  const uint8_t* p = weights.packed + panel * panels.panel_bytes();
  vf sums[2] = {zero(), zero()};  // of halves of the panel's rows
  for (int64_t block = 0; block < panels.num_blocks();) {
    const RowScales rows[2] = {row_scales<kBits>(p, 0, panels.has_offsets, weights.zero_points),
                               row_scales<kBits>(p, 16, panels.has_offsets, weights.zero_points)};
    p += panels.header_bytes();
    const int64_t end = block + panels.blocks_per_group();
    for (; block < end && block < panels.num_blocks(); ++block) {
      vf even[2] = {zero(), zero()}, odd[2] = {zero(), zero()};
      repeat<kBlock / 4>([&](int t) FS_INLINE {
        __builtin_prefetch(p + kAhead, 0, 3);
        if constexpr (kBits == 8) __builtin_prefetch(p + kAhead + 64, 0, 3);
        dequantize_line<kBits>(p, rows, [&](auto half, auto pair, vf even_weight, vf odd_weight) FS_INLINE {
          const float* inputs = x + 4 * t + 2 * pair.value;
          even[half.value] = fma(set1(inputs[0]), cut(even_weight), even[half.value]);
          odd[half.value] = fma(set1(inputs[1]), cut(odd_weight), odd[half.value]);
        });
        p += kLineBytes;
      });
      x += kBlock;
      each<2>([&](auto half)
                  FS_INLINE { sums[half.value] = sums[half.value] + (even[half.value] + odd[half.value]); });
    }
  }
  each<2>([&](auto half) FS_INLINE { store(result.value[half.value][0], sums[half.value]); });
}

// x: [K / 32][32], numbers that are bfloat16.
template <int kBits, class Output>
void multiply_one_token(const float* x, const DequantizedPanels<kBits>& weights, const Output& output) {
  const int64_t depth = weights.panels.padded_depth();
  const auto range = [&](Span panels, Span) {
    TileSums sums;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      {
        const SubnormalsAreZero scope;
        sum_panel<kBits>(sums, weights, x, panel);
      }
      output.write(sums, panel, 0, 0, 1);
    }
  };
  for_panel_ranges(weights.panels.num_panels(), 1, depth * int64_t{sizeof(float)}, kPanelRows * depth, 1,
                   range);
}

}  // namespace fs::FS_ISA
