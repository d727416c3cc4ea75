// SPDX-License-Identifier: Apache-2.0
//
// out = x @ weight.T + bias on tile registers. Weights come in chunks of a few blocks of 32 k of a panel, as
// bfloat16; a chunk stays in the L1 cache while all tokens pass by from L2, whose sums are put aside between
// chunks. While the last of them pass by, the next chunk is made in its place, each block when the one before
// it has been multiplied: making takes vector instructions, multiplying the tile unit, and neither needs the
// other.
#pragma once

#include "cpu/amx/token_tiles.h"
#include "cpu/gate.h"
#include "cpu/linear_tile.h"  // FS_INLINE
#include "cpu/panel_shares.h"

namespace fs::FS_ISA {

// 36 KB of weights in L1, which activations pass by (TileProduct::multiply). With few tokens, while chunks
// are made more often than multiplied, half of it is faster.
inline constexpr int64_t kMaxChunkBlocks = 18;
constexpr int64_t chunk_blocks(int64_t num_pairs) {
  return num_pairs > 2 ? kMaxChunkBlocks : kMaxChunkBlocks / 2;
}

struct alignas(64) WeightChunk {
  bf16 value[kMaxChunkBlocks * kTileDepth * kPanelRows];
};

struct TileOutput {
  static constexpr int64_t kPanelsOfLine = 1;  // of a row of results; no two workers write to one line
  float* out;
  int64_t stride, num_rows;
  const float* bias;

  int64_t num_panels() const { return fs::num_panels(num_rows); }

  // Sums of a whole panel as they are need not be put aside on their way.
  bool takes_sums_of(int64_t panel) const {
    return bias == nullptr && num_rows - panel * kPanelRows >= kPanelRows;
  }
  void take_sums(TileProduct& product, int64_t panel, int64_t token) const {
    product.store(out + token * stride + panel * kPanelRows, stride);
  }

  // Asks for the lines of a row of results, which other cores have: they read or wrote the results before.
  [[gnu::always_inline]] void ask(int64_t panel, int64_t token) const {
    const float* to = out + token * stride + panel * kPanelRows;
    __builtin_prefetch(to, 1, 3);
    __builtin_prefetch(to + kTileRows, 1, 3);
  }

