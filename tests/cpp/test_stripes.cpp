// SPDX-License-Identifier: Apache-2.0
#include "layout/stripes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace fs {
namespace {

// Walks all stripes as the kernel does and notes who computes which unit.
TEST(Stripes, EveryUnitIsComputedOnceInPartsOfItsColumnTile) {
  for (const int multiprocessors : {1, 2, 3, 8, 36, 72, 84, 108, 132, 170}) {
    for (const int tiles : {1, 2, 3, 5, 8, 32, 48, 64, 96, 107, 108, 109, 224, 500}) {
      for (const int units : {1, 2, 3, 5, 7, 12, 32, 112}) {
        const Stripes s = make_stripes(tiles * kStripeColumns, units * kStripeDepth, multiprocessors);
        ASSERT_EQ(s.num_column_tiles, tiles);
        ASSERT_EQ(s.units, units);
        std::vector<int> uses(static_cast<size_t>(tiles * units));
        int longest = 0;
        for (int tile = 0; tile < tiles; ++tile) {
          ASSERT_LE(s.num_parts(tile), kMaxParts);
          ASSERT_GE(s.num_parts(tile), 1);
          int at = 0;
          for (int part = 0; part < s.num_parts(tile); ++part) {
            const int begin = s.part_begin(tile, part), end = s.part_end(tile, part);
            ASSERT_EQ(begin, at) << tiles << " x " << units << " on " << multiprocessors;
            ASSERT_LT(begin, end);
            const int middle = part_middle(begin, end);
            ASSERT_LT(begin, middle);
            ASSERT_LE(middle, end);
            longest = std::max(longest, end - begin);
            ASSERT_LT(s.first_stripe(tile) + part, s.count);
            for (int unit = begin; unit < end; ++unit) ++uses[static_cast<size_t>(tile * units + unit)];
            at = end;
          }
          ASSERT_EQ(at, units);
        }
        ASSERT_LE(longest, s.length);
        for (const int count : uses) ASSERT_EQ(count, 1);
        ASSERT_LE(s.count, 2 * multiprocessors);
        // What the workspace has room for: a stripe leaves one part if it lies in one column tile, else two.
        const int parts_per_stripe = s.pitch % s.length == 0 ? 1 : 2;
        ASSERT_LE(s.count * parts_per_stripe, 4 * multiprocessors);
        for (int row_tiles = 2; row_tiles * tiles < multiprocessors; ++row_tiles) {
          ASSERT_LE(row_tiles * s.count * parts_per_stripe, 4 * multiprocessors);
        }
      }
    }
  }
}

// Share of the multiprocessors' time that is used when each does its stripes, and the parts of a column tile:
// the layers of Llama 3 8B.
TEST(Stripes, LayersOfAnEightBillionModelAreWellBalanced) {
  struct Layer {
    int64_t depth, columns;
  };
  for (const int multiprocessors : {72, 108, 132}) {
    for (const Layer layer : {Layer{4096, 6144}, {4096, 4096}, {4096, 28672}, {14336, 4096}}) {
      const Stripes s = make_stripes(layer.columns, layer.depth, multiprocessors);
      const int per_multiprocessor = (s.count + multiprocessors - 1) / multiprocessors;
      const double used = static_cast<double>(s.num_column_tiles) * s.units /
                          (static_cast<double>(s.length) * per_multiprocessor * multiprocessors);
      EXPECT_GE(used, 0.86) << layer.depth << " x " << layer.columns << " on " << multiprocessors;
    }
  }
}

// The longest chain of additions that puts the parts of an output together: the layers of Llama 3 8B and 70B.
TEST(Stripes, AtMostThreeAdditionsFollowOneAnotherInLargeModels) {
  struct Layer {
    int64_t depth, columns;
  };
  for (const int multiprocessors : {108, 132, 148}) {
    for (const Layer layer : {Layer{4096, 6144},
                              {4096, 4096},
                              {4096, 28672},
                              {14336, 4096},
                              {8192, 10240},
                              {8192, 8192},
                              {8192, 57344},
                              {28672, 8192}}) {
      const Stripes s = make_stripes(layer.columns, layer.depth, multiprocessors);
      for (int tile = 0; tile < s.num_column_tiles; ++tile) {
        EXPECT_LE(s.num_parts(tile) - 1, 3)
            << layer.depth << " x " << layer.columns << " on " << multiprocessors << ", column tile " << tile;
      }
    }
  }
}

TEST(Stripes, WorkspaceGrowsWithRows) {
  int64_t last = 0;
  for (int64_t rows = 0; rows < 200; ++rows) {
    const int64_t bytes = int4_workspace_bytes(rows, 100, 8, true);
    EXPECT_GE(bytes, last);
    EXPECT_EQ(bytes % 16, 0);
    last = bytes;
  }
}

}  // namespace
}  // namespace fs
