// SPDX-License-Identifier: Apache-2.0
//
// Activations in bfloat16 as tiles are loaded from them: rows as they come, if they are bfloat16 already, or
// rounded and laid out as [tokens / 16][k / 32][token][32], K padded with zeros to 32, the last tile with as
// many tokens as are left. Then a tile is one piece of 1 KB, while rows that are a power of two apart share a
// few sets of the cache; those an odd number of lines apart are as fast.
#pragma once

#include "cpu/amx/tile.h"
#include "cpu/quantize_rows.h"
#include "cpu/round.h"

namespace fs::FS_ISA {

static_assert(kBlock == kTileDepth);

struct TokenTiles {
  const bf16* x;
  int64_t num_tokens, num_blocks;
  int64_t stride = 0;  // of rows as they came; 0: laid out as tiles

  // The tiles of tokens [token, token + 16) from k = 32 * block on.
  TileRows at(int64_t token, int64_t block) const {
    if (stride != 0) return {x + token * stride + block * kTileDepth, stride, kTileDepth};
    const int64_t rest = num_tokens - token, height = rest < kTileRows ? rest : kTileRows;
    return {x + (token * num_blocks + block * height) * kTileDepth, kTileDepth, height * kTileDepth};
  }
};

inline TokenTiles round_to_tiles(bf16* to, const Rows& rows) {
  const int64_t num_blocks = rows.num_blocks();
  rows.each_block([&](int64_t row, int64_t index, const float (&block)[kBlock]) {
    const int64_t in_tile = row % kTileRows, first = row - in_tile, rest = rows.count - first;
    const int64_t height = rest < kTileRows ? rest : kTileRows;
    bf16* x = to + (first * num_blocks + index * height + in_tile) * kTileDepth;
    for (int i = 0; i < kBlock; i += kLanes) store(x + i, load(block + i));
  });
  return {to, rows.count, num_blocks};
}

}  // namespace fs::FS_ISA
