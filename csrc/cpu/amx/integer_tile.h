// SPDX-License-Identifier: Apache-2.0
//
// One product of AMX's tile registers on bytes: up to 16 rows of signed activations times 16 rows of weights,
// in exact 32-bit integers.
#pragma once

#include "cpu/amx/tile.h"
#include "cpu/amx/tile_config.h"

namespace fs::FS_ISA {

// Sums of products, [token][row].
struct alignas(64) IntegerSums {
  int32_t value[kTileRows][kTileRows];
};

#if !defined(FS_SIMD_EMULATED)

// This thread's tile registers, given up at the end, so that no context switch has to save them.
class IntegerTile {
 public:
  IntegerTile() = default;
  IntegerTile(const IntegerTile&) = delete;
  IntegerTile& operator=(const IntegerTile&) = delete;
  ~IntegerTile() { _tile_release(); }

  // For the next products: of num_tokens rows of `depth` activations.
  void configure(int num_tokens, int depth) {
    if (num_tokens == num_tokens_) return;
    num_tokens_ = num_tokens;
    TileConfig config;
    config.set(0, num_tokens);
    config.set(1, num_tokens, depth);
    config.set(2, depth / 4);
    config.load();
  }

  // x: a row every x_stride bytes. weights: [depth / 4][16 rows][4], a line every weights_stride bytes.
  template <bool kSignedWeights>
  [[gnu::always_inline]] void multiply(IntegerSums& sums, const int8_t* x, int64_t x_stride,
                                       const uint8_t* weights, int64_t weights_stride) {
    asm volatile("" ::: "memory");
    _tile_loadd(1, x, x_stride);
    _tile_loadd(2, weights, weights_stride);
    _tile_zero(0);
    if constexpr (kSignedWeights) {
      _tile_dpbssd(0, 1, 2);
    } else {
      _tile_dpbsud(0, 1, 2);
    }
    _tile_stored(0, sums.value, 64);
    asm volatile("" ::: "memory");
  }

 private:
  int num_tokens_ = 0;
};

#else

class IntegerTile {
 public:
  void configure(int num_tokens, int depth) {
    num_tokens_ = num_tokens;
    depth_ = depth;
  }

  template <bool kSignedWeights>
  void multiply(IntegerSums& sums, const int8_t* x, int64_t x_stride, const uint8_t* weights,
                int64_t weights_stride) {
    for (int t = 0; t < num_tokens_; ++t) {
      for (int n = 0; n < kTileRows; ++n) {
        int32_t sum = 0;
        for (int k = 0; k < depth_; ++k) {
          const uint8_t byte = weights[k / 4 * weights_stride + 4 * n + k % 4];
          sum += x[t * x_stride + k] * (kSignedWeights ? static_cast<int8_t>(byte) : byte);
        }
        sums.value[t][n] = sum;
      }
    }
  }

 private:
  int num_tokens_ = 0, depth_ = 0;
};

#endif

}  // namespace fs::FS_ISA
