// SPDX-License-Identifier: Apache-2.0
//
// Products of bfloat16 matrices on AMX's tile registers, and the same bits without AMX for tests.
//
// A tile register holds 16 rows of 64 bytes. One instruction adds the product of 16 x 32 activations and 32 x
// 16 weights to 16 x 16 float32 sums; from zero it sums the even and the odd k of its 32 in a chain of fused
// multiply-adds each, adds the two, and adds that to the sum (subnormals count as zero). So an output is a
// fixed function of its own row of activations and of its weights, in whatever rows of a tile it is computed.
// Weights in panels [k / 2][32][2] (layout/panel.h) are tiles as they lie: two, side by side, with lines 128
// bytes apart. Activations are laid out as tiles (token_tiles.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/simd.h"
#include "cpu/amx/tile_config.h"
#include "layout/panel.h"

namespace fs::FS_ISA {

inline constexpr int kTileRows = 16;
inline constexpr int kTileDepth = 32;              // k of one instruction
inline constexpr int kTileTokens = 2 * kTileRows;  // tokens that share each load of weights
static_assert(kPanelRows == 32);

// Sums of up to 32 tokens and a panel's 32 rows, as they are put aside: tile 2 t + r has tokens [16 t, 16 t +
// 16) and rows [16 r, 16 r + 16).
struct alignas(64) TileSums {
  float value[4][kTileRows][kTileRows];

  const float* row(int token, int half) const {
    return value[token / kTileRows * 2 + half][token % kTileRows];
  }
};

// The tiles of up to 16 tokens, one for each 32 k: rows of 64 bytes.
struct TileRows {
  const bf16* x;
  int64_t stride;  // from token to token, in elements
  int64_t step;    // from tile to tile
};

#if !defined(FS_SIMD_EMULATED)

// This thread's tile registers, given up at the end, so that no context switch has to save them.
class TileProduct {
 public:
  TileProduct() = default;
  TileProduct(const TileProduct&) = delete;
  TileProduct& operator=(const TileProduct&) = delete;
  ~TileProduct() { _tile_release(); }

  // For the next products, of up to 32 tokens. Registers 0 to 3 hold their sums, in the order of TileSums; 4
  // and 5 activations; 6 and 7 weights.
  void configure(int num_tokens) {
    if (num_tokens == num_tokens_) return;
    num_tokens_ = num_tokens;
    const int upper = num_tokens < kTileRows ? num_tokens : kTileRows;
    const int lower = num_tokens - upper;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
    TileConfig config;
    for (int i = 0; i < 8; ++i) config.set(i, rows[i]);
    config.load();
  }

  void zero() {
    _tile_zero(0);
    _tile_zero(1);
    if (!has_lower()) return;
    _tile_zero(2);
    _tile_zero(3);
  }

  void load(const TileSums& sums) {
    asm volatile("" ::: "memory");
    _tile_loadd(0, sums.value[0], 64);
    _tile_loadd(1, sums.value[1], 64);
    if (!has_lower()) return;
    _tile_loadd(2, sums.value[2], 64);
    _tile_loadd(3, sums.value[3], 64);
  }

  void store(TileSums& sums) {
    _tile_stored(0, sums.value[0], 64);
    _tile_stored(1, sums.value[1], 64);
    if (has_lower()) {
      _tile_stored(2, sums.value[2], 64);
      _tile_stored(3, sums.value[3], 64);
    }
    asm volatile("" ::: "memory");
  }

  // To rows of 32 that are `stride` apart.
  void store(float* out, int64_t stride) {
    const int64_t bytes = stride * int64_t{sizeof(float)};
    _tile_stored(0, out, bytes);
    _tile_stored(1, out + kTileRows, bytes);
    if (has_lower()) {
      float* lower = out + kTileRows * stride;
      _tile_stored(2, lower, bytes);
      _tile_stored(3, lower + kTileRows, bytes);
    }
    asm volatile("" ::: "memory");
  }

