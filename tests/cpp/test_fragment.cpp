// SPDX-License-Identifier: Apache-2.0
#include "layout/fragment.h"

#include <gtest/gtest.h>

#include <vector>

namespace fs {
namespace {

TEST(Fragment, EveryWeightHasAPlaceOfItsOwn) {
  for (const auto& [rows, depth] : {std::pair{32, 16}, {1, 1}, {33, 17}, {64, 48}, {95, 100}}) {
    const int64_t size = (rows + 31) / 32 * fragment_depth(depth) * kFragmentRows;
    std::vector<int> uses(static_cast<size_t>(size));
    for (int64_t n = 0; n < (rows + 31) / 32 * 32; ++n) {
      for (int64_t k = 0; k < fragment_depth(depth); ++k) {
        const int64_t at = fragment_offset(n, k, depth);
        ASSERT_GE(at, 0);
        ASSERT_LT(at, size);
        ++uses[static_cast<size_t>(at)];
      }
    }
    for (const int count : uses) ASSERT_EQ(count, 1);
  }
}

// The operand b of a 16 x 8 product: lane 4 g + t holds rows 2t, 2t+1 and 2t+8, 2t+9 of column g.
TEST(Fragment, ALaneReadsItsOwnOperandsInOnePiece) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int product = 0; product < 4; ++product) {
      const int64_t first = fragment_offset(8 * product + g, 2 * t, 16);
      EXPECT_EQ(first, product / 2 * 256 + lane * 8 + product % 2 * 4);
      EXPECT_EQ(fragment_offset(8 * product + g, 2 * t + 1, 16), first + 1);
      EXPECT_EQ(fragment_offset(8 * product + g, 2 * t + 8, 16), first + 2);
      EXPECT_EQ(fragment_offset(8 * product + g, 2 * t + 9, 16), first + 3);
    }
  }
}

}  // namespace
}  // namespace fs
