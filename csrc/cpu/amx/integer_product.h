// SPDX-License-Identifier: Apache-2.0
//
// out = x @ weight.T + bias on tile registers, for activations rounded to 8 or 12 bits and weights of 4 or 8:
// the integers and the float32 chain of block_tile (quantized_tile.h), so the bits do not depend on which of
// the two computes a row.
//
// Groups of 32 inputs have scales of their own, so every product of 32 inputs leaves the tile and is scaled
// in vector registers, which hold the sums of 16 tokens and 16 rows over a chunk of blocks. Per product of 16
// x 16 x 32 tile loads and product take 17 cycles, which vector instructions hide; the tile's store takes 15,
// which they do not; scaling takes 48, or 60 with minimums or zero points, since fma, multiplication and
// conversion have one port where tiles are in use. docs/w4a16.md has what follows from that.
//
// Activations of 12 bits are q = 16 upper + lower, two bytes. 64 inputs of a tile are then 32 lower bytes
// beside codes and 32 upper ones beside 16 times the codes, at the price of 32 inputs. Codes of 8 bits have
// no room for a factor of 16: two products.
#pragma once

#include "cpu/amx/integer_tile.h"
#include "cpu/amx/product.h"  // TileOutput
#include "cpu/quantized_tile.h"

namespace fs::FS_ISA {

// Activations as tiles: [tokens / 16][block][token][32 * kPlanes], the last tile with as many tokens as are
// left; scales and sums (real numbers, or int32 to which products are added) [tokens / 16][block][16].
template <int kPlanes>
struct IntegerTokens {
  const int8_t* x;
  const float* scales;
  const float* sums;
  const int32_t* offsets;
  int64_t num_tokens, num_blocks;

  static constexpr int kBytes = kBlock * kPlanes;  // of a token in a block

  struct Tile {
    const int8_t* x;
    int64_t first;  // of its numbers in scales and sums
    int count;
  };
  Tile tile(int64_t index) const {
    const int64_t rest = num_tokens - index * kTileRows;
    return {x + index * kTileRows * num_blocks * kBytes, index * num_blocks * kTileRows,
            rest < kTileRows ? static_cast<int>(rest) : kTileRows};
  }
};

// Blocks of a panel as they are multiplied: rows 0 to 15, then 16 to 31.
template <int kPlanes>
struct alignas(64) IntegerChunk {
  static constexpr int kMaxBlocks = 18 / kPlanes;  // 18 KB: beside it, activations still fit in L1
  uint8_t codes[kMaxBlocks][2][kPlanes * kBlock * kTileRows];
};
struct alignas(64) ScaleChunk {
  static constexpr int kMaxBlocks = 18;
  float scales[kMaxBlocks][kPanelRows], offsets[kMaxBlocks][kPanelRows];
};

// kSigned: codes less 8; kPlanes == 2: then all of them times 16.
template <int kPlanes, bool kSigned>
[[gnu::always_inline]] inline void spread_codes(uint8_t (&to)[2][kPlanes * kBlock * kTileRows],
                                                const uint8_t* lines) {
  const __m512i low = _mm512_set1_epi8(0x0f), high = _mm512_set1_epi8(static_cast<char>(0xf0));
  const __m512i zero = _mm512_set1_epi8(8), top = _mm512_set1_epi8(static_cast<char>(0x80));
  repeat<kBlock / 4>([&](int t) FS_INLINE {
    const __m512i line = _mm512_loadu_si512(lines + t * 64);
    const __m512i down = _mm512_srli_epi16(line, 4);
    each<2>([&](auto half) FS_INLINE {
      const __m512i codes = _mm512_and_si512(half.value == 0 ? line : down, low);
      _mm512_store_si512(to[half.value] + t * 64, kSigned ? _mm512_sub_epi8(codes, zero) : codes);
      if constexpr (kPlanes == 2) {
        const __m512i up = half.value == 0 ? _mm512_slli_epi16(line, 4) : line;
        const __m512i sixteenfold = kSigned
                                        ? _mm512_ternarylogic_epi32(up, high, top, 0x6a)  // (up & high) ^ top
                                        : _mm512_and_si512(up, high);
        _mm512_store_si512(to[half.value] + (kBlock / 4 + t) * 64, sixteenfold);
      }
    });
  });
}

// A range of panels and of token tiles.
template <int kBits, int kPlanes, bool kHasOffsets, class Output>
class IntegerRange {
 public:
  static constexpr int kMaxTiles = 16;  // of tokens, whose sums are kept between chunks

