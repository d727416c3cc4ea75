// SPDX-License-Identifier: Apache-2.0
#include "layout/swizzle.h"

#include <gtest/gtest.h>

#include <set>

namespace {

constexpr int kRows = 64;

class Swizzle : public testing::TestWithParam<int> {};  // chunks of a row

TEST_P(Swizzle, GivesEveryChunkItsOwnPlaceInItsOwnRow) {
  const int row_chunks = GetParam();
  for (int row = 0; row < kRows; ++row) {
    std::set<int> places;
    for (int chunk = 0; chunk < row_chunks; ++chunk) {
      const int place = fs::swizzled_chunk(row, chunk, row_chunks);
      EXPECT_GE(place, 0);
      EXPECT_LT(place, row_chunks);
      EXPECT_EQ(fs::swizzled_offset(row, chunk, row_chunks), (row * row_chunks + place) * fs::kChunkBytes);
      places.insert(place);
    }
    EXPECT_EQ(places.size(), static_cast<size_t>(row_chunks));
  }
}

TEST_P(Swizzle, OneChunkOfEightNeighbouringRowsLiesInEightDifferentBankGroups) {
  const int row_chunks = GetParam();
  for (int first = 0; first + 8 <= kRows; first += 8) {
    for (int chunk = 0; chunk < row_chunks; ++chunk) {
      std::set<int> groups;
      for (int row = first; row < first + 8; ++row) {
        groups.insert(fs::swizzled_offset(row, chunk, row_chunks) / fs::kChunkBytes % fs::kChunksPerLine);
      }
      EXPECT_EQ(groups.size(), 8u) << "rows from " << first << ", chunk " << chunk;
    }
  }
}

TEST_P(Swizzle, EightNeighbouringChunksOfOneLineLieInEightDifferentBankGroups) {
  const int row_chunks = GetParam();
  for (int index = 0; index < kRows * row_chunks; index += 8) {
    std::set<int> groups;
    for (int i = index; i < index + 8; ++i) {
      groups.insert(fs::swizzled_offset(i / row_chunks, i % row_chunks, row_chunks) / fs::kChunkBytes %
                    fs::kChunksPerLine);
    }
    EXPECT_EQ(groups.size(), 8u) << "chunks from " << index;
  }
}

// A kernel computes a lane's address once and reaches the other chunks of its row by XOR.
TEST_P(Swizzle, StepsAlongARowByXor) {
  const int row_chunks = GetParam();
  for (int row = 0; row < kRows; ++row) {
    for (int low = 0; low < 2; ++low) {
      for (int step = 0; step < row_chunks; step += 2) {
        EXPECT_EQ(fs::swizzled_chunk(row, low + step, row_chunks),
                  fs::swizzled_chunk(row, low, row_chunks) ^ step);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(RowsOf, Swizzle, testing::Values(2, 4, 8, 16, 32));

}  // namespace
