// SPDX-License-Identifier: Apache-2.0
#include "layout/int8_fragment.h"

#include <gtest/gtest.h>

#include <vector>

namespace fs {
namespace {

TEST(Int8Fragment, EveryCodeHasAPlaceOfItsOwn) {
  std::vector<int> uses(kInt8CodeBytes);
  for (int64_t row = 0; row < kInt8Rows; ++row) {
    for (int64_t k = 0; k < kInt8Depth; ++k) {
      const int64_t byte = int8_code_byte(row, k);
      ASSERT_GE(byte, 0);
      ASSERT_LT(byte, kInt8CodeBytes);
      ++uses[static_cast<size_t>(byte)];
      const Int8Weight found = int8_weight(byte);
      ASSERT_EQ(found.row, row);
      ASSERT_EQ(found.k, k);
    }
  }
  for (const int count : uses) ASSERT_EQ(count, 1);
}

// Operand b of a 16 x 8 block, in lane 4 g + t: b0 rows 2t 2t+1 of column g, b1 the same 8 rows further.
// Bytes 0 and 2 of a lane's word are b0, bytes 1 and 3 are b1.
TEST(Int8Fragment, BytesAreOperandsOfTensorCores) {
  for (int64_t step = 0; step < 4; ++step) {
    for (int64_t lane = 0; lane < 32; ++lane) {
      for (int64_t block = 0; block < 4; ++block) {
        for (int64_t byte = 0; byte < 4; ++byte) {
          const Int8Weight found = int8_weight(step * 512 + lane * 16 + block * 4 + byte);
          EXPECT_EQ(found.row, 8 * block + lane / 4);
          EXPECT_EQ(found.k, 16 * step + lane % 4 * 2 + byte / 2 + byte % 2 * 8);
        }
      }
    }
  }
}

// A lane's sums of a 16 x 8 block are of the columns 2t and 2t+1: their scales are one word of its 16 bytes.
TEST(Int8Fragment, ScalesAreThoseOfALanesSums) {
  for (int64_t row = 0; row < kInt8Rows; ++row) {
    const int64_t place = int8_scale_place(row);
    EXPECT_EQ(int8_scale_row(place), row);
    EXPECT_EQ(place / 8, row % 8 / 2);  // lane % 4
    EXPECT_EQ(place % 8 / 2, row / 8);  // block
    EXPECT_EQ(place % 2, row % 2);
  }
}

TEST(Int8Fragment, PanelsHoldWholeStages) {
  EXPECT_EQ(int8_num_panels(33), 2);
  EXPECT_EQ(int8_panel_bytes(65), 2 * kInt8StageBytes);
  EXPECT_EQ(kInt8StageBytes % 16, 0);
}

}  // namespace
}  // namespace fs