  // Rows [begin, end) of the sums that begin with the one of `token`.
  void write(const TileSums& sums, int64_t panel, int64_t token, int begin, int end) const {
    for (int half = 0; half < 2; ++half) {
      const int64_t n = panel * kPanelRows + half * kTileRows, rest = num_rows - n;
      if (rest <= 0) return;
      const int width = rest < kTileRows ? static_cast<int>(rest) : kTileRows;
      vf offset = zero();
      if (bias != nullptr) offset = width == kTileRows ? load(bias + n) : load_first(bias + n, width);
      for (int t = begin; t < end; ++t) {
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

// The upper tiles of a panel's results have the gate, the lower ones what it gates.
template <class T>
struct GatedTileOutput {
  static constexpr int64_t kPanelsOfLine = 64 / (kTileRows * int64_t{sizeof(T)});
  T* out;
  int64_t stride, width;

  int64_t num_panels() const { return width / kTileRows; }
  bool takes_sums_of(int64_t) const { return false; }
  void take_sums(TileProduct&, int64_t, int64_t) const {}
  void ask(int64_t, int64_t) const {}  // vector stores wait less than those of tiles: nothing gained
  void write(const TileSums& sums, int64_t panel, int64_t token, int begin, int end) const {
    for (int t = begin; t < end; ++t) {
      store(out + (token + t) * stride + panel * kTileRows,
            gated(load(sums.row(t, 0)), load(sums.row(t, 1))));
    }
  }
};

// Takes sums out of the tile registers and writes them a few rows at a time, beside the next products.
template <class Output>
class TileWriter {
 public:
  explicit TileWriter(const Output& output) : output_(output) {}

  void take(TileProduct& product, int64_t panel, int64_t token, int count) {
    if (output_.takes_sums_of(panel)) return output_.take_sums(product, panel, token);
    finish();
    product.store(sums_);
    panel_ = panel;
    token_ = token;
    next_ = 0;
    count_ = count;
  }
  // Asks for the place of a row of results.
  [[gnu::always_inline]] void ask(int64_t panel, int64_t token) const { output_.ask(panel, token); }
  [[gnu::always_inline]] void some() {
    if (next_ < count_) write(next_ + 2 < count_ ? next_ + 2 : count_);
  }
  void finish() {
    if (next_ < count_) write(count_);
  }

 private:
  [[gnu::always_inline]] void write(int end) {
    output_.write(sums_, panel_, token_, next_, end);
    next_ = end;
  }

  const Output output_;
  int64_t panel_ = 0, token_ = 0;
  int next_ = 0, count_ = 0;
  TileSums sums_;
};

// weights.chunk(panel, blocks, buffer): where the weights of a panel for a Span of blocks are, the buffer or
// their own place; Weights::Maker(weights, panel).next(to): puts one block after the other there, or asks
// memory for it; kMadeInPlace: `to` must be free of the chunk before.
template <class Weights, class Output>
class WorkerProduct {
 public:
  WorkerProduct(const TokenTiles& x, const Weights& weights, const Output& output, PanelShares& shares,
                int worker)
      : x_(x),
        weights_(weights),
        writer_(output),
        walk_(shares, worker),
        maker_(weights, 0),
        chunks_per_panel_(
            num_chunks(x.num_blocks, chunk_blocks((shares.most_tokens() + kTileTokens - 1) / kTileTokens))) {}

  static constexpr int64_t kMaxPairs = 16;  // of tiles of tokens

  void run() {
    Chunk chunk = after({0, {0, 0}, chunks_per_panel_ - 1, {0, 0}});
    for (int64_t i = chunk.blocks.begin; i < chunk.blocks.end; ++i) make(chunk, i);
    while (!chunk.is_end) {
      next_ = after(chunk);
      multiply(chunk);
      chunk = next_;
    }
    writer_.finish();
  }

 private:
  struct Chunk {
    int64_t panel;
    Span tokens;
    int64_t index;  // in the panel
    Span blocks;
    bool is_end = false;
  };
  static int64_t num_chunks(int64_t num_blocks, int64_t most) {
    return num_blocks == 0 ? 1 : (num_blocks + most - 1) / most;
  }
  Chunk after(Chunk chunk) {
    if (++chunk.index == chunks_per_panel_) {
      chunk.index = 0;
      if (!walk_.next(&chunk.panel, &chunk.tokens)) return {0, {0, 0}, 0, {0, 0}, true};
      maker_ = typename Weights::Maker(weights_, chunk.panel);
    }
    chunk.blocks = part(x_.num_blocks, chunks_per_panel_, chunk.index);
    return chunk;
  }
  [[gnu::always_inline]] void make(const Chunk& chunk, int64_t block) {
    maker_.next(buffer_.value + (block - chunk.blocks.begin) * kTileDepth * kPanelRows);
  }

  void multiply(const Chunk& chunk) {
    constexpr int64_t kAskedPerBlock = 4;
    const bool is_first = chunk.blocks.begin == 0, is_last = chunk.blocks.end == x_.num_blocks;
    const bf16* weights = weights_.chunk(chunk.panel, chunk.blocks, buffer_.value);
    const int64_t num_pairs = (chunk.tokens.size() + kTileTokens - 1) / kTileTokens;
    // Sizes of chunks differ by one at most: what is made in place is behind what is multiplied.
    const int64_t first_making = Weights::kMadeInPlace ? num_pairs - 1 : 0;
    const int64_t num_steps = (num_pairs - first_making) * chunk.blocks.size();
    int64_t made = next_.blocks.begin, due = 0, pair = 0;
    Span asking{0, 0};  // rows of results whose places are not asked for yet
    const auto between = [&]() FS_INLINE {
      writer_.some();
      for (int64_t i = 0; i < kAskedPerBlock && asking.begin < asking.end; ++i) {
        writer_.ask(chunk.panel, asking.begin++);
      }
      if (pair < first_making) return;
      for (due += next_.blocks.size(); due >= num_steps; due -= num_steps) make(next_, made++);
    };
    for (; pair < num_pairs; ++pair) {
      const int64_t token = chunk.tokens.begin + pair * kTileTokens, rest = chunk.tokens.end - token;
      const int num_tokens = rest < kTileTokens ? static_cast<int>(rest) : kTileTokens;
      product_.configure(num_tokens);
      if (is_first) {
        product_.zero();
      } else if (num_pairs > 1) {
        product_.load(sums_[pair]);
      }
      if (is_last) asking = {token, token + num_tokens};
      product_.multiply(weights, x_.at(token, chunk.blocks.begin),
                        x_.at(token + kTileRows, chunk.blocks.begin), chunk.blocks.size(), between);
      if (is_last) {
        writer_.take(product_, chunk.panel, token, num_tokens);
      } else if (num_pairs > 1) {
        product_.store(sums_[pair]);
      }
    }
    while (made < next_.blocks.end) make(next_, made++);
  }

  const TokenTiles& x_;
  const Weights& weights_;
  TileWriter<Output> writer_;
  PanelShares::Walk walk_;
  typename Weights::Maker maker_;
  const int64_t chunks_per_panel_;
  Chunk next_;
  TileProduct product_;
  TileSums sums_[kMaxPairs];
  WeightChunk buffer_;
};

template <class Weights, class Output>
void multiply_on_tiles(const TokenTiles& x, const Weights& weights, const Output& output) {
  constexpr int64_t kTokenBytes = 1024 * 1024;  // of the activations of a block of tokens, which stay in L2
  constexpr int64_t kMaxPairs = WorkerProduct<Weights, Output>::kMaxPairs;
  constexpr int64_t kPairsOfWorker = 8;
  if (x.num_tokens == 0 || output.num_panels() == 0) return;
  const int64_t num_pairs = (x.num_tokens + kTileTokens - 1) / kTileTokens;
  const int64_t pair_bytes = x.num_blocks * kTileDepth * kTileTokens * int64_t{sizeof(bf16)};
  int64_t most = kMaxPairs;
  if (most * pair_bytes > kTokenBytes) most = kTokenBytes / pair_bytes;
  if (most < 1) most = 1;
  // Each worker has tokens of its own as soon as these are enough to make weights for: its rows are then in
  // its caches, as they are for the ops before and after.
  const int64_t of_worker = (num_pairs + pool().num_threads() - 1) / pool().num_threads();
  if (of_worker >= kPairsOfWorker && of_worker < most) most = of_worker;
  PanelShares shares({output.num_panels(), Output::kPanelsOfLine},
                     {x.num_tokens, kTileTokens, (num_pairs + most - 1) / most});
  shares.run([&](int worker) { WorkerProduct<Weights, Output>(x, weights, output, shares, worker).run(); });
}

}  // namespace fs::FS_ISA
