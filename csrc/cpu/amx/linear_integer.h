// SPDX-License-Identifier: Apache-2.0
//
// `linear_int4` and `linear_int8` with activations of 8 and 12 bits on AMX: activations rounded into tiles.
#pragma once

#include "cpu/amx/integer_product.h"
#include "cpu/quantize_rows.h"

namespace fs::FS_ISA {

// Fewer tokens are faster without tiles.
constexpr int64_t least_tile_tokens(int64_t activation_bits) {
  return activation_bits == 8 ? 10 : 5;
}

template <int kBits, int kPlanes, bool kHasOffsets, class Output>
void multiply_rounded(const Rows& rows, const Tensor& workspace, const QuantizedPanels& panels,
                      const uint8_t* packed, bool zero_points, const Output& output) {
  const int64_t num_blocks = rows.num_blocks(),
                numbers = (rows.count + kTileRows - 1) / kTileRows * kTileRows;
  constexpr int kBytes = IntegerTokens<kPlanes>::kBytes;
  int8_t* x = workspace.ptr<int8_t>();
  float* scales = reinterpret_cast<float*>(x + rows.count * num_blocks * kBytes);
  float* sums = scales + numbers * num_blocks;
  auto* offsets = reinterpret_cast<int32_t*>(sums);
  rows.each_block([&](int64_t row, int64_t index, const float (&block)[kBlock]) {
    const int64_t in_tile = row % kTileRows, first = row - in_tile, rest = rows.count - first;
    const int64_t height = rest < kTileRows ? rest : kTileRows;
    const QuantizedBlock quantized =
        quantize_block<kPlanes>(x + (first * num_blocks + index * height + in_tile) * kBytes, block);
    const int64_t at = (first / kTileRows * num_blocks + index) * kTileRows;
    scales[at + in_tile] = quantized.scale;
    if (kHasOffsets) sums[at + in_tile] = static_cast<float>(quantized.sum) * quantized.scale;
    if (kBits == 8) offsets[at + in_tile] = -128 * quantized.sum;
    if (row + 1 < rows.count) return;
    for (int64_t i = in_tile + 1; i < kTileRows; ++i) {  // tokens that are computed and belong to no one
      scales[at + i] = 0.0f;
      offsets[at + i] = 0;
    }
  });
  multiply_integers_on_tiles<kBits, kPlanes, kHasOffsets>(
      IntegerTokens<kPlanes>{x, scales, sums, offsets, rows.count, num_blocks}, panels, packed, zero_points,
      output);
}

}  // namespace fs::FS_ISA
