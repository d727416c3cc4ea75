// SPDX-License-Identifier: Apache-2.0
//
// How a matrix product over panels of 32 output rows is handed out where it is not on tiles (panel_shares.h):
// blocks of tokens times ranges of panels. A block's activations stay in the L2 cache while all weights pass
// by once. A worker has neighbouring ranges: one stream of weights.
#pragma once

#include <cstdint>

#include "cpu/shares.h"

namespace fs::FS_ISA {

// Calls f(panels, tokens) with two Spans; token_bytes are those of a token's activations, work the
// multiply-adds of a panel and a token, tile the tokens that share weights in registers, and block_bytes
// those of the activations of a block of tokens.
template <class F>
void for_panel_ranges(int64_t num_panels, int64_t num_tokens, int64_t token_bytes, int64_t work, int64_t tile,
                      const F& f, int64_t block_bytes = 192 * 1024) {
  constexpr int64_t kMaxRanges = 32;          // panel ranges per block of tokens
  constexpr int64_t kMinPanels = 2;           // of a range: the second is prefetched while the first computes
  constexpr int64_t kMinRangeWork = 1 << 15;  // multiply-adds below which a range is not worth handing out

  if (num_tokens == 0 || num_panels == 0) return;
  int64_t block = block_bytes / token_bytes;
  block = block < tile ? tile : block - block % tile;
  const int64_t num_blocks = (num_tokens + block - 1) / block;

  const int64_t panel_work = (work + 1) * (num_tokens < block ? num_tokens : block);
  int64_t per_range = (num_panels + kMaxRanges - 1) / kMaxRanges;
  if (per_range < kMinPanels) per_range = kMinPanels;
  if (per_range * panel_work < kMinRangeWork) per_range = kMinRangeWork / panel_work + 1;
  const int64_t num_ranges = (num_panels + per_range - 1) / per_range;

  Shares shares(num_blocks * num_ranges);
  shares.run([&](int worker) {
    Span ranges;
    while (shares.claim<Shares::kHalf>(worker, &ranges)) {
      while (ranges.size() > 0) {  // those of one block of tokens at a time, as one
        const int64_t block_index = ranges.begin / num_ranges, first = ranges.begin % num_ranges;
        const int64_t end = first + ranges.size() < num_ranges ? first + ranges.size() : num_ranges;
        f(Span{part(num_panels, num_ranges, first).begin, part(num_panels, num_ranges, end - 1).end},
          part(num_tokens, num_blocks, block_index));
        ranges.begin += end - first;
      }
    }
  });
}

}  // namespace fs::FS_ISA
