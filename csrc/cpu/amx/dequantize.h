// SPDX-License-Identifier: Apache-2.0
//
// Blocks of the panels of layout/quantized_panel.h as bfloat16 panels [k / 2][32 rows][2], 32 k a block.
//
// A weight is scale * code + offset in one fused multiply-add. The code needs no conversion: put into the
// mantissa of 2^e by a mask and an `or` it makes the number 2^e + code, and the offset takes 2^e * scale off.
// Two fields of a 32-bit word have their place in the mantissa at a time, so shifts serve two fields each.
//
// To bfloat16 by cutting the lower half off, which in a pair of words is one shift and one `and` with `or`:
// half of what rounding costs. Cutting makes magnitudes smaller, by 0 to 1 units in the last place; scale and
// offset are 1 + ln(2) / 256 times as large for it, with which the mean relative error is zero, as when
// rounding, and its square 4 % above. What is a bfloat16 exactly stays what it is.
//
// Per 32 weights about 7 vector instructions.
#pragma once

#include "core/simd.h"
#include "cpu/linear_tile.h"   // each
#include "cpu/panel_ranges.h"  // Span
#include "cpu/quantized_tile.h"

namespace fs::FS_ISA {

// 16 rows of a group: weight = scale * (2^e + code) + base[place].
struct RowScales {
  vf scale, base[2];
};

template <int kBits>
struct CodePlaces;

// The field at bits 12 to 15 of a word beside 2^11, at bits 16 to 19 beside 2^7.
template <>
struct CodePlaces<4> {
  static constexpr float kBases[2] = {2048.0f, 128.0f};
  static constexpr uint32_t kMasks[2] = {0xf000u, 0xf0000u};
};
// The byte at bits 15 to 22 beside 2^8.
template <>
struct CodePlaces<8> {
  static constexpr float kBases[2] = {256.0f, 256.0f};
  static constexpr uint32_t kMasks[2] = {0x7f8000u, 0x7f8000u};
};

template <int kBits>
[[gnu::always_inline]] inline RowScales row_scales(const uint8_t* header, int row, bool has_offsets,
                                                   bool zero_points) {
  constexpr float kUp = 1.0027076f;  // 1 + ln(2) / 256
  GroupScale group;
  if (has_offsets) {
    group = load_scale<true>(header, row, zero_points);
  } else {
    group = load_scale<false>(header, row, false);
    group.offset = group.scale * set1(kBits == 4 ? -kSymmetricZero : -128.0f);
  }
  const vf scale = group.scale * set1(kUp), offset = group.offset * set1(kUp);
  return {scale,
          {fma(set1(-CodePlaces<kBits>::kBases[0]), scale, offset),
           fma(set1(-CodePlaces<kBits>::kBases[1]), scale, offset)}};
}

// The weight whose code is the field at place `kPlace` of each word.
template <int kBits, int kPlace>
[[gnu::always_inline]] inline vf weight_at(__m512i words, const RowScales& rows) {
  constexpr uint32_t kMagic = __builtin_bit_cast(uint32_t, CodePlaces<kBits>::kBases[kPlace]);
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(CodePlaces<kBits>::kMasks[kPlace]));
  const __m512i magic = _mm512_set1_epi32(static_cast<int>(kMagic));
  const __m512i number = _mm512_ternarylogic_epi32(words, mask, magic, 0xea);  // words & mask | magic
  return fma({_mm512_castsi512_ps(number)}, rows.scale, rows.base[kPlace]);
}

[[gnu::always_inline]] inline void store_pairs(bf16* to, vf even, vf odd) {
#if defined(FS_SIMD_EMULATED)
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i lower = _mm512_srli_epi32(_mm512_castps_si512(even.v), 16);
  const __m512i pairs = _mm512_ternarylogic_epi32(_mm512_castps_si512(odd.v), upper, lower, 0xea);
#else
  // One instruction: bytes 2 and 3 of the even ones to 0 and 1 of the odd ones.
  const __m512i bytes = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
  const __m512i pairs = _mm512_mask_shuffle_epi8(_mm512_castps_si512(odd.v), 0x3333333333333333,
                                                 _mm512_castps_si512(even.v), bytes);
#endif
  _mm512_store_si512(to, pairs);
}

