// SPDX-License-Identifier: Apache-2.0
//
// Sixteen tokens at a time on AMX: the matrix unit makes the integer sums of a block of 32 inputs, sixteen
// rows of a panel's half times sixteen tokens in one instruction; vectors scale them as in block_tile.
// Integers are exact, and what follows is the same operations in the same order: the bits are those of
// block_tile.
//
// A line of a panel is already what the unit wants as a row of its right-hand operand; 4-bit codes are first
// put apart into bytes, in a buffer of one block. Block i + 1 is multiplied while block i is scaled, by
// out-of-order execution: neither needs the other. Bound: four or five vector instructions per sixteen sums.
#pragma once

#include "cpu/quantized_tile.h"

#if defined(FS_SIMD_AMX) && !defined(FS_SIMD_EMULATED)

namespace fs::FS_ISA {

inline constexpr int kAmxTokens = 16;

// Shapes of the tile registers: 0 activations, 1 codes, 2 sums. For as long as a thread uses them.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {kBlock, 64, 64};
      uint8_t rows[16] = {kAmxTokens, kBlock / 4, kAmxTokens};
    } shapes;
    asm volatile("" ::: "memory");
    _tile_loadconfig(&shapes);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

// The lines of one block after another.
struct BlockLines {
  const uint8_t* lines;
  int64_t in_group = 0;

  BlockLines(const uint8_t* panel, const QuantizedPanels& panels) : lines(panel + panels.header_bytes()) {}
  FS_INLINE void advance(const QuantizedPanels& panels) {
    lines += panels.block_bytes();
    if (++in_group == panels.blocks_per_group()) {
      in_group = 0;
      lines += panels.header_bytes();
    }
  }
};

// Rows [16 * half, 16 * half + 16) of a panel for tokens [token, token + 16), token a multiple of 16. Their
// inputs and the numbers beside them lie block by block, [block][16 tokens][32 inputs] and [block][16
// tokens]: rows that are a power of two apart would share a few sets of the cache.
template <class Products, bool kHasOffsets>
void amx_tile(const QuantizedProduct<int8_t>& op, int64_t panel, int half, int64_t token) {
  constexpr bool kNibbles = Products::kLineBytes == 64;
  const int scale_up = half == 1 ? Products::kHighScale : 1;  // of the sums; see code_products.h
  const QuantizedPanels panels = op.panels;
  const int64_t num_blocks = panels.num_blocks();

  // Three stages, kAhead blocks apart, so that none waits for what the one before it has just stored: codes
  // put apart, products, sums.
  constexpr int kAhead = 2, kRing = 4;
  static_assert(kRing > kAhead && (kRing & (kRing - 1)) == 0);
  alignas(64) int32_t products[kRing][kAmxTokens * 16];
  alignas(64) uint8_t codes[kRing][kBlock * 16];
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(half == 0 ? 0x0f : 0xf0));
  BlockLines to_split(op.packed + panel * panels.panel_bytes(), panels), to_multiply = to_split;
  const auto split = [&](int64_t block) FS_INLINE {
    if (!kNibbles || block >= num_blocks) return;
    each<kBlock / 4>([&](auto t) FS_INLINE {
      const __m512i line = _mm512_loadu_si512(to_split.lines + t.value * 64);
      _mm512_store_si512(codes[block % kRing] + t.value * 64, _mm512_and_si512(line, mask));
    });
    to_split.advance(panels);
  };
  const auto multiply = [&](int64_t block) FS_INLINE {
    if (block >= num_blocks) return;
    asm volatile("" ::: "memory");
    _tile_zero(2);
    _tile_loadd(0, op.row(token) + block * kAmxTokens * kBlock, kBlock);
    if constexpr (kNibbles) {
      _tile_loadd(1, codes[block % kRing], 64);
    } else {
      _tile_loadd(1, to_multiply.lines + half * 64, Products::kLineBytes);
      to_multiply.advance(panels);
    }
    _tile_dpbsud(2, 0, 1);
    _tile_stored(2, products[block % kRing], 64);
    asm volatile("" ::: "memory");
  };

  vf sums[kAmxTokens];
  each<kAmxTokens>([&](auto m) FS_INLINE { sums[m.value] = zero(); });
  const uint8_t* header = op.packed + panel * panels.panel_bytes();
  for (int64_t block = 0; block < 2 * kAhead; ++block) split(block);
  for (int64_t block = 0; block < kAhead; ++block) multiply(block);
  for (int64_t block = 0; block < num_blocks;) {
    GroupScale group = load_scale<kHasOffsets>(header, 16 * half, op.zero_points);
    if (scale_up != 1) group.scale = group.scale * set1(1.0f / static_cast<float>(scale_up));
    header += panels.header_bytes() + panels.blocks_per_group() * panels.block_bytes();
    const int64_t end = block + panels.blocks_per_group();
    for (; block < end && block < num_blocks; ++block) {
      multiply(block + kAhead);
      split(block + 2 * kAhead);
      const int32_t* from = products[block % kRing];
      const int64_t index = token * num_blocks + block * kAmxTokens;
      each<kAmxTokens>([&](auto m) FS_INLINE {
        __m512i integers = _mm512_load_si512(from + 16 * m.value);
        if constexpr (!kHasOffsets) {
          integers = _mm512_add_epi32(integers, _mm512_set1_epi32(scale_up * op.offsets[index + m.value]));
        }
        vf& sum = sums[m.value];
        sum = fma(vf{_mm512_cvtepi32_ps(integers)}, group.scale * set1(op.x_scales[index + m.value]), sum);
        if constexpr (kHasOffsets) sum = fma(group.offset, set1(op.x_sums[index + m.value]), sum);
      });
    }
  }
  store_rows<kAmxTokens>(sums, op, panel * QuantizedPanels::kRows + 16 * half, token);
}

}  // namespace fs::FS_ISA

#endif
