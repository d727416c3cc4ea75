// SPDX-License-Identifier: Apache-2.0
//
// Where the 16-byte chunks of a row-major tile lie in shared memory.
//
// ldmatrix reads the same chunk of eight neighbouring rows at once, and a warp writes eight neighbouring rows
// or one row at a time. Shared memory serves 128 bytes at once if they lie in different banks, that is in
// different places modulo 128 bytes. XOR of the chunk with the row makes all of these free of conflicts; the
// rows stay where they are. tests/cpp/test_swizzle.cpp tries every access.
#pragma once

#include "layout/host_device.h"

namespace fs {

inline constexpr int kChunkBytes = 16;
inline constexpr int kChunksPerLine = 8;  // of 128 bytes: all banks once

// The place in its row of chunk `chunk` of row `row`, in a tile whose rows have `row_chunks` chunks, a power
// of two. Where a line holds several rows, they count as one.
FS_HOST_DEVICE constexpr int swizzled_chunk(int row, int chunk, int row_chunks) {
  const int rows_per_line = row_chunks < kChunksPerLine ? kChunksPerLine / row_chunks : 1;
  const int places = row_chunks < kChunksPerLine ? row_chunks : kChunksPerLine;
  return chunk ^ (row / rows_per_line % places);
}

// The same as an offset in bytes from the start of the tile.
FS_HOST_DEVICE constexpr int swizzled_offset(int row, int chunk, int row_chunks) {
  return (row * row_chunks + swizzled_chunk(row, chunk, row_chunks)) * kChunkBytes;
}

}  // namespace fs
