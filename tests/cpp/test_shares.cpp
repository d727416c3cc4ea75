// SPDX-License-Identifier: Apache-2.0
//
// Work in shares: every unit once, a worker's own ones first and in their order, others' when it is done.
#define FS_ISA portable
#include "cpu/shares.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "core/thread_pool.h"
#include "cpu/panel_shares.h"

namespace fs::FS_ISA {
namespace {

class SharesOfThreads : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    before_ = pool().num_threads();
    set_num_threads(GetParam());
  }
  void TearDown() override { set_num_threads(before_); }

 private:
  int before_ = 1;
};

INSTANTIATE_TEST_SUITE_P(Threads, SharesOfThreads, testing::Values(1, 2, 3, 8, 70));

template <Shares::Amount kAmount>
void expect_every_unit_once(int64_t count) {
  std::vector<int> taken(static_cast<size_t>(count), 0);  // not atomic: one thread for a unit, then a join
  Shares shares(count);
  shares.run([&](int worker) {
    Span units;
    while (shares.claim<kAmount>(worker, &units)) {
      EXPECT_GT(units.size(), 0);
      for (int64_t unit = units.begin; unit < units.end; ++unit) ++taken[static_cast<size_t>(unit)];
    }
  });
  EXPECT_EQ(taken, std::vector<int>(static_cast<size_t>(count), 1));
}

TEST_P(SharesOfThreads, EveryUnitIsTakenOnce) {
  for (const int64_t count : {1, 2, 7, 64, 1000}) {
    for (int repeat = 0; repeat < 20; ++repeat) {
      expect_every_unit_once<Shares::kOne>(count);
      expect_every_unit_once<Shares::kHalf>(count);
    }
  }
}

TEST_P(SharesOfThreads, AWorkerTakesItsOwnInOrderAndThenTheEndsOfOthers) {
  const int threads = GetParam();
  if (threads > 8) return;  // more workers than shares have some in common
  Shares shares(10 * threads);
  const int worker = threads - 1;
  Span units;
  for (int64_t i = 0; i < 10; ++i) {
    ASSERT_TRUE(shares.claim<Shares::kOne>(worker, &units));
    EXPECT_EQ(units.begin, 10 * worker + i);
    EXPECT_EQ(units.size(), 1);
  }
  if (threads == 1) {
    EXPECT_FALSE(shares.claim<Shares::kOne>(worker, &units));
    return;
  }
  for (const int64_t begin : {5, 2, 1, 0}) {  // halves of [0, 10), the larger ones
    ASSERT_TRUE(shares.claim<Shares::kHalf>(worker, &units));
    EXPECT_EQ(units.begin, begin);
  }
}

// One worker never comes: the other does all.
TEST(Shares, NobodyWaitsForAWorkerThatIsLate) {
  const int before = pool().num_threads();
  set_num_threads(2);
  Shares shares(101);
  std::vector<int> taken(101, 0);
  Span units;
  while (shares.claim<Shares::kHalf>(1, &units)) {
    for (int64_t unit = units.begin; unit < units.end; ++unit) ++taken[static_cast<size_t>(unit)];
  }
  EXPECT_EQ(taken, std::vector<int>(101, 1));
  EXPECT_FALSE(shares.claim<Shares::kOne>(0, &units));
  set_num_threads(before);
}

TEST_P(SharesOfThreads, PanelsAndTokensAreWalkedOnce) {
  for (const int64_t num_panels : {1, 5, 18}) {
    for (const int64_t unit : {1, 2}) {
      for (const int64_t num_tokens : {1, 32, 33, 300}) {
        for (const int64_t num_blocks : {1, 3}) {
          const int64_t tiles = (num_tokens + 31) / 32, blocks = num_blocks < tiles ? num_blocks : tiles;
          std::vector<std::atomic<int>> seen(static_cast<size_t>(num_panels * num_tokens));
          PanelShares shares({num_panels, unit}, {num_tokens, 32, blocks});
          shares.run([&](int worker) {
            PanelShares::Walk walk(shares, worker);
            int64_t panel = 0;
            Span tokens{0, 0};
            while (walk.next(&panel, &tokens)) {
              EXPECT_EQ(tokens.begin % 32, 0);
              EXPECT_LE(tokens.size(), shares.most_tokens());
              for (int64_t t = tokens.begin; t < tokens.end; ++t) {
                ++seen[static_cast<size_t>(panel * num_tokens + t)];
              }
            }
          });
          for (const auto& count : seen) EXPECT_EQ(count, 1);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fs::FS_ISA
