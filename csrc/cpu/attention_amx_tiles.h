// SPDX-License-Identifier: Apache-2.0
//
// The products of attention on AMX's tile registers, and the same bits without AMX for tests. How an
// instruction sums is described in amx/tile.h: an output is a fixed function of its own row of the left
// matrix and its own column of the right one, in whatever rows of a tile it is computed.
#pragma once

#if defined(FS_SIMD_AMX)

#include <cstdint>
#include <cstring>

#include "core/simd.h"
#include "cpu/amx/tile_config.h"

namespace fs::FS_ISA {

inline constexpr int kAmxRows = 16;
inline constexpr int kAmxDepth = 32;                // summed by one instruction
inline constexpr int kAmxColumns = 16;              // of one tile
inline constexpr int kAmxGroupRows = 2 * kAmxRows;  // that share each load of the right matrix

// The right matrix of a product whose every column is the sum of a row.
struct OnesTile {
  alignas(64) bf16 value[kAmxDepth * kAmxColumns];
  constexpr OnesTile() : value() {
    for (bf16& one : value) one = 0x3f80;
  }
};
inline constexpr OnesTile kOnes;

#if !defined(FS_SIMD_EMULATED)

class AttentionTiles {
 public:
  AttentionTiles() = default;
  AttentionTiles(const AttentionTiles&) = delete;
  AttentionTiles& operator=(const AttentionTiles&) = delete;
  ~AttentionTiles() { _tile_release(); }

  // For products of at most so many rows; those of more than 16 work on whole tiles.
  void configure(int64_t max_rows) {
    // Tiles 0 to 3: sums of two by two tiles. 4, 5: left. 6, 7: right.
    configure(static_cast<int>(max_rows < kAmxRows ? max_rows : kAmxRows), 6);
  }

  // The registers of whoever does products of one row of tiles by hand: all but the last, which is right,
  // with so many rows.
  void configure_all_but_last(int64_t rows) { configure(static_cast<int>(rows), 7); }

  // out[row][column] of kColumnTiles times 16 columns = the sum over `steps` of left[row][32 * step + k] *
  // right(step, column tile), tiles of 16 lines (pairs of k) x 16 columns x 2, right_line elements apart.
  // right() is called once for each tile, in ascending order. Rows up to a multiple of 16 (below 16: as
  // configured) are read and written.
  template <int kColumnTiles = 2, class Right>
  void multiply(float* out, int64_t out_stride, const bf16* left, int64_t left_stride, int64_t num_rows,
                int64_t steps, int64_t right_line, const Right& right) const {
    static_assert(kColumnTiles == 1 || kColumnTiles == 2 || kColumnTiles == 4);
    asm volatile("" ::: "memory");
    const int64_t out_line = out_stride * int64_t{sizeof(float)};
    const int64_t left_line = left_stride * int64_t{sizeof(bf16)};
    right_line *= int64_t{sizeof(bf16)};
    _tile_zero(0);
    if constexpr (kColumnTiles > 1) _tile_zero(1);
    if constexpr (kColumnTiles == 1) {
      const bool has_lower = num_rows > kAmxRows;
      if (has_lower) _tile_zero(2);
      for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(6, right(step, 0), right_line);
        _tile_loadd(4, left + step * kAmxDepth, left_line);
        _tile_dpbf16ps(0, 4, 6);
        if (!has_lower) continue;
        _tile_loadd(5, left + kAmxRows * left_stride + step * kAmxDepth, left_line);
        _tile_dpbf16ps(2, 5, 6);
      }
      if (has_lower) _tile_stored(2, out + kAmxRows * out_stride, out_line);
    } else if constexpr (kColumnTiles == 4) {
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(4, left + step * kAmxDepth, left_line);
        _tile_loadd(6, right(step, 0), right_line);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right(step, 1), right_line);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, right(step, 2), right_line);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, right(step, 3), right_line);
        _tile_dpbf16ps(3, 4, 7);
      }
      _tile_stored(2, out + 2 * kAmxColumns, out_line);
      _tile_stored(3, out + 3 * kAmxColumns, out_line);
    } else if (num_rows > kAmxRows) {
      const bf16* lower = left + kAmxRows * left_stride;
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(6, right(step, 0), right_line);
        _tile_loadd(4, left + step * kAmxDepth, left_line);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right(step, 1), right_line);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower + step * kAmxDepth, left_line);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(2, out + kAmxRows * out_stride, out_line);
      _tile_stored(3, out + kAmxRows * out_stride + kAmxColumns, out_line);
    } else {
      for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(6, right(step, 0), right_line);
        _tile_loadd(4, left + step * kAmxDepth, left_line);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right(step, 1), right_line);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    _tile_stored(0, out, out_line);
    if constexpr (kColumnTiles > 1) _tile_stored(1, out + kAmxColumns, out_line);
    asm volatile("" ::: "memory");
  }

 private:
  void configure(int rows, int num_of_rows) {
    if (rows == rows_ && num_of_rows == num_of_rows_) return;
    rows_ = rows;
    num_of_rows_ = num_of_rows;
    TileConfig config;
    for (int i = 0; i < 8; ++i) config.set(i, i < num_of_rows ? rows : kAmxRows);
    config.load();
  }

  int rows_ = 0;
  int num_of_rows_ = 0;  // the first registers have rows_ rows, the others are whole
};

#else

class AttentionTiles {
 public:
  AttentionTiles() : control_(__builtin_ia32_stmxcsr()) {}
  AttentionTiles(const AttentionTiles&) = delete;
  AttentionTiles& operator=(const AttentionTiles&) = delete;

  void configure(int64_t max_rows) { configured_ = max_rows < kAmxRows ? max_rows : kAmxRows; }
  void configure_all_but_last(int64_t rows) { configured_ = rows; }

  template <int kColumnTiles = 2, class Right>
  void multiply(float* out, int64_t out_stride, const bf16* left, int64_t left_stride, int64_t num_rows,
                int64_t steps, int64_t right_line, const Right& right) const {
    __builtin_ia32_ldmxcsr(control_ | 0x8040u);  // subnormals are zero, in operands and results
    constexpr int kColumns = kColumnTiles * kAmxColumns;
    const int64_t rows = num_rows > kAmxRows ? kAmxGroupRows : configured_;
    for (int64_t r = 0; r < rows; ++r) {
      float sums[kColumns] = {};
      for (int64_t step = 0; step < steps; ++step) {
        float even[kColumns] = {};
        float odd[kColumns] = {};
        for (int64_t pair = 0; pair < kAmxDepth / 2; ++pair) {
          const bf16* x = left + r * left_stride + step * kAmxDepth + 2 * pair;
          const float x_even = to_float(x[0]);
          const float x_odd = to_float(x[1]);
          for (int tile = 0; tile < kColumnTiles; ++tile) {
            const bf16* line = right(step, tile) + pair * right_line;
            for (int n = 0; n < kAmxColumns; ++n) {
              float& of_even = even[tile * kAmxColumns + n];
              float& of_odd = odd[tile * kAmxColumns + n];
              of_even = __builtin_fmaf(x_even, to_float(line[2 * n]), of_even);
              of_odd = __builtin_fmaf(x_odd, to_float(line[2 * n + 1]), of_odd);
            }
          }
        }
        for (int n = 0; n < kColumns; ++n) sums[n] += even[n] + odd[n];
      }
      std::memcpy(out + r * out_stride, sums, sizeof(sums));
    }
    __builtin_ia32_ldmxcsr(control_);
  }

 private:
  unsigned control_;
  int64_t configured_ = 0;
};

#endif

}  // namespace fs::FS_ISA

#endif
