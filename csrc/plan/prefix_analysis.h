// SPDX-License-Identifier: Apache-2.0
//
// Which prompts of a whole batch begin alike: a compressed trie over token ids, made before anything runs,
// and the order in which a batch that is known in advance computes every shared prefix once.
//
// The trie is never built token by token. Prompts are sorted into a depth-first order of it, and the lengths
// that neighbours have in common say the rest: a node is where a run of neighbours agrees. So memory is a few
// words per prompt, whatever its length, tokens are compared once and never copied, and nothing recurses.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fs {

// A prefix that at least two prompts share, cut to whole blocks: tokens [begin, end) of each of them, after
// the tokens of the parent.
struct SharedPrefixNode {
  int64_t parent;  // index of the node that continues here, or -1
  int64_t begin;
  int64_t end;
  int64_t first_place;  // its prompts: order[first_place, first_place + num_prompts)
  int64_t num_prompts;
  int64_t num_children;  // nodes whose parent it is, and prompts whose innermost node it is
};
inline constexpr int kNodeFields = 6;
static_assert(sizeof(SharedPrefixNode) == kNodeFields * sizeof(int64_t));

// What BatchLLM's published procedure makes of the same trie: one level of sharing.
struct SingleLevelGroups {
  std::vector<int64_t> group;          // of each prompt; prompts of an equal number share a prefix; -1: none
  std::vector<int64_t> prefix_length;  // of each group
};

// The batch's prompts one after another: prompt i is token_ids[starts[i], starts[i + 1]).
//
// `block_size`: prefixes are shared in whole blocks; 1 is the token trie. A prompt keeps at least one token
// to compute, since that row gives its first output; where its last block is full, that is a whole block.
// `expected_output`: tokens that each prompt will probably generate, empty for none: siblings are ordered by
// descending share of decodes, sum(expected output) / tokens to compute, so that work that decodes much
// starts early and later chunks of prompts find decodes to ride with (BatchLLM, Zheng et al. 2024).
// `roots`: prompts share only with prompts of the same root; empty: all may share.
//
// O(tokens) comparisons, sixteen tokens at a time, and O(prompts log prompts) per level that parts them.
// Throws fs::Error for lengths that do not fit.
class PrefixAnalysis {
 public:
  PrefixAnalysis(std::span<const int32_t> token_ids, std::span<const int64_t> starts, int block_size,
                 std::span<const int64_t> expected_output = {}, std::span<const int32_t> roots = {});

  // Place -> prompt: depth-first, so that the prompts of every node are neighbours.
  const std::vector<int64_t>& order() const { return order_; }
  // A parent before its children, in the order of their first prompts.
  const std::vector<SharedPrefixNode>& nodes() const { return nodes_; }
  // The innermost node of each prompt, or -1.
  const std::vector<int64_t>& node_of() const { return node_of_; }

  int64_t num_tokens() const { return num_tokens_; }
  // Tokens that have to be computed when every prefix is computed once: in whole blocks as `nodes()` has
  // them, and at best, with every common token shared, whatever the block.
  int64_t num_computed() const { return num_computed_; }
  int64_t min_computed() const { return min_computed_; }

  // BatchLLM's enlargement of the first level (Zheng et al. 2024): bottom up, a grandchild g moves out
  // of its parent c, with a copy of c's tokens, where (prompts(g) - 1) * length(g) > length(c).
  SingleLevelGroups single_level() const;

 private:
  void sort(std::span<const int32_t> token_ids, std::span<const int64_t> starts,
            std::span<const int32_t> roots);
  void build(std::span<const int64_t> starts, int block_size);
  void arrange(std::span<const int64_t> starts, std::span<const int64_t> expected_output);

  int64_t num_tokens_ = 0;
  int64_t num_computed_ = 0;
  int64_t min_computed_ = 0;
  std::vector<int64_t> order_;
  std::vector<int64_t> common_;  // [place]: tokens in common with the place before
  // The trie while it is made: leaves are places, node v is number_of_prompts + v, the root is node 0.
  std::vector<int64_t> parent_;
  std::vector<int64_t> depth_;      // of nodes, in tokens
  std::vector<int64_t> postorder_;  // nodes, children first; the root is last
  std::vector<SharedPrefixNode> nodes_;
  std::vector<int64_t> node_of_;
};

}  // namespace fs
