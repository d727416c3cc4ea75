// SPDX-License-Identifier: Apache-2.0
//
// Which requests of a step share which KV: the tree of their common prefixes, found from their block tables.
//
// Two requests share a token's KV exactly if their tables name the same block for it. So the tables alone say
// it all: whether a block came from the prefix tree does not matter, and an equal copy elsewhere does not
// count.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fs {

// One node of the tree: KV tokens that all its readers have in the same blocks, after the tokens of its
// parent.
struct PrefixGroup {
  int32_t kv_begin;  // tokens [kv_begin, kv_end) of each reader
  int32_t kv_end;
  int32_t request_begin;  // readers: requests [request_begin, request_end), in depth-first order
  int32_t request_end;
};
inline constexpr int kGroupFields = 4;
static_assert(sizeof(PrefixGroup) == kGroupFields * sizeof(int32_t));

struct PrefixGroups {
  std::vector<int32_t> order;  // order[i]: the request in place i, such that readers of a node are neighbours
  std::vector<PrefixGroup> groups;  // a parent before its children; only nodes of two readers or more
};

// Request b may share the first num_shareable[b] of its blocks, block_tables[b * row_length ...]: those that
// it only reads in this step. Where nobody shares, requests stay in their order. Equal requests keep theirs.
// O(blocks compared + requests * levels * log(requests)); blocks are compared 16 at a time.
// Throws fs::Error if a count is negative or exceeds row_length.
PrefixGroups find_prefix_groups(std::span<const int32_t> block_tables, int64_t row_length,
                                std::span<const int32_t> num_shareable, int block_size);

}  // namespace fs