  // sums += products of num_blocks times 32 k: `weights` as in a panel, `upper` and `lower` the tiles of
  // tokens 0-15 and 16-31. Calls between() after each block. Activations are loaded with the hint that leaves
  // them in L2: in L1 they would take the place of weights.
  template <class F>
  [[gnu::always_inline]] void multiply(const bf16* weights, TileRows upper, TileRows lower,
                                       int64_t num_blocks, const F& between) {
    asm volatile("" ::: "memory");
    if (has_lower()) {
      multiply<true>(weights, upper, lower, num_blocks, between);
    } else {
      multiply<false>(weights, upper, lower, num_blocks, between);
    }
  }

 private:
  bool has_lower() const { return num_tokens_ > kTileRows; }

  template <bool kLower, class F>
  [[gnu::always_inline]] void multiply(const bf16* w, TileRows upper, TileRows lower, int64_t num_blocks,
                                       const F& between) {
    constexpr int kPanelLine = 2 * kPanelRows * int{sizeof(bf16)};
    const int64_t upper_stride = upper.stride * int{sizeof(bf16)},
                  lower_stride = lower.stride * int{sizeof(bf16)};
    for (int64_t i = 0; i < num_blocks; ++i) {
      _tile_loadd(6, w, kPanelLine);
      _tile_stream_loadd(4, upper.x, upper_stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, w + kPanelRows, kPanelLine);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kLower) {
        _tile_stream_loadd(5, lower.x, lower_stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        lower.x += lower.step;
      }
      w += kTileDepth * kPanelRows;
      upper.x += upper.step;
      between();
    }
  }

  int num_tokens_ = 0;
};

#else

class TileProduct {
 public:
  TileProduct() : control_(__builtin_ia32_stmxcsr()) {}
  TileProduct(const TileProduct&) = delete;
  TileProduct& operator=(const TileProduct&) = delete;

  void configure(int num_tokens) { num_tokens_ = num_tokens; }
  void zero() { std::memset(&sums_, 0, sizeof(sums_)); }
  void load(const TileSums& sums) { sums_ = sums; }
  void store(TileSums& sums) { sums = sums_; }
  void store(float* out, int64_t stride) {
    for (int t = 0; t < num_tokens_; ++t) {
      for (int half = 0; half < 2; ++half) {
        std::memcpy(out + t * stride + half * kTileRows, sums_.row(t, half), sizeof(sums_.value[0][0]));
      }
    }
  }

  template <class F>
  void multiply(const bf16* weights, TileRows upper, TileRows lower, int64_t num_blocks, const F& between) {
    add_products(weights, upper, lower, num_blocks);
    for (int64_t i = 0; i < num_blocks; ++i) between();
  }

 private:
  // Not inlined, so that none of it moves to where subnormals count, or back.
  [[gnu::noinline]] void add_products(const bf16* weights, TileRows upper, TileRows lower,
                                      int64_t num_blocks) {
    __builtin_ia32_ldmxcsr(control_ | 0x8040u);  // subnormals are zero, in operands and results
    for (int t = 0; t < num_tokens_; ++t) {
      const TileRows& rows = t < kTileRows ? upper : lower;
      for (int64_t block = 0; block < num_blocks; ++block) {
        const bf16* x = rows.x + block * rows.step + t % kTileRows * rows.stride;
        const bf16* w = weights + block * kTileDepth * kPanelRows;
        float even[kPanelRows] = {};
        float odd[kPanelRows] = {};
        for (int k = 0; k < kTileDepth; k += 2, w += 2 * kPanelRows) {
          for (int64_t n = 0; n < kPanelRows; ++n) {
            even[n] = __builtin_fmaf(to_float(x[k]), to_float(w[2 * n]), even[n]);
            odd[n] = __builtin_fmaf(to_float(x[k + 1]), to_float(w[2 * n + 1]), odd[n]);
          }
        }
        for (int n = 0; n < int{kPanelRows}; ++n) {
          sums_.value[t / kTileRows * 2 + n / kTileRows][t % kTileRows][n % kTileRows] += even[n] + odd[n];
        }
      }
    }
    __builtin_ia32_ldmxcsr(control_);
  }

  unsigned control_;
  int num_tokens_ = 0;
  TileSums sums_;
};

#endif

}  // namespace fs::FS_ISA
