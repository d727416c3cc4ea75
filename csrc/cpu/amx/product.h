// SPDX-License-Identifier: Apache-2.0
//
// out = x @ weight.T + bias on tile registers. Weights come in chunks of a few blocks of 32 k of a panel, as
// bfloat16; a chunk stays in the L1 cache while all tokens pass by, whose sums are put aside between chunks.
// With up to 32 tokens the sums stay in registers, and the next chunk is made while one is multiplied: by
// out-of-order execution, as neither needs the other.
#pragma once

#include "cpu/amx/token_tiles.h"
#include "cpu/panel_ranges.h"

namespace fs::FS_ISA {

inline constexpr int kChunkBlocks = 8;  // 16 KB of weights

struct alignas(64) WeightChunk {
  bf16 value[kChunkBlocks * kTileDepth * kPanelRows];
};

struct TileOutput {
  float* out;
  int64_t stride, num_rows;
  const float* bias;

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

// weights.chunk(panel, block, count, buffer): the weights of a panel for blocks [block, block + count), in
// the buffer or where they lie.
template <class Weights>
void multiply_on_tiles(const TokenTiles& tokens_in, const Weights& weights, const TileOutput& output) {
  constexpr int64_t kMaxPairs = 8;             // of tiles of tokens, in a block of tokens
  constexpr int64_t kTokenBytes = 512 * 1024;  // of their activations, which stay in L2
  const int64_t num_blocks = tokens_in.num_blocks;
  const int64_t token_bytes = num_blocks * kTileDepth * int64_t{sizeof(bf16)};
  const int64_t least_bytes = kTokenBytes / (kMaxPairs * kTileTokens);
  const auto range = [&](Span panels, Span pairs) {  // whole pairs: a tile has one place
    const int64_t end = pairs.end * kTileTokens;
    const Span tokens{pairs.begin * kTileTokens, end < tokens_in.num_tokens ? end : tokens_in.num_tokens};
    TileProduct product;
    TileSums sums[kMaxPairs];
    WeightChunk buffers[2];
    const int64_t num_pairs = (tokens.size() + kTileTokens - 1) / kTileTokens;
    const int64_t step = num_pairs == 1 ? 1 : kChunkBlocks;
    const auto chunk_at = [&](int64_t panel, int64_t block) {
      const int64_t count = num_blocks - block < step ? num_blocks - block : step;
      return weights.chunk(panel, block, count, buffers[num_pairs == 1 ? block % 2 : 0]);
    };
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const bf16* chunk = chunk_at(panel, 0);
      for (int64_t block = 0; block == 0 || block < num_blocks; block += step) {
        const bool is_first = block == 0, is_last = block + step >= num_blocks;
        const int64_t count = is_last ? num_blocks - block : step;
        const bf16* next = num_pairs == 1 && !is_last ? chunk_at(panel, block + step) : nullptr;
        for (int64_t pair = 0; pair < num_pairs; ++pair) {
          const int64_t token = tokens.begin + pair * kTileTokens, rest = tokens.end - token;
          const int num_tokens = rest < kTileTokens ? static_cast<int>(rest) : kTileTokens;
          product.configure(num_tokens);
          if (is_first) {
            product.zero();
          } else if (num_pairs > 1) {
            product.load(sums[pair]);
          }
          product.multiply(chunk, tokens_in.at(token, block), tokens_in.at(token + kTileRows, block), count);
          if (is_last || num_pairs > 1) product.store(sums[pair]);
          if (is_last) output.write(sums[pair], panel, token, num_tokens);
        }
        chunk = num_pairs == 1 || is_last ? next : chunk_at(panel, block + step);
      }
    }
  };
  for_panel_ranges(num_panels(output.num_rows), (tokens_in.num_tokens + kTileTokens - 1) / kTileTokens,
                   kTileTokens * (token_bytes > least_bytes ? token_bytes : least_bytes),
                   kTileTokens * kPanelRows * num_blocks * kTileDepth, 1, range, kTokenBytes);
}

}  // namespace fs::FS_ISA
