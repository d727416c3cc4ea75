// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <string>
#include <vector>

#include "kv/block_pool.h"

namespace fs {
namespace {

template <class Function>
std::string error_of(Function function) {
  try {
    function();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(BlockPool, StartsWithEveryBlockFree) {
  BlockPool pool(4);
  EXPECT_EQ(pool.num_blocks(), 4);
  EXPECT_EQ(pool.num_free(), 4);
  EXPECT_EQ(pool.num_used(), 0);
  EXPECT_EQ(pool.num_evictable(), 0);
  pool.check();
}

TEST(BlockPool, GivesOutEachBlockOnce) {
  BlockPool pool(4);
  std::set<int> ids;
  for (int i = 0; i < 4; ++i) ids.insert(pool.allocate());
  EXPECT_EQ(ids, (std::set<int>{0, 1, 2, 3}));
  EXPECT_EQ(pool.num_used(), 4);
  pool.check();
}

TEST(BlockPool, AnAllocatedBlockHasOneReference) {
  BlockPool pool(4);
  EXPECT_EQ(pool.ref_count(pool.allocate()), 1);
}

TEST(BlockPool, ThrowsOutOfBlocksWithTheCountsWhenNothingIsFree) {
  BlockPool pool(2);
  pool.allocate();
  pool.allocate();
  EXPECT_THROW(pool.allocate(), OutOfBlocks);
  EXPECT_EQ(error_of([&] { pool.allocate(); }), "out of KV blocks: 0 of 2 are free, 2 used, 0 evictable");
  pool.check();
}

TEST(BlockPool, AnUncachedBlockIsFreeAfterItsLastUnref) {
  BlockPool pool(4);
  const int id = pool.allocate();
  pool.ref(id);
  pool.unref(id);
  EXPECT_EQ(pool.num_free(), 3);
  pool.unref(id);
  EXPECT_EQ(pool.num_free(), 4);
  EXPECT_EQ(pool.ref_count(id), 0);
  pool.check();
}

TEST(BlockPool, TheLastFreedBlockIsGivenOutNext) {
  BlockPool pool(4);
  const int first = pool.allocate();
  pool.allocate();
  pool.unref(first);
  EXPECT_EQ(pool.allocate(), first);
}

TEST(BlockPool, RefusesUnrefOfAnUnreferencedBlock) {
  BlockPool pool(4);
  EXPECT_EQ(error_of([&] { pool.unref(2); }), "unref of block 2, which has no references (it is free)");
  pool.check();
}

TEST(BlockPool, RefusesRefOfAFreeBlock) {
  BlockPool pool(4);
  EXPECT_EQ(error_of([&] { pool.ref(2); }),
            "ref of block 2, which is free: allocate() gives out free blocks");
  EXPECT_EQ(pool.ref_count(2), 0);
  pool.check();
}

TEST(BlockPool, RefusesIdsOutsideThePool) {
  BlockPool pool(4);
  for (int id : {-1, 4, 1 << 30}) {
    const std::string expected = "block id must be in [0, 4), got " + std::to_string(id);
    EXPECT_EQ(error_of([&] { pool.ref(id); }), expected);
    EXPECT_EQ(error_of([&] { pool.unref(id); }), expected);
    EXPECT_EQ(error_of([&] { pool.ref_count(id); }), expected);
    EXPECT_EQ(error_of([&] { pool.is_cached(id); }), expected);
  }
}

TEST(BlockPool, RefusesToBeEmpty) {
  EXPECT_EQ(error_of([] { BlockPool pool(0); }), "BlockPool: num_blocks must be > 0, got 0");
  EXPECT_EQ(error_of([] { BlockPool pool(-3); }), "BlockPool: num_blocks must be > 0, got -3");
}

TEST(BlockPool, AgreesWithANaiveModelOnRandomOperations) {
  for (unsigned seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    BlockPool pool(8);
    std::vector<int> ref_counts(8, 0);
    std::vector<int> free = {7, 6, 5, 4, 3, 2, 1, 0};  // last one next
    for (int step = 0; step < 500; ++step) {
      const int id = static_cast<int>(random() % 8);
      switch (random() % 4) {
        case 0:
        case 1:
          if (free.empty()) {
            EXPECT_THROW(pool.allocate(), OutOfBlocks);
          } else {
            ASSERT_EQ(pool.allocate(), free.back());
            ref_counts[free.back()] = 1;
            free.pop_back();
          }
          break;
        case 2:
          if (ref_counts[id] == 0) {
            EXPECT_THROW(pool.ref(id), Error);
          } else {
            pool.ref(id);
            ++ref_counts[id];
          }
          break;
        case 3:
          if (ref_counts[id] == 0) {
            EXPECT_THROW(pool.unref(id), Error);
          } else {
            pool.unref(id);
            if (--ref_counts[id] == 0) free.push_back(id);
          }
          break;
      }
      pool.check();
      ASSERT_EQ(pool.num_free(), static_cast<int>(free.size()));
      ASSERT_EQ(pool.num_used(), 8 - static_cast<int>(free.size()));
      for (int block = 0; block < 8; ++block) ASSERT_EQ(pool.ref_count(block), ref_counts[block]);
    }
  }
}

}  // namespace
}  // namespace fs
