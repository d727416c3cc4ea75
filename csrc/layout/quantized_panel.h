// SPDX-License-Identifier: Apache-2.0
//
// Where `pack_int4` and `pack_int8` put codes, scales and the rest on the CPU.
//
// A weight [N, K] becomes ceil(N / 32) panels of 32 output rows, each one forward stream whatever the number
// of tokens. K is cut into blocks of 32 inputs, padded with codes that meet zeros; the blocks of a group
// follow a header with what its rows share:
//
//   group    [32 scales, float16]  [32 zero points or minimums, float16: not in the symmetric form]  [blocks]
//   block    8 lines, line t for the inputs 4 t to 4 t + 3 of the block
//   line     4 bits: 64 bytes. Byte 4 r + j has row r, input 4 t + j in its low half and row r + 16 in its
//   high
//                    half
//            8 bits: 128 bytes. Byte 64 h + 4 r + j has row 16 h + r, input 4 t + j, as code + 128
//
// A line is what one 8-bit dot product instruction takes: four inputs of 16 rows, beside four activations
// that all rows share. Headers and lines are 64 bytes long and aligned as the panel is.
#pragma once

#include <cstdint>

#include "layout/host_device.h"
#include "layout/int4.h"

namespace fs {

struct QuantizedPanels {
  static constexpr int64_t kRows = 32;
  static constexpr int64_t kBlock = kGroupMultiple;  // inputs
  static constexpr int64_t kLine = 4;                // inputs
  static constexpr int64_t kHeader = 64;             // bytes of 32 float16

  int64_t num_rows, depth, group_size;
  int bits;          // 4 or 8
  bool has_offsets;  // zero points or minimums

  FS_HOST_DEVICE constexpr int64_t num_panels() const { return (num_rows + kRows - 1) / kRows; }
  FS_HOST_DEVICE constexpr int64_t num_blocks() const { return (depth + kBlock - 1) / kBlock; }
  FS_HOST_DEVICE constexpr int64_t padded_depth() const { return num_blocks() * kBlock; }
  FS_HOST_DEVICE constexpr int64_t blocks_per_group() const {
    return group_size >= depth ? (num_blocks() > 0 ? num_blocks() : 1) : group_size / kBlock;
  }
  FS_HOST_DEVICE constexpr int64_t num_groups() const {
    return (num_blocks() + blocks_per_group() - 1) / blocks_per_group();
  }
  FS_HOST_DEVICE constexpr int64_t line_bytes() const { return bits == 4 ? 64 : 128; }
  FS_HOST_DEVICE constexpr int64_t block_bytes() const { return kBlock / kLine * line_bytes(); }
  FS_HOST_DEVICE constexpr int64_t header_bytes() const { return has_offsets ? 2 * kHeader : kHeader; }
  FS_HOST_DEVICE constexpr int64_t panel_bytes() const {
    return num_groups() * header_bytes() + num_blocks() * block_bytes();
  }

  // Bytes from the start of the packed array [num_panels, panel_bytes].
  FS_HOST_DEVICE constexpr int64_t group_offset(int64_t n, int64_t group) const {
    return n / kRows * panel_bytes() + group * (header_bytes() + blocks_per_group() * block_bytes());
  }
  FS_HOST_DEVICE constexpr int64_t scale_offset(int64_t n, int64_t group) const {
    return group_offset(n, group) + n % kRows * 2;
  }
  FS_HOST_DEVICE constexpr int64_t zero_or_minimum_offset(int64_t n, int64_t group) const {
    return scale_offset(n, group) + kHeader;
  }

  struct Place {
    int64_t byte;
    int shift;  // of the code inside the byte
  };
  FS_HOST_DEVICE constexpr Place code(int64_t n, int64_t k) const {
    const int64_t block = k / kBlock;
    const int64_t row = n % kRows;
    const int64_t start = group_offset(n, block / blocks_per_group()) + header_bytes() +
                          block % blocks_per_group() * block_bytes() + k % kBlock / kLine * line_bytes();
    const int64_t in_line = row % 16 * kLine + k % kLine;
    if (bits == 4) return {start + in_line, row < 16 ? 0 : 4};
    return {start + row / 16 * 64 + in_line, 0};
  }
};

// Bytes of workspace that `linear_int4` and `linear_int8` need for up to max_tokens rows, for any instruction
// set: the activations as they are multiplied, and per block of 32 a scale and a sum, of which tiles have
// room for whole sixteens of tokens.
FS_HOST_DEVICE constexpr int64_t quantized_workspace_bytes(int64_t max_tokens, int64_t depth,
                                                           int64_t activation_bits) {
  const int64_t blocks = (depth + QuantizedPanels::kBlock - 1) / QuantizedPanels::kBlock;
  const int64_t width = activation_bits == 8 ? 1 : activation_bits == 12 ? 2 : 4;
  const int64_t numbers = 2 * ((max_tokens + 15) / 16 * 16);
  return blocks * (max_tokens * QuantizedPanels::kBlock * width + numbers * 4);
}

}  // namespace fs
