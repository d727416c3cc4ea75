// SPDX-License-Identifier: Apache-2.0
#include "plan/prefix_groups.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "core/error.h"

namespace fs {
namespace {

using Table = std::vector<int32_t>;

PrefixGroups find(const std::vector<Table>& tables, const std::vector<int32_t>& counts, int block_size = 1) {
  size_t width = 0;
  for (const Table& table : tables) width = std::max(width, table.size());
  std::vector<int32_t> flat;
  for (const Table& table : tables) {
    flat.insert(flat.end(), table.begin(), table.end());
    flat.resize(flat.size() + width - table.size(), -1);
  }
  return find_prefix_groups(flat, static_cast<int64_t>(width), counts, block_size);
}

std::vector<std::vector<int32_t>> fields(const std::vector<PrefixGroup>& groups) {
  std::vector<std::vector<int32_t>> rows;
  for (const PrefixGroup& g : groups) rows.push_back({g.kv_begin, g.kv_end, g.request_begin, g.request_end});
  return rows;
}

TEST(PrefixGroups, FindsLevels) {
  // The first and the third go on together after what all share.
  const PrefixGroups found = find({{5, 6, 7, 8}, {5, 6, 9}, {5, 6, 7, 1}}, {4, 3, 4}, 16);
  EXPECT_EQ(found.order, (std::vector<int32_t>{2, 0, 1}));
  EXPECT_EQ(fields(found.groups), (std::vector<std::vector<int32_t>>{{0, 32, 0, 3}, {32, 48, 0, 2}}));
}

TEST(PrefixGroups, LeavesRequestsInOrderWhereNobodyShares) {
  const PrefixGroups found = find({{9}, {3}, {7, 2}}, {1, 1, 2});
  EXPECT_EQ(found.order, (std::vector<int32_t>{0, 1, 2}));
  EXPECT_TRUE(found.groups.empty());
  EXPECT_TRUE(find({}, {}).order.empty());
}

TEST(PrefixGroups, SharesOnlyWhatMayBeShared) {
  EXPECT_EQ(fields(find({{1, 2, 3}, {1, 2, 3}}, {2, 3}).groups),
            (std::vector<std::vector<int32_t>>{{0, 2, 0, 2}}));
  EXPECT_TRUE(find({{1, 2, 3}, {1, 2, 3}}, {0, 3}).groups.empty());
}

class RandomTables : public testing::TestWithParam<uint32_t> {};

// Any two requests share exactly the tokens of the groups that both read, by brute force; and the groups are
// a tree in depth-first order.
TEST_P(RandomTables, AgreesWithEveryPair) {
  std::mt19937 random(GetParam());
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  std::map<Table, int32_t> blocks;  // path of choices -> block
  std::vector<Table> tables;
  std::vector<int32_t> counts;
  const int num_requests = pick(0, 12);
  const int stride = pick(1, 20);  // blocks between two choices
  for (int b = 0; b < num_requests; ++b) {
    Table path, table;
    const int length = pick(0, 60);
    for (int i = 0; i < length; ++i) {
      path.push_back(i % stride == 0 ? pick(0, 1) : 0);
      table.push_back(blocks.emplace(path, static_cast<int32_t>(blocks.size())).first->second);
    }
    counts.push_back(pick(0, length));
    tables.push_back(table);
  }
  const PrefixGroups found = find(tables, counts);
  std::vector<int32_t> sorted = found.order;
  std::sort(sorted.begin(), sorted.end());
  for (int b = 0; b < num_requests; ++b) ASSERT_EQ(sorted[static_cast<size_t>(b)], b);

  for (int32_t i = 0; i < num_requests; ++i) {
    for (int32_t j = i + 1; j < num_requests; ++j) {
      const auto a = static_cast<size_t>(found.order[static_cast<size_t>(i)]);
      const auto b = static_cast<size_t>(found.order[static_cast<size_t>(j)]);
      int32_t want = 0;
      while (want < std::min(counts[a], counts[b]) &&
             tables[a][static_cast<size_t>(want)] == tables[b][static_cast<size_t>(want)]) {
        ++want;
      }
      int32_t got = 0;
      for (const PrefixGroup& group : found.groups) {
        if (group.request_begin > i || group.request_end <= j) continue;
        EXPECT_EQ(group.kv_begin, got);  // a parent before its children, and no gap
        got = group.kv_end;
      }
      ASSERT_EQ(got, want) << "requests " << a << " and " << b;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomTables, testing::Range(0u, 200u));

TEST(PrefixGroups, RefusesCountsThatDoNotFit) {
  EXPECT_THROW(find({{1, 2}, {1}}, {3, 1}), Error);
  EXPECT_THROW(find({{1, 2}, {1}}, {2, -1}), Error);
  EXPECT_THROW(find_prefix_groups(Table{1, 2, 3}, 2, Table{1, 1}, 16), Error);
}

}  // namespace
}  // namespace fs
