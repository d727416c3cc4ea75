// SPDX-License-Identifier: Apache-2.0
//
// Where `pack_int8` puts 8-bit codes and their scales on a CUDA device.
//
// A weight [N, K] becomes ceil(N / 32) panels of 32 output rows, K rounded up to 64. A panel is one forward
// stream for the warp that owns its rows, in stages of 64 inputs: their codes, then the scales of their two
// groups of 32; larger groups are stored as several with the same scale. Weights are the right operand of
// the tensor cores' product of 16 x 16 by 16 x 8 (fragment b in cuda/ptx.cuh): a lane's codes of a 16 x 8
// block are one 32-bit word, and those of four blocks side by side 16 bytes that nobody else needs:
//
//   codes    [k / 16 % 4][lane = 4 g + t][block][byte]    n % 32 = 8 block + g, as code + 128
//   byte     half + 2 low                                 k % 16 = 8 half + 2 t + low
//   scales   [k / 32 % 2][t][block][low] float16          n % 32 = 8 block + 2 t + low
//
// So mask 0x00ff00ff leaves b0, two codes in two 16-bit halves, and the other two bytes are b1; and a lane's
// scales are those of the columns of its sums.
#pragma once

#include <cstdint>

#include "layout/host_device.h"

namespace fs {

inline constexpr int64_t kInt8Rows = 32;   // of a panel
inline constexpr int64_t kInt8Depth = 64;  // inputs of a stage; K is padded to a multiple
inline constexpr int64_t kInt8Group = 32;  // inputs that share a scale, as stored
inline constexpr int64_t kInt8CodeBytes = kInt8Depth * kInt8Rows;               // of a stage
inline constexpr int64_t kInt8StageBytes = kInt8CodeBytes + 2 * kInt8Rows * 2;  // with its scales

FS_HOST_DEVICE constexpr int64_t int8_num_panels(int64_t num_rows) {
  return (num_rows + kInt8Rows - 1) / kInt8Rows;
}
FS_HOST_DEVICE constexpr int64_t int8_panel_bytes(int64_t depth) {
  return (depth + kInt8Depth - 1) / kInt8Depth * kInt8StageBytes;
}

// The byte of its stage where a code lies; row: n % 32, k: of the stage.
FS_HOST_DEVICE constexpr int64_t int8_code_byte(int64_t row, int64_t k) {
  const int64_t block = row / 8, g = row % 8, half = k % 16 / 8, t = k % 8 / 2, low = k % 2;
  return k / 16 * 512 + (4 * g + t) * 16 + block * 4 + half + 2 * low;
}

// The inverse: which weight of its panel and stage lies there.
struct Int8Weight {
  int64_t row, k;
};
FS_HOST_DEVICE constexpr Int8Weight int8_weight(int64_t byte) {
  const int64_t lane = byte % 512 / 16, block = byte % 16 / 4, half = byte % 2, low = byte % 4 / 2;
  return {8 * block + lane / 4, byte / 512 * 16 + 8 * half + 2 * (lane % 4) + low};
}

// The place of a row's scale among the 32 of its group, and the row of a place.
FS_HOST_DEVICE constexpr int64_t int8_scale_place(int64_t row) {
  return row % 8 / 2 * 8 + row / 8 * 2 + row % 2;
}
FS_HOST_DEVICE constexpr int64_t int8_scale_row(int64_t place) {
  return place % 8 / 2 * 8 + place / 8 * 2 + place % 2;
}

}  // namespace fs
