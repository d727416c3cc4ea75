// SPDX-License-Identifier: Apache-2.0
//
// out = x @ weight.T + bias on tile registers. Weights come in chunks of a few blocks of 32 k of a panel, as
// bfloat16; a chunk stays in the L1 cache while all tokens pass by from L2, whose sums are put aside between
// chunks. While the last of them pass by, the next chunk is made in its place, each block when the one before
// it has been multiplied: making takes vector instructions, multiplying the tile unit, and neither needs the
// other.
#pragma once

#include "cpu/amx/token_tiles.h"
#include "cpu/linear_tile.h"  // FS_INLINE
#include "cpu/panel_ranges.h"

namespace fs::FS_ISA {

// 36 KB of weights in L1, which activations pass by (TileProduct::multiply). With few tokens, while chunks are
// made more often than multiplied, half of it is faster.
inline constexpr int64_t kMaxChunkBlocks = 18;
constexpr int64_t chunk_blocks(int64_t num_pairs) {
  return num_pairs > 2 ? kMaxChunkBlocks : kMaxChunkBlocks / 2;
}

struct alignas(64) WeightChunk {
  bf16 value[kMaxChunkBlocks * kTileDepth * kPanelRows];
};

struct TileOutput {
  float* out;
  int64_t stride, num_rows;
  const float* bias;

  // Sums of a whole panel as they are need not be put aside on their way.
  bool takes_sums_of(int64_t panel) const {
    return bias == nullptr && num_rows - panel * kPanelRows >= kPanelRows;
  }
  float* at(int64_t panel, int64_t token) const { return out + token * stride + panel * kPanelRows; }

  // Tokens [token, token + count) of a panel.
  void write(const TileSums& sums, int64_t panel, int64_t token, int count) const {
    for (int half = 0; half < 2; ++half) {
      const int64_t n = panel * kPanelRows + half * kTileRows, rest = num_rows - n;
      if (rest <= 0) return;
      const int width = rest < kTileRows ? static_cast<int>(rest) : kTileRows;
      vf offset = zero();
      if (bias != nullptr) offset = width == kTileRows ? load(bias + n) : load_first(bias + n, width);
      for (int t = 0; t < count; ++t) {
        vf sum = load(sums.row(t, half));
        if (bias != nullptr) sum = sum + offset;
        float* to = out + (token + t) * stride + n;
        if (width == kTileRows) {
          store(to, sum);
        } else {
          store_first(to, sum, width);
        }
      }
    }
  }
};

// weights.chunk(panel, blocks, buffer): where the weights of a panel for a Span of blocks are, the buffer or
// their own place; Weights::Maker(weights, panel).next(to): puts one block after the other there, or asks
// memory for it; kMadeInPlace: `to` must be free of the chunk before.
template <class Weights>
class ProductRange {
 public:
  ProductRange(const TokenTiles& x, const Weights& weights, const TileOutput& output, Span panels,
               Span tokens)
      : x_(x),
        weights_(weights),
        output_(output),
        maker_(weights, panels.begin),
        panels_(panels),
        tokens_(tokens),
        num_pairs_((tokens.size() + kTileTokens - 1) / kTileTokens),
        chunks_per_panel_(num_chunks(x.num_blocks, chunk_blocks(num_pairs_))) {}

  static constexpr int64_t kMaxPairs = 16;  // of tiles of tokens

  void run() {
    Chunk chunk = at(0);
    for (int64_t i = chunk.blocks.begin; i < chunk.blocks.end; ++i) make(chunk, i);
    for (int64_t i = 0; i < panels_.size() * chunks_per_panel_; ++i) {
      next_ = at(i + 1);
      multiply(chunk);
      chunk = next_;
    }
  }

