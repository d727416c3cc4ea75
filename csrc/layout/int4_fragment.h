// SPDX-License-Identifier: Apache-2.0
//
// Where `pack_int4` puts 4-bit codes, scales and zero points or minimums on a CUDA device.
//
// A weight [N, K] becomes ceil(N / 32) panels of 32 output rows. A panel is one forward stream for the warp
// that owns its rows: first the codes, K rounded up to 64, then the scales, K rounded up to 128, then the
// zero points or minimums. Weights are the left operand of the tensor cores' product of 16 x 16 by 16 x 8
// (fragment a in cuda/ptx.cuh): a lane's codes of a 16 x 16 block are one 32-bit word, and 32 inputs of the
// panel are four words a lane, so that a lane copies, and later reads, 16 bytes that nobody else needs:
//
//   codes    [k / 32][lane = 4 g + t][k / 16 % 2][block][word]      n % 32 = 16 block + 8 high + g
//   word     bits 4 i .. 4 i + 3 with i = high + 2 half + 4 low     k % 16 = 8 half + 2 t + low
//   scales   [group][g][block][high] float16                        minimums: the same
//   zeros    [group][g][block][high] uint8
//
// Mask 0x000f000f then leaves a[0], two codes in the low bits of two 16-bit halves; 0x00f000f0 leaves a[1],
// and after a shift by 8 the same masks leave a[2] and a[3].
//
// Groups that are neither of 32, 64 or 128 inputs nor a whole row are stored as smaller ones of these sizes.
#pragma once

#include <cstdint>

#include "layout/host_device.h"
#include "layout/int4.h"

namespace fs {

inline constexpr int64_t kInt4Rows = 32;   // of a panel
inline constexpr int64_t kInt4Depth = 64;  // K is padded to a multiple
inline constexpr int64_t kInt4Unit = 128;  // inputs of a stage of the kernel; whole units have scales

struct Int4Layout {
  int64_t num_panels;
  int64_t code_bytes;  // of a panel; the scales begin here
  int64_t group_size;  // as stored: 32, 64 or 128; 0: one group per row
  int64_t num_groups;
  int64_t scale_bytes;   // of a panel; what follows begins at code_bytes + scale_bytes
  int64_t offset_bytes;  // zero points or minimums of a panel
  FS_HOST_DEVICE constexpr int64_t panel_bytes() const { return code_bytes + scale_bytes + offset_bytes; }
};

FS_HOST_DEVICE constexpr Int4Layout int4_layout(int64_t num_rows, int64_t depth, int64_t group_size,
                                                Int4Form form) {
  Int4Layout layout{};
  layout.num_panels = (num_rows + kInt4Rows - 1) / kInt4Rows;
  const int64_t padded = (depth + kInt4Depth - 1) / kInt4Depth * kInt4Depth;
  layout.code_bytes = padded * kInt4Rows / 2;
  layout.group_size = group_size >= depth ? 0 : group_size % 128 == 0 ? 128 : group_size % 64 == 0 ? 64 : 32;
  layout.num_groups =
      layout.group_size == 0 ? 1 : (depth + kInt4Unit - 1) / kInt4Unit * (kInt4Unit / layout.group_size);
  layout.scale_bytes = layout.num_groups * kInt4Rows * 2;
  layout.offset_bytes = form == Int4Form::symmetric     ? 0
                        : form == Int4Form::zero_points ? layout.num_groups * kInt4Rows
                                                        : layout.scale_bytes;
  return layout;
}

// A code's place in its panel.
struct Int4Place {
  int64_t byte;  // of the 32-bit word that holds it, a multiple of 4
  int shift;     // of the code in the word
};

FS_HOST_DEVICE constexpr Int4Place int4_place(int64_t row, int64_t k) {  // row: n % 32
  const int64_t block = row / 16, high = row % 16 / 8, g = row % 8;
  const int64_t half = k % 16 / 8, t = k % 8 / 2, low = k % 2;
  const int64_t word = ((k / 32 * 32 + 4 * g + t) * 2 + k / 16 % 2) * 2 + block;
  return {word * 4, static_cast<int>(4 * (high + 2 * half + 4 * low))};
}

// The inverse: which weight of its panel lies there.
struct Int4Weight {
  int64_t row, k;
};

FS_HOST_DEVICE constexpr Int4Weight int4_weight(Int4Place place) {
  const int64_t word = place.byte / 4, lane = word / 4 % 32;
  const int64_t block = word % 2, step = word / 2 % 2, chunk = word / 128;
  const int64_t i = place.shift / 4, high = i % 2, half = i / 2 % 2, low = i / 4;
  return {16 * block + 8 * high + lane / 4, 32 * chunk + 16 * step + 8 * half + 2 * (lane % 4) + low};
}

// The place of a row's scale (and zero point, and minimum) among the 32 of its group.
FS_HOST_DEVICE constexpr int64_t int4_scale_place(int64_t row) {
  return row % 8 * 4 + row / 16 * 2 + row % 16 / 8;
}
FS_HOST_DEVICE constexpr int64_t int4_scale_row(int64_t place) {
  return place / 2 % 2 * 16 + place % 2 * 8 + place / 4;
}

}  // namespace fs
