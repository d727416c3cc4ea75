// SPDX-License-Identifier: Apache-2.0
#include "plan/prefix_analysis.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <vector>

#include "core/error.h"

namespace fs {
namespace {

using Prompts = std::vector<std::vector<int32_t>>;

struct Flat {
  explicit Flat(const Prompts& prompts) {
    for (const auto& prompt : prompts) {
      token_ids.insert(token_ids.end(), prompt.begin(), prompt.end());
      starts.push_back(static_cast<int64_t>(token_ids.size()));
    }
  }
  PrefixAnalysis analyse(int block_size) const { return {token_ids, starts, block_size}; }

  std::vector<int32_t> token_ids;
  std::vector<int64_t> starts{0};
};

TEST(PrefixAnalysis, SplitsAtBlockBoundaries) {
  // Five tokens in common are one block of four; the last two prompts share a second block.
  const Flat flat({{1, 2, 3, 4, 5, 9}, {1, 2, 3, 4, 5, 6, 7, 8, 9}, {1, 2, 3, 4, 5, 6, 7, 8, 7}});
  const PrefixAnalysis analysis = flat.analyse(4);
  ASSERT_EQ(analysis.nodes().size(), 2u);
  EXPECT_EQ(analysis.nodes()[0].end, 4);
  EXPECT_EQ(analysis.nodes()[0].num_prompts, 3);
  EXPECT_EQ(analysis.nodes()[1].parent, 0);
  EXPECT_EQ(analysis.nodes()[1].begin, 4);
  EXPECT_EQ(analysis.nodes()[1].end, 8);
  EXPECT_EQ(analysis.order(), (std::vector<int64_t>{0, 1, 2}));
  EXPECT_EQ(analysis.num_computed(), 24 - 4 - 8);
  EXPECT_EQ(analysis.min_computed(), 24 - 5 - 8);
}

TEST(PrefixAnalysis, EqualPromptsComputeOneRowEach) {
  const Flat flat({{1, 2, 3, 4}, {1, 2, 3, 4}, {1, 2, 3, 4}});
  EXPECT_EQ(flat.analyse(1).num_computed(), 6);
  EXPECT_EQ(flat.analyse(1).min_computed(), 6);
  EXPECT_EQ(flat.analyse(4).num_computed(), 12);  // the row's whole block is computed again
  EXPECT_EQ(flat.analyse(2).num_computed(), 8);
}

TEST(PrefixAnalysis, APromptThatIsThePrefixOfOthersGoesFirst) {
  const Flat flat({{1, 2, 3, 4}, {1, 2, 3, 5}, {1, 2}});
  const PrefixAnalysis analysis = flat.analyse(2);
  EXPECT_EQ(analysis.order(), (std::vector<int64_t>{2, 0, 1}));
  EXPECT_EQ(analysis.num_computed(), 6);
}

TEST(PrefixAnalysis, SharesNothingAcrossRoots) {
  const Flat flat({{1, 2, 3}, {1, 2, 3}, {1, 2, 4}});
  const std::vector<int32_t> roots{0, 1, 0};
  const PrefixAnalysis analysis(flat.token_ids, flat.starts, 1, {}, roots);
  EXPECT_EQ(analysis.num_computed(), 9 - 2);
  EXPECT_EQ(analysis.node_of()[1], -1);
}

TEST(PrefixAnalysis, CountsTheDistinctPrefixesOfRandomPrompts) {
  std::mt19937 random(7);
  for (int round = 0; round < 50; ++round) {
    Prompts prompts(1 + random() % 60);
    std::set<std::vector<int32_t>> prefixes, distinct;
    for (auto& prompt : prompts) {
      prompt.resize(1 + random() % 40);
      for (auto& token : prompt) token = static_cast<int32_t>(random() % (1 + round % 3));
      for (size_t end = 1; end <= prompt.size(); ++end)
        prefixes.insert(std::vector<int32_t>(prompt.begin(), prompt.begin() + static_cast<int64_t>(end)));
      distinct.insert(prompt);
    }
    const PrefixAnalysis analysis = Flat(prompts).analyse(1);
    const size_t expected = prefixes.size() + prompts.size() - distinct.size();
    EXPECT_EQ(analysis.min_computed(), static_cast<int64_t>(expected));
    EXPECT_EQ(analysis.num_computed(), analysis.min_computed());
    const SingleLevelGroups groups = analysis.single_level();
    for (size_t i = 0; i < prompts.size(); ++i) {
      if (groups.group[i] >= 0) {
        EXPECT_LE(groups.prefix_length[groups.group[i]], static_cast<int64_t>(prompts[i].size()));
      }
    }
  }
}

TEST(PrefixAnalysis, RefusesWhatDoesNotFit) {
  const std::vector<int32_t> tokens(4, 1);
  const std::vector<int64_t> starts{0, 4}, short_starts{0, 3}, empty_prompt{0, 0, 4}, none;
  EXPECT_THROW(PrefixAnalysis(tokens, short_starts, 1), Error);
  EXPECT_THROW(PrefixAnalysis(tokens, empty_prompt, 1), Error);
  EXPECT_THROW(PrefixAnalysis(tokens, none, 1), Error);
  EXPECT_THROW(PrefixAnalysis(tokens, starts, 0), Error);
  const std::vector<int64_t> negative{-1};
  EXPECT_THROW(PrefixAnalysis(tokens, starts, 1, negative), Error);
}

}  // namespace
}  // namespace fs
