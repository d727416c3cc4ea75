// SPDX-License-Identifier: Apache-2.0
//
// Where `pack_linear` puts the weight of output row n and input k.
//
// A weight [N, K] becomes ceil(N / 32) panels of 32 output rows, zero padded; the array has shape
// [ceil(N / 32), Kp, 32] with Kp = K rounded up to 2. Inside a panel k ascends:
//
//   float32, float16   [k][32 rows]
//   bfloat16           [k / 2][32 rows][2]: the even and the odd k of a row share one 32-bit word. The bf16
//                      dot product takes such words; others get even k by a shift and odd k by a mask.
//
// One panel is one forward stream, whatever the number of tokens.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace fs {

inline constexpr int64_t kPanelRows = 32;

constexpr int64_t num_panels(int64_t num_rows) {
  return (num_rows + kPanelRows - 1) / kPanelRows;
}

constexpr int64_t padded_depth(int64_t depth) {
  return (depth + 1) / 2 * 2;
}

// Offset of (row n, input k) in the packed array, in elements; `depth` is K.
constexpr int64_t panel_offset(int64_t n, int64_t k, int64_t depth, bool paired) {
  const int64_t panel = n / kPanelRows * padded_depth(depth) * kPanelRows;
  const int64_t row = n % kPanelRows;
  return panel + (paired ? k / 2 * 2 * kPanelRows + row * 2 + k % 2 : k * kPanelRows + row);
}

constexpr bool is_paired(DType dtype) {
  return dtype == DType::bf16;
}

// Workspace that `linear` needs for up to max_tokens rows: their bf16 copy, where the instruction set
// multiplies in bf16, padded to 32 k. One copy is shared by all workers, so the size does not depend on their
// number.
constexpr int64_t linear_workspace_bytes(int64_t max_tokens, int64_t depth, DType dtype) {
  return dtype == DType::bf16 ? max_tokens * ((depth + 31) / 32 * 32) * 2 : 0;
}

}  // namespace fs
