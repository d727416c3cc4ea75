// SPDX-License-Identifier: Apache-2.0
#include "layout/int4_fragment.h"

#include <gtest/gtest.h>

#include <vector>

namespace fs {
namespace {

TEST(Int4Fragment, EveryCodeHasAPlaceOfItsOwn) {
  for (const int64_t depth : {64, 128, 576}) {
    std::vector<int> uses(static_cast<size_t>(depth * kInt4Rows));
    for (int64_t row = 0; row < kInt4Rows; ++row) {
      for (int64_t k = 0; k < depth; ++k) {
        const Int4Place place = int4_place(row, k);
        const int64_t nibble = place.byte * 2 + place.shift / 4;
        ASSERT_EQ(place.byte % 4, 0);
        ASSERT_GE(nibble, 0);
        ASSERT_LT(nibble, depth * kInt4Rows);
        ++uses[static_cast<size_t>(nibble)];
      }
    }
    for (const int count : uses) ASSERT_EQ(count, 1);
  }
}

TEST(Int4Fragment, UnpackingIsTheInverse) {
  for (int64_t row = 0; row < kInt4Rows; ++row) {
    for (int64_t k = 0; k < 192; ++k) {
      const Int4Weight found = int4_weight(int4_place(row, k));
      ASSERT_EQ(found.row, row);
      ASSERT_EQ(found.k, k);
    }
  }
  for (int64_t row = 0; row < kInt4Rows; ++row) ASSERT_EQ(int4_scale_row(int4_scale_place(row)), row);
  for (int64_t place = 0; place < kInt4Rows; ++place) {
    ASSERT_EQ(int4_scale_place(int4_scale_row(place)), place);
  }
}

// Operand a of a 16 x 16 block, in lane 4 g + t: a[0] row g, columns 2t 2t+1; a[1] row g + 8; a[2] and a[3]
// the same 8 columns further. Masked with 0x000f000f and 0x00f000f0, a lane's word gives a[0] and a[1];
// shifted by 8, a[2] and a[3].
TEST(Int4Fragment, MasksLeaveOperandsOfTensorCores) {
  for (int64_t lane = 0; lane < 32; ++lane) {
    for (int64_t step = 0; step < 2; ++step) {
      for (int64_t block = 0; block < 2; ++block) {
        const int64_t byte = lane * 16 + step * 8 + block * 4;
        for (int i = 0; i < 4; ++i) {
          const int mask_shift = i % 2 * 4 + i / 2 * 8;
          for (int low = 0; low < 2; ++low) {
            const Int4Weight found = int4_weight({byte, mask_shift + 16 * low});
            EXPECT_EQ(found.row, 16 * block + lane / 4 + i % 2 * 8);
            EXPECT_EQ(found.k, 16 * step + lane % 4 * 2 + low + i / 2 * 8);
          }
        }
      }
    }
  }
}

// A lane's scales, rows g, g + 8, g + 16 and g + 24, are neighbours.
TEST(Int4Fragment, ALaneReadsItsScalesInOnePiece) {
  for (int64_t g = 0; g < 8; ++g) {
    for (int64_t i = 0; i < 4; ++i) EXPECT_EQ(int4_scale_place(g + 8 * i), 4 * g + i);
  }
}

TEST(Int4Fragment, PanelsHoldWhatTheyMust) {
  const Int4Layout layout = int4_layout(4096, 4096, 128, Int4Form::symmetric);
  EXPECT_EQ(layout.num_panels * layout.panel_bytes(), 4096 * 4096 / 2 + 4096 * 32 * 2);
  for (const Int4Form form : {Int4Form::symmetric, Int4Form::zero_points, Int4Form::minimums}) {
    for (const int64_t depth : {8, 64, 200, 4096}) {
      for (const int64_t group : {32, 64, 96, 128, 256, 8192}) {
        const Int4Layout any = int4_layout(33, depth, group, form);
        EXPECT_EQ(any.num_panels, 2);
        EXPECT_EQ(any.panel_bytes() % 16, 0);
        EXPECT_GE(any.code_bytes, depth * 16);
        if (any.group_size == 0) {
          EXPECT_GE(group, depth);
          EXPECT_EQ(any.num_groups, 1);
        } else {
          EXPECT_EQ(group % any.group_size, 0);
          EXPECT_GE(any.num_groups * any.group_size, depth);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fs