  IntegerRange(const IntegerTokens<kPlanes>& x, const QuantizedPanels& panels, const uint8_t* packed,
               bool zero_points, const Output& output)
      : x_(x), panels_(panels), packed_(packed), zero_points_(zero_points), output_(output) {}

  void run(Span panels, Span tiles) {
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      for (int64_t begin = tiles.begin; begin < tiles.end; begin += kMaxTiles) {
        const int64_t end = begin + kMaxTiles < tiles.end ? begin + kMaxTiles : tiles.end;
        run_panel(panel, {begin, end});
      }
    }
  }

 private:
  static constexpr bool kTwoProducts = kBits == 8 && kPlanes == 2;
  static constexpr int kDepth = kTwoProducts ? kBlock : kBlock * kPlanes;  // of a product
  static constexpr int kBlockBytes = kBits == 4 ? 512 : 1024;
  using Tile = typename IntegerTokens<kPlanes>::Tile;

  void run_panel(int64_t panel, Span tiles) {
    p_ = packed_ + panel * panels_.panel_bytes();
    left_in_group_ = 0;
    const int64_t num_blocks = panels_.num_blocks(), most = IntegerChunk<kPlanes>::kMaxBlocks;
    const int64_t num_chunks = (num_blocks + most - 1) / most;
    for (int64_t i = 0; i < num_chunks; ++i) {
      const Span blocks = part(num_blocks, num_chunks, i);
      for (int64_t block = blocks.begin; block < blocks.end; ++block) make(block - blocks.begin);
      for (int64_t index = tiles.begin; index < tiles.end; ++index) {
        const Tile tile = x_.tile(index);
        TileSums& sums = sums_[index - tiles.begin];
        tile_.configure(tile.count, kDepth);
        with_count(tile.count, [&](auto count) {
          multiply<count.value>(sums, tile, 0, blocks);
          multiply<count.value>(sums, tile, 1, blocks);
        });
        if (blocks.end == num_blocks) output_.write(sums, panel, index * kTileRows, 0, tile.count);
      }
    }
  }

  // Tokens that are computed: a few more than there are, which no one reads.
  template <class F>
  static void with_count(int count, const F& f) {
    if (count <= 4) {
      f(Index<4>{});
    } else if (count <= 8) {
      f(Index<8>{});
    } else {
      f(Index<16>{});
    }
  }

  // The next block's codes and scales, as number `at` of the chunk.
  [[gnu::always_inline]] void make(int64_t at) {
    constexpr int64_t kAhead = 8 * 1024;  // bytes of the stream: memory is always asked for something
    if (left_in_group_ == 0) {
      header_ = p_;
      p_ += panels_.header_bytes();
      left_in_group_ = panels_.blocks_per_group();
      __builtin_prefetch(header_ + kAhead, 0, 2);
      __builtin_prefetch(header_ + kAhead + 64, 0, 2);
    }
    --left_in_group_;
    each<kBlockBytes / 64>([&](auto line)
                               FS_INLINE { __builtin_prefetch(p_ + kAhead + line.value * 64, 0, 2); });
    each<2>([&](auto half) FS_INLINE {
      const GroupScale group = load_scale<kHasOffsets>(header_, 16 * half.value, zero_points_);
      store(scales_.scales[at] + 16 * half.value, group.scale);
      if constexpr (kHasOffsets) store(scales_.offsets[at] + 16 * half.value, group.offset);
    });
    if constexpr (kBits == 4) {
      spread_codes<kPlanes, !kHasOffsets>(chunk_.codes[at], p_);
    } else {
      lines_[at] = p_;
    }
    p_ += kBlockBytes;
  }

