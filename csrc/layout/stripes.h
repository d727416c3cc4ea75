// SPDX-License-Identifier: Apache-2.0
//
// How a matrix product with few rows is shared among the multiprocessors of a GPU, and in which order it is
// summed.
//
// The weight is cut into column tiles of kStripeColumns outputs and, along K, into units of kStripeDepth
// inputs. Units are numbered down the columns, one column tile after another, and cut into stripes of equal
// length, one for each block. A column tile that several stripes touch is the sum of its parts in the order
// of K, whoever computes them. The cuts depend on N, K and the number of multiprocessors, never on the number
// of rows: one row alone and a thousand are summed in the same order.
//
// A column tile has at most kMaxParts parts, so that putting them together stays cheap: three additions. With
// many column tiles stripes may be of any length from a third of a column tile up, and cut anywhere; with
// fewer than a third of the multiprocessors each is cut into the same number of equal parts, and some
// multiprocessors are left over.
#pragma once

#include <cstdint>

#include "layout/host_device.h"

namespace fs {

inline constexpr int kStripeColumns = 128;
inline constexpr int kStripeDepth = 128;
inline constexpr int kMaxParts = 4;
inline constexpr int kMinStripe = 2;  // units

// Half of the part [begin, end) that the first and the second half of a block's warps sum.
FS_HOST_DEVICE constexpr int part_middle(int begin, int end) {
  return begin + (end - begin + 1) / 2;
}

struct Stripes {
  int num_column_tiles;
  int units;   // of a column tile
  int pitch;   // distance of the first units of two column tiles in the numbering, at least `units`
  int length;  // of a stripe
  int count;   // stripes

  // Parts of a column tile, and where they begin and end, in units from the top of the column tile.
  FS_HOST_DEVICE constexpr int first_stripe(int column_tile) const { return column_tile * pitch / length; }
  FS_HOST_DEVICE constexpr int num_parts(int column_tile) const {
    return (column_tile * pitch + units - 1) / length - first_stripe(column_tile) + 1;
  }
  FS_HOST_DEVICE constexpr int part_begin(int column_tile, int part) const {
    const int begin = (first_stripe(column_tile) + part) * length - column_tile * pitch;
    return begin < 0 ? 0 : begin;
  }
  FS_HOST_DEVICE constexpr int part_end(int column_tile, int part) const {
    const int end = (first_stripe(column_tile) + part + 1) * length - column_tile * pitch;
    return end > units ? units : end;
  }
};

FS_HOST_DEVICE constexpr int divide_up(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

FS_HOST_DEVICE constexpr Stripes make_stripes(int64_t num_columns, int64_t depth, int num_multiprocessors) {
  Stripes stripes{};
  stripes.num_column_tiles = divide_up(num_columns, kStripeColumns);
  stripes.units = stripes.pitch = divide_up(depth, kStripeDepth);
  const int tiles = stripes.num_column_tiles, units = stripes.units;
  // Two stripes on a multiprocessor, if they have a column tile or so each.
  const int wanted = tiles >= num_multiprocessors ? 2 * num_multiprocessors : num_multiprocessors;
  stripes.length = divide_up(static_cast<int64_t>(tiles) * units, wanted);
  // Else more than kMaxParts parts, or more of them than the workspace is made for.
  const bool anywhere = (kMaxParts - 1) * stripes.length >= units && 3 * tiles >= num_multiprocessors;
  if (!anywhere) {
    const int parts = num_multiprocessors / tiles;
    stripes.length = divide_up(units, parts < kMaxParts ? parts : kMaxParts);
    if (stripes.length < kMinStripe) stripes.length = kMinStripe < units ? kMinStripe : units;
    stripes.pitch = divide_up(units, stripes.length) * stripes.length;
  }
  stripes.count = divide_up(static_cast<int64_t>(tiles) * stripes.pitch, stripes.length);
  return stripes;
}

// --- the workspace of linear and linear_int4: parts of sums, activations in another order.

// Rows of the smallest tile of linear_int4's kernels that holds max_rows, or of the largest one; and of
// linear's.
FS_HOST_DEVICE constexpr int64_t int4_tile_rows(int64_t max_rows) {
  return max_rows <= 8 ? 8 : max_rows <= 16 ? 16 : max_rows <= 32 ? 32 : max_rows <= 48 ? 48 : 64;
}
FS_HOST_DEVICE constexpr int64_t linear_tile_rows(int64_t max_rows) {
  return max_rows <= 16 ? 16 : max_rows <= 32 ? 32 : 64;
}

// Bytes of the parts of tiles of so many rows. With two stripes on a multiprocessor, each may leave two.
// Several row tiles go side by side only while they are fewer tiles than multiprocessors, and then there are
// at most kMaxParts parts for each.
FS_HOST_DEVICE constexpr int64_t stripes_workspace_bytes(int64_t tile_rows, int num_multiprocessors) {
  return 4 * static_cast<int64_t>(num_multiprocessors) * tile_rows * kStripeColumns * 4;
}

// For up to max_rows rows of `depth` inputs; `reorders`: of which linear_int4 makes a copy in another order.
FS_HOST_DEVICE constexpr int64_t int4_workspace_bytes(int64_t max_rows, int64_t depth,
                                                      int num_multiprocessors, bool reorders) {
  const int64_t ordered = reorders ? max_rows * ((depth + 7) / 8 * 8) * 2 : 0;
  return stripes_workspace_bytes(int4_tile_rows(max_rows), num_multiprocessors) + ordered;
}

}  // namespace fs