 private:
  struct Chunk {
    int64_t panel;
    Span blocks;
  };
  static int64_t num_chunks(int64_t num_blocks, int64_t most) {
    return num_blocks == 0 ? 1 : (num_blocks + most - 1) / most;
  }
  Chunk at(int64_t i) const {
    const int64_t panel = panels_.begin + i / chunks_per_panel_;
    if (panel == panels_.end) return {panel, {0, 0}};
    return {panel, part(x_.num_blocks, chunks_per_panel_, i % chunks_per_panel_)};
  }
  [[gnu::always_inline]] void make(const Chunk& chunk, int64_t block) {
    maker_.next(buffer_.value + (block - chunk.blocks.begin) * kTileDepth * kPanelRows);
  }

  void multiply(const Chunk& chunk) {
    const bool is_first = chunk.blocks.begin == 0, is_last = chunk.blocks.end == x_.num_blocks;
    const bf16* weights = weights_.chunk(chunk.panel, chunk.blocks, buffer_.value);
    // Sizes of chunks differ by one at most: what is made in place is behind what is multiplied.
    const int64_t first_making = Weights::kMadeInPlace ? num_pairs_ - 1 : 0;
    const int64_t num_steps = (num_pairs_ - first_making) * chunk.blocks.size();
    int64_t made = next_.blocks.begin, due = 0, pair = 0;
    const auto between = [&]() FS_INLINE {
      if (pair < first_making) return;
      for (due += next_.blocks.size(); due >= num_steps; due -= num_steps) make(next_, made++);
    };
    for (; pair < num_pairs_; ++pair) {
      const int64_t token = tokens_.begin + pair * kTileTokens, rest = tokens_.end - token;
      const int num_tokens = rest < kTileTokens ? static_cast<int>(rest) : kTileTokens;
      product_.configure(num_tokens);
      if (is_first) {
        product_.zero();
      } else if (num_pairs_ > 1) {
        product_.load(sums_[pair]);
      }
      product_.multiply(weights, x_.at(token, chunk.blocks.begin),
                        x_.at(token + kTileRows, chunk.blocks.begin), chunk.blocks.size(), between);
      if (is_last) {
        write(sums_[pair], chunk.panel, token, num_tokens);
      } else if (num_pairs_ > 1) {
        product_.store(sums_[pair]);
      }
    }
    while (made < next_.blocks.end) make(next_, made++);
  }

  void write(TileSums& sums, int64_t panel, int64_t token, int num_tokens) {
    if (output_.takes_sums_of(panel)) return product_.store(output_.at(panel, token), output_.stride);
    product_.store(sums);
    output_.write(sums, panel, token, num_tokens);
  }

  const TokenTiles& x_;
  const Weights& weights_;
  const TileOutput& output_;
  typename Weights::Maker maker_;
  const Span panels_, tokens_;
  const int64_t num_pairs_, chunks_per_panel_;
  Chunk next_;
  TileProduct product_;
  TileSums sums_[kMaxPairs];
  WeightChunk buffer_;
};

template <class Weights>
void multiply_on_tiles(const TokenTiles& x, const Weights& weights, const TileOutput& output) {
  constexpr int64_t kTokenBytes = 1024 * 1024;  // of the activations of a block of tokens, which stay in L2
  constexpr int64_t kMaxPairs = ProductRange<Weights>::kMaxPairs;
  const int64_t pair_bytes = x.num_blocks * kTileDepth * kTileTokens * int64_t{sizeof(bf16)};
  constexpr int64_t kLeastBytes = kTokenBytes / kMaxPairs;
  const auto range = [&](Span panels, Span pairs) {  // whole pairs: a tile has one place
    const int64_t end = pairs.end * kTileTokens;
    const Span tokens{pairs.begin * kTileTokens, end < x.num_tokens ? end : x.num_tokens};
    ProductRange<Weights>(x, weights, output, panels, tokens).run();
  };
  for_panel_ranges(num_panels(output.num_rows), (x.num_tokens + kTileTokens - 1) / kTileTokens,
                   pair_bytes > kLeastBytes ? pair_bytes : kLeastBytes,
                   kTileTokens * kPanelRows * x.num_blocks * kTileDepth, 1, range, kTokenBytes);
}

}  // namespace fs::FS_ISA
