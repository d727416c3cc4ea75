// SPDX-License-Identifier: Apache-2.0
#include "plan/attention_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "core/error.h"

namespace fs {
namespace {

struct Step {
  std::vector<int32_t> query_start{0};
  std::vector<int32_t> seq_lens;
  AttentionPlanOptions options;
  std::vector<PrefixGroup> groups;

  // Tokens that two requests share.
  int32_t common(int32_t a, int32_t b) const {
    int32_t tokens = 0;
    for (const PrefixGroup& group : groups) {
      const auto reads = [&](int32_t r) { return group.request_begin <= r && r < group.request_end; };
      if (reads(a) && reads(b)) tokens = std::max(tokens, group.kv_end);
    }
    return tokens;
  }
  void add(int32_t num_rows, int32_t seq_len) {
    query_start.push_back(query_start.back() + num_rows);
    seq_lens.push_back(seq_len);
  }
  AttentionPlan plan() const { return AttentionPlan(query_start, seq_lens, options, groups); }
};

AttentionPlanOptions options_of(int block_size, int span, int group_size = 1, int num_kv_heads = 1) {
  AttentionPlanOptions options;
  options.block_size = block_size;
  options.span = span;
  options.group_size = group_size;
  options.num_kv_heads = num_kv_heads;
  return options;
}

int pick(std::mt19937& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

Step random_step(uint32_t seed) {
  std::mt19937 random(seed);
  Step step;
  const int block_size = 16 * pick(random, 1, 3);
  step.options =
      options_of(block_size, block_size * pick(random, 1, 4), pick(random, 1, 9), pick(random, 1, 4));
  step.options.window = pick(random, 0, 1) == 0 ? 0 : pick(random, 1, 200);
  step.options.rows_per_item = pick(random, 1, 64);
  step.options.num_workers = pick(random, 1, 32);
  step.options.rows_per_shared_item = pick(random, 1, 200);
  step.options.tokens_per_partial = pick(random, 0, 4);
  step.options.rows_per_token_read = 1 << pick(random, 0, 7);
  step.options.fold_levels = pick(random, 0, 3);
  step.options.rows_per_warp = pick(random, 0, 1) == 0 ? 0 : 16;
  const int num_requests = pick(random, 0, 9);
  if (pick(random, 0, 3) > 0) {
    // Up to four levels: a range of requests shares some tokens, then parts in two.
    const auto add_groups = [&](auto&& self, int begin, int end, int kv_begin, int level) -> void {
      if (end - begin < 2 || level == 4) return;
      const int kv_end = kv_begin + pick(random, 1, 300);
      const bool is_shared = level == 0 || pick(random, 0, 5) > 0;
      if (is_shared) step.groups.push_back({kv_begin, kv_end, begin, end});
      if (!is_shared) return;
      const int middle = pick(random, begin, end);
      self(self, begin, middle, kv_end, level + 1);
      self(self, middle, end, kv_end, level + 1);
    };
    const int begin = pick(random, 0, num_requests);
    add_groups(add_groups, begin, pick(random, begin, num_requests), 0, 0);
  }
  const bool only_decodes = pick(random, 0, 1) == 0;
  for (int b = 0; b < num_requests; ++b) {
    const int num_rows = only_decodes || pick(random, 0, 2) == 0 ? 1 : pick(random, 0, 70);
    step.add(num_rows, num_rows + step.common(b, b) + pick(random, 0, 300));
  }
  return step;
}

int32_t request_of(const Step& step, int32_t row) {
  const auto next = std::upper_bound(step.query_start.begin(), step.query_start.end(), row);
  return static_cast<int32_t>(next - step.query_start.begin()) - 1;
}

// The key tokens that row i of an item reads: what it sees of the item's range.
std::pair<int32_t, int32_t> keys_read(const AttentionItem& item, int32_t i, int32_t window) {
  const int32_t last = item.position + i;
  const int32_t begin = window == 0 ? 0 : std::max(0, last - window + 1);
  return {std::max(item.kv_begin, begin), std::min(item.kv_end, last + 1)};
}

class RandomStep : public testing::TestWithParam<uint32_t> {};

TEST_P(RandomStep, CoversEveryVisiblePairOnce) {
  const Step step = random_step(GetParam());
  const AttentionPlan plan = step.plan();
  std::map<std::pair<int32_t, int32_t>, int> reads;
  for (const AttentionItem& item : plan.items()) {
    ASSERT_GE(item.request, 0);
    ASSERT_LT(item.request, static_cast<int32_t>(step.seq_lens.size()));
    const auto b = static_cast<size_t>(item.request);
    ASSERT_GE(item.row_begin, 0);
    ASSERT_GE(item.num_rows, 1);
    ASSERT_LE(item.row_begin + item.num_rows, step.query_start.back());
    ASSERT_LT(item.kv_begin, item.kv_end);
    ASSERT_LE(item.kv_end, step.seq_lens[b]);
    const int32_t first = request_of(step, item.row_begin);
    const int32_t last = request_of(step, item.row_begin + item.num_rows - 1);
    if (first == last && item.request == first &&
        item.position == step.seq_lens[b] - (step.query_start[b + 1] - item.row_begin)) {
      ASSERT_LE((item.num_rows - 1) * step.options.group_size, step.options.rows_per_item);
    } else {
      // Whole spans of one node, that every row sees all of.
      ASSERT_LE((item.num_rows - 1) * step.options.group_size,
                std::max(step.options.rows_per_item, step.options.rows_per_shared_item));
      for (int32_t r = first; r <= last; ++r) ASSERT_LE(item.kv_end, step.common(item.request, r));
      ASSERT_EQ(item.kv_begin % step.options.span, 0);
      ASSERT_EQ(item.kv_end % step.options.span, 0);
      for (int32_t i = 0; i < item.num_rows; ++i) {
        ASSERT_EQ(keys_read(item, i, step.options.window), std::make_pair(item.kv_begin, item.kv_end));
      }
    }
    for (int32_t i = 0; i < item.num_rows; ++i) {
      const auto [begin, end] = keys_read(item, i, step.options.window);
      for (int32_t key = begin; key < end; ++key) ++reads[{item.row_begin + i, key}];
    }
  }
  size_t num_visible = 0;
  for (size_t b = 0; b < step.seq_lens.size(); ++b) {
    for (int32_t row = step.query_start[b]; row < step.query_start[b + 1]; ++row) {
      const int32_t last = step.seq_lens[b] - (step.query_start[b + 1] - row);
      const int32_t first = step.options.window == 0 ? 0 : std::max(0, last - step.options.window + 1);
      for (int32_t key = first; key <= last; ++key, ++num_visible) {
        const auto found = reads.find({row, key});
        ASSERT_TRUE(found != reads.end() && found->second == 1) << "row " << row << " key " << key;
      }
    }
  }
  EXPECT_EQ(reads.size(), num_visible);
}

TEST_P(RandomStep, StoresEachPartialOnceAndMergesInOrder) {
  const Step step = random_step(GetParam());
  const AttentionPlan plan = step.plan();
  const int32_t span = step.options.span;
  struct Part {
    int32_t row, kv_begin, kv_end;
  };
  std::map<int32_t, Part> written;  // slot -> what it holds
  std::map<int32_t, int> outputs;   // row -> writers of its output
  for (const AttentionItem& item : plan.items()) {
    const int32_t first_span = item.kv_begin / span;
    const int32_t num_spans = (item.kv_end + span - 1) / span - first_span;
    if (item.num_parts == 0) {
      EXPECT_EQ(item.slot, -1);
      for (int32_t i = 0; i < item.num_rows; ++i) ++outputs[item.row_begin + i];
      continue;
    }
    ASSERT_TRUE(item.num_parts == 1 || item.num_parts == num_spans);
    for (int32_t part = 0; part < item.num_parts; ++part) {
      const bool is_last = part + 1 == item.num_parts;
      for (int32_t i = 0; i < item.num_rows; ++i) {
        const Part holds{item.row_begin + i, part == 0 ? item.kv_begin : (first_span + part) * span,
                         is_last ? item.kv_end : (first_span + part + 1) * span};
        ASSERT_TRUE(written.emplace(item.slot + part * item.num_rows + i, holds).second);
      }
    }
  }
  ASSERT_EQ(static_cast<int64_t>(written.size()), plan.num_slots());
  if (!written.empty()) {
    EXPECT_EQ(written.begin()->first, 0);
    EXPECT_EQ(written.rbegin()->first, plan.num_slots() - 1);
  }

  std::map<int32_t, int> merged;
  int32_t next_part = 0;
  for (const AttentionMerge& merge : plan.merges()) {
    EXPECT_EQ(merge.parts_begin, next_part);
    ASSERT_GT(merge.parts_end, merge.parts_begin + 1);
    next_part = merge.parts_end;
    for (int32_t i = 0; i < merge.num_rows; ++i) {
      ++outputs[merge.row_begin + i];
      for (int32_t p = merge.parts_begin; p < merge.parts_end; ++p) {
        const int32_t slot = part_slot(plan.parts()[static_cast<size_t>(p)]) + i;
        ++merged[slot];
        const Part& part = written.at(slot);
        EXPECT_EQ(part.row, merge.row_begin + i);
        if (p == merge.parts_begin) continue;
        // Every part but the first is at most a tree of whole spans, right after the part before it.
        const Part& before = written.at(part_slot(plan.parts()[static_cast<size_t>(p) - 1]) + i);
        EXPECT_EQ(part.kv_begin, before.kv_end);
        EXPECT_EQ(part.kv_begin % span, 0);
        EXPECT_LE(part.kv_end - part.kv_begin, span << step.options.fold_levels);
      }
    }
  }
  EXPECT_EQ(next_part, static_cast<int32_t>(plan.parts().size()));
  EXPECT_EQ(merged.size(), written.size());
  for (const auto& [slot, times] : merged) EXPECT_EQ(times, 1) << "slot " << slot;
  EXPECT_EQ(static_cast<int32_t>(outputs.size()), step.query_start.back());
  for (const auto& [row, times] : outputs) EXPECT_EQ(times, 1) << "row " << row;
}

// A result as a number that tells in which order what has been folded. Nothing is 0 and folds away.
uint64_t fold(uint64_t a, uint64_t b) {
  return a == 0 ? b : b == 0 ? a : a * 0x9e3779b97f4a7c15u + (b ^ b >> 29) * 0xc2b2ae3d27d4eb4fu + 1;
}
uint64_t node(int level, int64_t index, int64_t begin, int64_t end) {
  if (level == 0) return begin <= index && index < end ? static_cast<uint64_t>(index) + 1 : 0;
  return fold(node(level - 1, 2 * index, begin, end), node(level - 1, 2 * index + 1, begin, end));
}
// Spans [begin, end): each 2^levels in a tree, these from left to right.
uint64_t result(int levels, int64_t begin, int64_t end) {
  uint64_t folded = 0;
  for (int64_t tree = begin >> levels; tree << levels < end; ++tree) {
    folded = fold(folded, node(levels, tree, begin, end));
  }
  return folded;
}

TEST_P(RandomStep, FoldsTheSpansOfARowInOneOrder) {
  const Step step = random_step(GetParam());
  const AttentionPlan plan = step.plan();
  const int levels = step.options.fold_levels;
  const int32_t span = step.options.span;
  struct Part {
    int64_t begin, end;
  };
  std::map<int32_t, Part> parts;  // slot -> its spans
  for (const AttentionItem& item : plan.items()) {
    const int32_t begin = item.kv_begin / span, end = (item.kv_end + span - 1) / span;
    for (int32_t p = 0; p < item.num_parts; ++p) {
      for (int32_t i = 0; i < item.num_rows; ++i) {
        parts[item.slot + p * item.num_rows + i] = {begin + p, item.num_parts == 1 ? end : begin + p + 1};
      }
    }
  }
  for (const AttentionMerge& merge : plan.merges()) {
    for (int32_t i = 0; i < merge.num_rows; ++i) {
      std::vector<uint64_t> waiting;
      int64_t begin = 0, end = 0;
      for (int32_t p = merge.parts_begin; p < merge.parts_end; ++p) {
        const int32_t part = plan.parts()[static_cast<size_t>(p)];
        const Part& spans = parts.at(part_slot(part) + i);
        if (p == merge.parts_begin) begin = spans.begin;
        end = spans.end;
        uint64_t mine = result(levels, spans.begin, spans.end);
        for (int left = part_folds(part, static_cast<int>(waiting.size())); left > 0; --left) {
          ASSERT_FALSE(waiting.empty());
          mine = fold(waiting.back(), mine);
          waiting.pop_back();
        }
        waiting.push_back(mine);
        ASSERT_LE(waiting.size(), static_cast<size_t>(levels) + 1);
      }
      EXPECT_EQ(waiting, std::vector<uint64_t>{result(levels, begin, end)});
    }
  }
}

TEST_P(RandomStep, MergesAreSortedAndKnowTheirItems) {
  const AttentionPlan plan = random_step(GetParam()).plan();
  std::vector<int32_t> writers(plan.merges().size(), 0);  // of a merge's rows
  for (const AttentionItem& item : plan.items()) {
    std::pair<int32_t, int32_t> merges{0, 0};  // begin, count
    for (size_t m = 0; m < plan.merges().size() && item.num_parts > 0; ++m) {
      const AttentionMerge& merge = plan.merges()[m];
      if (merge.row_begin + merge.num_rows <= item.row_begin) continue;
      if (item.row_begin + item.num_rows <= merge.row_begin) continue;
      if (merges.second++ == 0) merges.first = static_cast<int32_t>(m);
      ++writers[m];
    }
    EXPECT_EQ(std::make_pair(item.merge_begin, item.num_merges), merges);
    EXPECT_EQ(item.num_parts > 0, item.num_merges > 0);
  }
  int32_t next_row = 0;
  for (size_t m = 0; m < plan.merges().size(); ++m) {
    EXPECT_GE(plan.merges()[m].row_begin, next_row);
    next_row = plan.merges()[m].row_begin + plan.merges()[m].num_rows;
    EXPECT_EQ(plan.merges()[m].num_items, writers[m]);
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomStep, testing::Range(0u, 200u));

TEST(AttentionPlan, EmptyStep) {
  Step step;
  step.options = options_of(16, 64);
  EXPECT_TRUE(step.plan().items().empty());
  step.add(0, 10);
  EXPECT_TRUE(step.plan().items().empty());
  EXPECT_EQ(step.plan().workspace_floats(4, 64), 0);
}

TEST(AttentionPlan, MostWorkFirst) {
  Step step;
  step.options = options_of(16, 512, 3, 3);
  for (int32_t length : {10, 500, 20, 300}) step.add(1, length);
  step.add(16, 200);
  const AttentionPlan plan = step.plan();
  std::vector<int32_t> requests;
  for (const AttentionItem& item : plan.items()) requests.push_back(item.request);
  EXPECT_EQ(requests, (std::vector<int32_t>{4, 1, 3, 2, 0}));
}

TEST(AttentionPlan, CutsOneLongContextForAllWorkers) {
  Step step;
  step.options = options_of(32, 512, 3, 3);
  step.options.num_workers = 2;
  step.add(1, 8192);
  const AttentionPlan plan = step.plan();
  EXPECT_GE(plan.items().size() * 3, 8u);
  EXPECT_EQ(plan.merges().size(), 1u);
  EXPECT_EQ(plan.workspace_floats(9, 64), plan.num_slots() * 9 * 66);
}

TEST(AttentionPlan, LeavesEvenBatchesWhole) {
  Step step;
  step.options = options_of(32, 512, 3, 3);
  step.options.num_workers = 2;
  for (int b = 0; b < 64; ++b) step.add(1, 4096 + b);
  const AttentionPlan plan = step.plan();
  EXPECT_EQ(plan.items().size(), 64u);
  EXPECT_EQ(plan.num_slots(), 0);
}

// A list schedule of the items in their order, with the plan's own prices.
int64_t time_of(const AttentionPlan& plan, const AttentionPlanOptions& prices) {
  std::vector<int64_t> busy_until(prices.num_workers);
  for (const AttentionItem& item : plan.items()) {
    const int64_t rows = int64_t{item.num_rows} * prices.group_size;
    const int64_t read = std::max<int64_t>(rows, prices.rows_per_token_read) * (item.kv_end - item.kv_begin);
    const int64_t stored = item.num_parts * rows * prices.tokens_per_partial * prices.rows_per_token_read;
    for (int head = 0; head < prices.num_kv_heads; ++head) {
      *std::min_element(busy_until.begin(), busy_until.end()) += read + stored;
    }
  }
  return *std::max_element(busy_until.begin(), busy_until.end());
}

// Of a device on which reading a token takes as long as computing 64 rows.
AttentionPlanOptions gpu_options(int group_size, int num_kv_heads, int num_workers) {
  AttentionPlanOptions options = options_of(32, 256, group_size, num_kv_heads);
  options.rows_per_item = options.rows_per_shared_item = 128;
  options.rows_per_warp = 16;
  options.rows_per_token_read = 64;
  options.fold_levels = 2;
  options.num_workers = num_workers;
  return options;
}

TEST(AttentionPlan, StoresPartialsOnlyWhereThatSavesTime) {
  struct Case {
    int num_rows, seq_len, num_requests, num_kv_heads, num_workers;
    int64_t most_partials;  // of a row
  };
  for (const Case& c : {Case{128, 1152, 1, 2, 16, 3},      // 8 units for 16 workers: in two
                        Case{128, 1152, 1, 8, 16, 0},      // enough for all
                        Case{128, 1152, 1, 8, 216, 5},     // far too few: every span on its own
                        Case{512, 8192, 1, 8, 216, 8},     // about as many units as workers
                        Case{2048, 2048, 1, 8, 216, 1},    //
                        Case{64, 4096, 16, 8, 216, 3}}) {  // 256 units for 216: some would have two
    Step step;
    step.options = gpu_options(4, c.num_kv_heads, c.num_workers);
    for (int b = 0; b < c.num_requests; ++b) step.add(c.num_rows, c.seq_len);
    const AttentionPlan plan = step.plan();
    EXPECT_LE(plan.num_slots(), c.most_partials * c.num_requests * c.num_rows)
        << c.num_rows << " " << c.seq_len;
    // Beside the plan that counts partials as free, and the one that cuts nothing.
    const AttentionPlanOptions prices = step.options;
    const int64_t time = time_of(plan, prices);
    step.options.tokens_per_partial = 0;
    EXPECT_LE(plan.num_slots(), step.plan().num_slots());
    EXPECT_LE(time * 10, time_of(step.plan(), prices) * 11) << c.num_rows << " " << c.seq_len;
    step.options.num_workers = 1;
    EXPECT_LE(time * 10, time_of(step.plan(), prices) * 11) << c.num_rows << " " << c.seq_len;
  }
}

// 64 decodes after one system prompt and one of four documents: every token of both is read once.
TEST(AttentionPlan, ReadsEveryLevelOnce) {
  Step step;
  step.options = options_of(32, 256, 3, 3);
  step.groups.push_back({0, 1024, 0, 64});
  for (int32_t d = 0; d < 4; ++d) step.groups.push_back({1024, 1024 + 3072, 16 * d, 16 * (d + 1)});
  for (int32_t b = 0; b < 64; ++b) step.add(1, 4096 + 100);
  const AttentionPlan plan = step.plan();
  EXPECT_EQ(plan.num_tokens_read(), 1024 + 4 * 3072 + 64 * 100);
  EXPECT_GE(plan.num_shared_items(), 5);
  EXPECT_EQ(plan.merges().size(), 64u);
  for (const AttentionItem& item : plan.items()) {
    EXPECT_EQ(item.num_rows > 1, item.kv_end <= 4096);
    EXPECT_TRUE(item.num_rows == 1 || (item.kv_begin < 1024) == (item.kv_end <= 1024));
  }
}

TEST(AttentionPlan, SharesOnlyWhatPaysAndIsLegal) {
  const auto num_shared = [](int32_t shared, int32_t own, int readers, int32_t window) {
    Step step;
    step.options = options_of(32, 256, 4);
    step.options.window = window;
    step.groups.push_back({0, shared, 0, readers});
    for (int b = 0; b < readers; ++b) step.add(1, shared + own);
    return step.plan().num_shared_items();
  };
  EXPECT_GT(num_shared(1024, 64, 8, 0), 0);
  EXPECT_EQ(num_shared(255, 64, 8, 0), 0);      // less than a span
  EXPECT_EQ(num_shared(256, 8192, 2, 0), 0);    // the partials of 8192 tokens cost more
  EXPECT_EQ(num_shared(1024, 64, 1, 0), 0);     // nobody to share with
  EXPECT_EQ(num_shared(1024, 64, 8, 1000), 0);  // the window has left the first tokens behind
  EXPECT_GT(num_shared(1024, 64, 8, 1088), 0);
}

// What does not pay for the parent is offered to its children.
TEST(AttentionPlan, ChildrenReadWhatAParentDoesNotShare) {
  Step step;
  step.options = options_of(32, 256);
  step.groups = {{0, 200, 0, 4}, {200, 1000, 0, 2}};
  for (int b = 0; b < 4; ++b) step.add(1, 1100);
  const AttentionPlan plan = step.plan();
  EXPECT_EQ(plan.num_tokens_read(), 768 + 2 * (1100 - 768) + 2 * 1100);
}

TEST(AttentionPlan, RefusesGroupsThatAreNoTree) {
  const auto message = [](std::vector<PrefixGroup> groups) -> std::string {
    Step step;
    step.options = options_of(16, 32);
    for (int b = 0; b < 4; ++b) step.add(2, 102);
    step.groups = std::move(groups);
    try {
      step.plan();
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message({{0, 100, 0, 4}}), "");
  EXPECT_EQ(message({{0, 32, 2, 5}}), "attention plan: groups[0] has requests 2 to 5 of 4");
  EXPECT_EQ(message({{0, 32, 0, 4}, {48, 64, 0, 2}}),
            "attention plan: groups[1] has KV tokens 48 to 64; must begin where its parent ends, at 32");
  EXPECT_EQ(message({{0, 32, 0, 3}, {32, 64, 2, 4}}),
            "attention plan: groups[1] with requests 2 to 4 is not in depth-first order");
  EXPECT_EQ(
      message({{0, 101, 0, 2}}),
      "attention plan: request 0 shares 101 tokens in groups[0]; its rows begin at token 100 and must come "
      "after them");
}

TEST(AttentionPlan, RefusesWhatDoesNotFit) {
  const auto message = [](const Step& step) -> std::string {
    try {
      step.plan();
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  Step step;
  step.options = options_of(16, 40);
  EXPECT_EQ(message(step), "attention plan: span is 40; must be a multiple of the block size 16");
  step.options = options_of(16, 32);
  step.add(5, 4);
  EXPECT_EQ(message(step), "attention plan: request 0 has 5 query rows and only 4 tokens");
  step.seq_lens = {5, 6};
  EXPECT_NE(message(step).find("query_start has 2 entries for 2 requests"), std::string::npos);
  step.query_start = {0, 5, 3};
  EXPECT_NE(message(step).find("query_start[2] is 3, less than 5"), std::string::npos);
  step.query_start = {1, 5, 6};
  EXPECT_NE(message(step).find("query_start[0] is 1"), std::string::npos);
  step.query_start = {0, 1, 2};
  step.options.window = -1;
  EXPECT_NE(message(step).find("window is -1"), std::string::npos);
  step.options.window = 0;
  step.options.group_size = 0;
  EXPECT_NE(message(step).find("group_size is 0"), std::string::npos);
}

}  // namespace
}  // namespace fs