// The weights of a line, four inputs of 32 rows: f(half of the rows, pair of inputs, the even one, the odd
// one).
template <int kBits, class F>
[[gnu::always_inline]] inline void dequantize_line(const uint8_t* line, const RowScales (&rows)[2],
                                                   const F& f) {
  if constexpr (kBits == 4) {
    // Fields of four bits from the lowest on: input 0 of the low and of the high row, input 1 of both, ...
    const __m512i x = _mm512_loadu_si512(line);
    const __m512i up12 = _mm512_slli_epi32(x, 12), up4 = _mm512_slli_epi32(x, 4);
    const __m512i down8 = _mm512_srli_epi32(x, 8), down12 = _mm512_srli_epi32(x, 12);
    f(Index<0>{}, Index<0>{}, weight_at<4, 0>(up12, rows[0]), weight_at<4, 0>(up4, rows[0]));
    f(Index<0>{}, Index<1>{}, weight_at<4, 1>(x, rows[0]), weight_at<4, 1>(down8, rows[0]));
    f(Index<1>{}, Index<0>{}, weight_at<4, 1>(up12, rows[1]), weight_at<4, 0>(x, rows[1]));
    f(Index<1>{}, Index<1>{}, weight_at<4, 0>(down8, rows[1]), weight_at<4, 1>(down12, rows[1]));
  } else {
    each<2>([&](auto half) FS_INLINE {
      const RowScales& scales = rows[half.value];
      const __m512i x = _mm512_loadu_si512(line + 64 * half.value);
      f(half, Index<0>{}, weight_at<8, 0>(_mm512_slli_epi32(x, 15), scales),
        weight_at<8, 0>(_mm512_slli_epi32(x, 7), scales));
      f(half, Index<1>{}, weight_at<8, 0>(_mm512_srli_epi32(x, 1), scales),
        weight_at<8, 0>(_mm512_srli_epi32(x, 9), scales));
    });
  }
}

template <int kBits>
[[gnu::always_inline]] inline void dequantize_block(bf16* to, const uint8_t* header, const uint8_t* lines,
                                                    bool has_offsets, bool zero_points) {
  constexpr int kLineBytes = kBits == 4 ? 64 : 128;
  const RowScales rows[2] = {row_scales<kBits>(header, 0, has_offsets, zero_points),
                             row_scales<kBits>(header, 16, has_offsets, zero_points)};
  repeat<kBlock / 4>([&](int t) FS_INLINE {
    dequantize_line<kBits>(
        lines + t * kLineBytes, rows, [&](auto half, auto pair, vf even, vf odd) FS_INLINE {
          store_pairs(to + (2 * t + pair.value) * 2 * kPanelRows + half.value * kPanelRows, even, odd);
        });
  });
}

// Weights for multiply_on_tiles.
template <int kBits>
struct DequantizedPanels {
  QuantizedPanels panels;
  const uint8_t* packed;
  bool zero_points;

  static constexpr bool kMadeInPlace = true;
  const bf16* chunk(int64_t, Span, bf16* buffer) const { return buffer; }

  // Makes blocks one after the other, from a panel's first one on.
  class Maker {
   public:
    Maker(const DequantizedPanels& weights, int64_t panel)
        : p_(weights.packed + panel * weights.panels.panel_bytes()),
          header_bytes_(weights.panels.header_bytes()),
          num_blocks_(weights.panels.num_blocks()),
          blocks_per_group_(weights.panels.blocks_per_group()),
          left_in_panel_(num_blocks_),
          has_offsets_(weights.panels.has_offsets),
          zero_points_(weights.zero_points) {}

    [[gnu::always_inline]] void next(bf16* to) {
      constexpr int kBlockBytes = kBits == 4 ? 512 : 1024;
      constexpr int kAhead = 4 * kBlockBytes;  // of the stream: memory is always asked for something
      if (left_in_group_ == 0) {
        header_ = p_;
        p_ += header_bytes_;
        left_in_group_ = blocks_per_group_ < left_in_panel_ ? blocks_per_group_ : left_in_panel_;
        __builtin_prefetch(header_ + kAhead, 0, 3);
        __builtin_prefetch(header_ + kAhead + 64, 0, 3);
      }
      each<kBlockBytes / 64>([&](auto line)
                                 FS_INLINE { __builtin_prefetch(p_ + kAhead + line.value * 64, 0, 3); });
      dequantize_block<kBits>(to, header_, p_, has_offsets_, zero_points_);
      p_ += kBlockBytes;
      --left_in_group_;
      if (--left_in_panel_ == 0) left_in_panel_ = num_blocks_;
    }

   private:
    const uint8_t* p_;
    const uint8_t* header_ = nullptr;
    int64_t header_bytes_, num_blocks_, blocks_per_group_, left_in_group_ = 0, left_in_panel_;
    bool has_offsets_, zero_points_;
  };
};

}  // namespace fs::FS_ISA
