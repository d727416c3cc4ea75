// SPDX-License-Identifier: Apache-2.0
//
// Products of bfloat16 matrices on AMX's tile registers, and the same bits without AMX for tests.
//
// A tile register holds 16 rows of 64 bytes. One instruction adds the product of 16 x 32 activations and 32 x
// 16 weights to 16 x 16 float32 sums; from zero it sums the even and the odd k of its 32 in a chain of fused
// multiply-adds each, adds the two, and adds that to the sum (subnormals count as zero). So an output is a
// fixed function of its own row of activations and of its weights, in whatever rows of a tile it is computed.
// Weights in panels [k / 2][32][2] (layout/panel.h) are tiles as they lie: two, side by side, with lines 128
// bytes apart.
#pragma once

#if defined(FS_SIMD_AMX)

#include <cstdint>
#include <cstring>

#include "core/simd.h"
#include "layout/panel.h"

namespace fs::FS_ISA {

inline constexpr int kTileRows = 16;
inline constexpr int kTileDepth = 32;                 // k of one instruction
inline constexpr int kMaxTileTokens = 2 * kTileRows;  // tokens that share each load of weights
static_assert(kPanelRows == 32);

#if !defined(FS_SIMD_EMULATED)

// Configures this thread's tiles for products of up to 32 tokens; gives them up at its end, so that no
// context switch has to save them.
class TileRegisters {
 public:
  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { _tile_release(); }

  // sums[token][row] of the panel, for tokens [0, num_tokens) whose rows are x_stride elements apart.
  void multiply(float* sums, const bf16* panel, const bf16* x, int64_t x_stride, int num_tokens,
                int64_t depth) {
    configure(num_tokens);
    if (num_tokens > kTileRows) {
      multiply<true>(sums, panel, x, x_stride, num_tokens, depth);
    } else {
      multiply<false>(sums, panel, x, x_stride, num_tokens, depth);
    }
  }

 private:
  struct alignas(64) Shape {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  // Tiles 0 to 3: sums of (tokens 0-15, 16-31) x (rows 0-15, 16-31). 4, 5: activations. 6, 7: weights.
  void configure(int num_tokens) {
    if (num_tokens == configured_) return;
    configured_ = num_tokens;
    const auto upper = static_cast<uint8_t>(num_tokens < kTileRows ? num_tokens : kTileRows);
    const auto lower = static_cast<uint8_t>(num_tokens - upper);
    const uint8_t rows[8] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
    Shape shape;
    for (int i = 0; i < 8; ++i) {
      shape.rows[i] = rows[i];
      shape.row_bytes[i] = rows[i] == 0 ? 0 : 64;
    }
    // The intrinsics do not tell the compiler which memory they read.
    asm volatile("" ::"m"(shape) : "memory");
    _tile_loadconfig(&shape);
  }

  template <bool kLower>
  static void multiply(float* sums, const bf16* panel, const bf16* x, int64_t x_stride, int num_tokens,
                       int64_t depth) {
    constexpr int kPanelLine = 2 * kPanelRows * int{sizeof(bf16)};
    // Ahead in the stream of weights: far enough that memory is always asked for something.
    constexpr int64_t kAhead = 8 * 1024;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kLower) {
      _tile_zero(2);
      _tile_zero(3);
    }
    const auto step = [](const bf16* w, const bf16* upper, const bf16* lower, int64_t x_line)
                          __attribute__((always_inline)) {
                            _tile_loadd(6, w, kPanelLine);
                            _tile_loadd(4, upper, x_line);
                            _tile_dpbf16ps(0, 4, 6);
                            _tile_loadd(7, w + kPanelRows, kPanelLine);
                            _tile_dpbf16ps(1, 4, 7);
                            if constexpr (kLower) {
                              _tile_loadd(5, lower, x_line);
                              _tile_dpbf16ps(2, 5, 6);
                              _tile_dpbf16ps(3, 5, 7);
                            }
                          };
    const int64_t x_line = x_stride * int64_t{sizeof(bf16)};
    int64_t k = 0;
    for (; k + kTileDepth <= depth; k += kTileDepth) {
      const bf16* w = panel + k * kPanelRows;
      const auto* ahead = reinterpret_cast<const char*>(w) + kAhead;
      for (int line = 0; line < kTileDepth * kPanelRows * 2 / 64; ++line) {
        __builtin_prefetch(ahead + line * 64, 0, 2);
      }
      step(w, x + k, x + k + kTileRows * x_stride, x_line);
    }
    if (k < depth) {  // the last ones beside zeros, which add nothing
      alignas(64) bf16 weights[kTileDepth * kPanelRows] = {};
      alignas(64) bf16 tokens[kMaxTileTokens * kTileDepth] = {};
      const auto rest = static_cast<size_t>(padded_depth(depth) - k);
      std::memcpy(weights, panel + k * kPanelRows, rest * kPanelRows * sizeof(bf16));
      for (int t = 0; t < num_tokens; ++t) {
        std::memcpy(tokens + t * kTileDepth, x + t * x_stride + k, rest * sizeof(bf16));
      }
      asm volatile("" ::"m"(weights), "m"(tokens) : "memory");
      step(weights, tokens, tokens + kTileRows * kTileDepth, kTileDepth * sizeof(bf16));
    }
    constexpr int kSumLine = kPanelRows * int{sizeof(float)};
    _tile_stored(0, sums, kSumLine);
    _tile_stored(1, sums + kTileRows, kSumLine);
    if constexpr (kLower) {
      _tile_stored(2, sums + kTileRows * kPanelRows, kSumLine);
      _tile_stored(3, sums + kTileRows * kPanelRows + kTileRows, kSumLine);
    }
  }

  int configured_ = 0;
};

#else

class TileRegisters {
 public:
  TileRegisters() : control_(__builtin_ia32_stmxcsr()) {
    __builtin_ia32_ldmxcsr(control_ | 0x8040u);  // subnormals are zero, in operands and results
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { __builtin_ia32_ldmxcsr(control_); }

  void multiply(float* sums, const bf16* panel, const bf16* x, int64_t x_stride, int num_tokens,
                int64_t depth) {
    std::memset(sums, 0, static_cast<size_t>(num_tokens) * kPanelRows * sizeof(float));
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      const int64_t end = k + kTileDepth < depth ? k + kTileDepth : padded_depth(depth);
      for (int t = 0; t < num_tokens; ++t) {
        float even[kPanelRows] = {};
        float odd[kPanelRows] = {};
        for (int64_t i = k; i < end; i += 2) {
          const bf16* w = panel + i * kPanelRows;
          const float x_even = to_float(x[t * x_stride + i]);
          const float x_odd = to_float(x[t * x_stride + i + 1]);
          for (int64_t n = 0; n < kPanelRows; ++n) {
            even[n] = __builtin_fmaf(x_even, to_float(w[2 * n]), even[n]);
            odd[n] = __builtin_fmaf(x_odd, to_float(w[2 * n + 1]), odd[n]);
          }
        }
        for (int64_t n = 0; n < kPanelRows; ++n) sums[t * kPanelRows + n] += even[n] + odd[n];
      }
    }
  }

 private:
  unsigned control_;
};

#endif

}  // namespace fs::FS_ISA

#endif