  // Adds the products of the chunk's blocks, of 16 of the panel's rows and the tile's tokens.
  template <int kCount>
  [[gnu::noinline]] void multiply(TileSums& kept, const Tile& tile, int half, Span blocks) {
    vf sums[kCount];
    each<kCount>([&](auto t) FS_INLINE {
      sums[t.value] = blocks.begin == 0 ? zero() : load(kept.value[half][t.value]);
    });
    IntegerSums products[2][2];
    const int64_t count = blocks.size();
    product(products[0], tile, half, blocks.begin, 0);
    for (int64_t i = 0; i < count; ++i) {
      if (i + 1 < count) product(products[(i + 1) & 1], tile, half, blocks.begin + i + 1, i + 1);
      const IntegerSums(&now)[2] = products[i & 1];
      const int64_t first = tile.first + (blocks.begin + i) * kTileRows;
      const vf scale = load(scales_.scales[i] + 16 * half);
      vf offset = zero();
      if constexpr (kHasOffsets) offset = load(scales_.offsets[i] + 16 * half);
      each<kCount>([&](auto t) FS_INLINE {
        __m512i product = _mm512_load_si512(now[0].value[t.value]);
        if constexpr (kTwoProducts) {
          const __m512i upper = _mm512_load_si512(now[1].value[t.value]);
          product = _mm512_add_epi32(product, _mm512_slli_epi32(upper, 4));
        }
        if constexpr (kBits == 8) {
          product = _mm512_add_epi32(product, _mm512_set1_epi32(x_.offsets[first + t.value]));
        }
        const vf total = {_mm512_cvtepi32_ps(product)};
        vf& sum = sums[t.value];
        sum = fma(total, scale * set1(x_.scales[first + t.value]), sum);
        if constexpr (kHasOffsets) sum = fma(offset, set1(x_.sums[first + t.value]), sum);
      });
    }
    each<kCount>([&](auto t) FS_INLINE { store(kept.value[half][t.value], sums[t.value]); });
  }

  [[gnu::always_inline]] void product(IntegerSums (&to)[2], const Tile& tile, int half, int64_t block,
                                      int64_t at) {
    const int8_t* x = tile.x + block * tile.count * IntegerTokens<kPlanes>::kBytes;
    constexpr int64_t kStride = IntegerTokens<kPlanes>::kBytes;
    if constexpr (kBits == 4) {
      tile_.template multiply<!kHasOffsets>(to[0], x, kStride, chunk_.codes[at][half], 64);
    } else {
      const uint8_t* codes = lines_[at] + 64 * half;
      tile_.template multiply<false>(to[0], x, kStride, codes, 128);
      if constexpr (kPlanes == 2) tile_.template multiply<false>(to[1], x + kBlock, kStride, codes, 128);
    }
  }

  const IntegerTokens<kPlanes>& x_;
  const QuantizedPanels& panels_;
  const uint8_t* packed_;
  const bool zero_points_;
  const Output& output_;

  const uint8_t* p_ = nullptr;  // the next block, or its group's header
  const uint8_t* header_ = nullptr;
  int64_t left_in_group_ = 0;
  IntegerTile tile_;
  IntegerChunk<kPlanes> chunk_;
  ScaleChunk scales_;
  const uint8_t* lines_[IntegerChunk<kPlanes>::kMaxBlocks];
  TileSums sums_[kMaxTiles];
};

template <int kBits, int kPlanes, bool kHasOffsets, class Output>
void multiply_integers_on_tiles(const IntegerTokens<kPlanes>& x, const QuantizedPanels& panels,
                                const uint8_t* packed, bool zero_points, const Output& output) {
  constexpr int64_t kTokenBytes = 512 * 1024;  // of the activations of a block of tokens, which stay in L2
  const int64_t tile_bytes = x.num_blocks * x.kBytes * kTileRows;
  const auto range = [&](Span range_panels, Span tiles) {
    IntegerRange<kBits, kPlanes, kHasOffsets, Output>(x, panels, packed, zero_points, output)
        .run(range_panels, tiles);
  };
  for_panel_ranges(panels.num_panels(), (x.num_tokens + kTileRows - 1) / kTileRows, tile_bytes,
                   kTileRows * kPanelRows * x.num_blocks * kBlock, 1, range, kTokenBytes);
}

}  // namespace fs::FS_ISA
