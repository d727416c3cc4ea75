// SPDX-License-Identifier: Apache-2.0
//
// How a matrix product on tiles is shared out: blocks of tokens times panels of 32 output rows, all panels of
// the first block first. A worker's share is a stretch of that: weights are one stream for it, and it writes
// to the same columns, or rows, of `out` in every call.
#pragma once

#include "cpu/shares.h"

namespace fs::FS_ISA {

class PanelShares {
 public:
  struct Panels {
    int64_t count, unit;  // `unit` panels, which are not parted, begin at multiples of it
  };
  struct Tokens {
    int64_t count, tile, num_blocks;  // blocks of whole tiles, but for the last tile
  };
  PanelShares(Panels panels, Tokens tokens)
      : panels_(panels),
        tokens_(tokens),
        num_tiles_((tokens.count + tokens.tile - 1) / tokens.tile),
        num_units_((panels.count + panels.unit - 1) / panels.unit),
        shares_(num_units_ * tokens.num_blocks) {}

  int64_t most_tokens() const {  // of a block
    return (num_tiles_ + tokens_.num_blocks - 1) / tokens_.num_blocks * tokens_.tile;
  }

  // Calls f(worker) on the threads of the pool, each of which makes a Walk.
  template <class F>
  void run(const F& f) const {
    shares_.run(f);
  }

  // What one worker has of it.
  class Walk {
   public:
    Walk(PanelShares& all, int worker) : all_(all), worker_(worker) {}

    // The next panel and its tokens, or false. Where the one before was its neighbour, so are their weights.
    bool next(int64_t* panel, Span* tokens) {
      if (panels_.size() == 0 && !next_unit()) return false;
      *panel = panels_.begin++;
      *tokens = rows_;
      return true;
    }

   private:
    bool next_unit() {
      if (units_.size() == 0 && !all_.shares_.template claim<Shares::kHalf>(worker_, &units_)) return false;
      const int64_t first = units_.begin % all_.num_units_ * all_.panels_.unit,
                    end = first + all_.panels_.unit;
      panels_ = {first, end < all_.panels_.count ? end : all_.panels_.count};
      const Tokens& tokens = all_.tokens_;
      const Span tiles = part(all_.num_tiles_, tokens.num_blocks, units_.begin / all_.num_units_);
      rows_ = {tiles.begin * tokens.tile, tiles.end * tokens.tile};
      if (rows_.end > tokens.count) rows_.end = tokens.count;
      ++units_.begin;
      return true;
    }

    PanelShares& all_;
    const int worker_;
    Span units_{0, 0}, panels_{0, 0}, rows_{0, 0};
  };

 private:
  const Panels panels_;
  const Tokens tokens_;
  const int64_t num_tiles_, num_units_;
  Shares shares_;
};

}  // namespace fs::FS_ISA
