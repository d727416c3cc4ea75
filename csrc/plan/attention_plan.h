// SPDX-License-Identifier: Apache-2.0
//
// AttentionPlan: one step's attention as a list of work items. Made once per step on the host, used by every
// layer. Integers only.
//
// An item is: some query rows x a range of KV tokens x one causal offset. A prefill chunk, a decode, a piece
// of a long context and a prefix that many requests share differ only in their numbers. The kernel runs every
// item once per KV head.
//
// Same results for every plan: KV is cut into spans, whole multiples of `span` tokens counted from position
// 0. The kernel computes the partial (maximum, sum, output) of each span from nothing and folds the partials
// with one fixed arithmetic in one fixed order: 2^fold_levels spans in a binary tree over their numbers, and
// these groups from left to right. So it makes no difference to a single bit whether one item walks all spans
// of a row or several items share them; the plan is free to cut for balance. For the same reason rows of
// several requests may share an item over the whole spans of KV that they have in common.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "layout/host_device.h"
#include "plan/prefix_groups.h"

namespace fs {

// One row of the `items` tensor that the attention op takes.
struct AttentionItem {
  int32_t row_begin;  // first query row (token) in the step's flat batch
  int32_t num_rows;
  int32_t kv_begin;  // KV tokens [kv_begin, kv_end) of `request`
  int32_t kv_end;
  int32_t position;   // row i of the item sees KV tokens up to and including position + i
  int32_t request;    // row of the block table; where rows are of several requests, any of them
  int32_t slot;       // first workspace slot, or -1: no other item has these rows, write the output
  int32_t num_parts;  // 0: write the output; 1: the folded partial of all spans in [kv_begin, kv_end), legal
                      // only for a node of a tree and where the fold of these rows begins; else one partial
                      // for each of the spans. Part p of row i lies in slot + p * num_rows + i.
  int32_t merge_begin;  // merges [merge_begin, merge_begin + num_merges) read these partials; 0 and 0 if none
  int32_t num_merges;
};
inline constexpr int kItemFields = 10;
static_assert(sizeof(AttentionItem) == kItemFields * sizeof(int32_t));

// One row of the `merges` tensor: output rows that are the fold of several partials. Merges are sorted by
// row, and no row lies in two of them.
struct AttentionMerge {
  int32_t row_begin;
  int32_t num_rows;
  int32_t parts_begin;  // parts[parts_begin, parts_end): slot of the first row's partials, in the order of
  int32_t parts_end;    // their spans; the partial of row i lies i slots further
  int32_t num_items;    // items that store those partials: the last one to finish may do the merge
};
inline constexpr int kMergeFields = 5;
static_assert(sizeof(AttentionMerge) == kMergeFields * sizeof(int32_t));

// What becomes of a part in a merge: it folds with the latest results that wait, the latest one first,
// and waits itself. In the upper bits of its entry in `parts`; an entry without any is a slot and folds with
// all that wait, which is how everything folds from left to right.
inline constexpr int kPartSlotBits = 28;
FS_HOST_DEVICE constexpr int32_t part_slot(int32_t part) {
  return part & ((1 << kPartSlotBits) - 1);
}
FS_HOST_DEVICE constexpr int part_folds(int32_t part, int num_waiting) {
  return part >> kPartSlotBits == 0 ? num_waiting : (part >> kPartSlotBits) - 1;
}

inline constexpr int kMaxFoldLevels = 4;

struct AttentionPlanOptions {
  int block_size = 0;    // tokens of a KV block
  int span = 0;          // tokens; a multiple of block_size
  int group_size = 1;    // query heads per KV head
  int num_kv_heads = 1;  // each item is this many units of work
  int window = 0;        // a row sees its last `window` tokens, itself included; 0: all
  // Packed rows (tokens * group_size) that an item holds at most, but at least a token; and the same for
  // items whose rows are of several requests.
  int rows_per_item = 96;
  int rows_per_shared_item = 384;
  // To write and read one partial of one query head moves as many bytes as reading so many tokens of its KV
  // head: 2 * 4 * (head_dim + 2) against 4 * head_dim for 16-bit KV, and there is a fold. 0: share whatever
  // saves reads.
  int tokens_per_partial = 4;
  // Reading a KV token takes as long as computing so many packed rows with it.
  int rows_per_token_read = 4;
  // Items of at most so many packed rows come after all others and store one partial per span: a CUDA warp
  // computes one on its own, after the warps of its block have done the others together, and cannot fold. 0:
  // no such difference.
  int rows_per_warp = 0;
  // How partials fold: 2^fold_levels spans, from a multiple of as many on, in a binary tree, then these
  // groups from left to right. An item that has a node of the tree to itself stores one partial of it; with
  // 0, only one with which a row's fold begins stores fewer than one for each span. The kernel's own: at most
  // kMaxFoldLevels.
  int fold_levels = 0;
  int num_workers = 1;  // threads or multiprocessors that should have work at the same time
};

class AttentionPlan {
 public:
  // Request b has the rows [query_start[b], query_start[b + 1]), the last ones of its seq_lens[b] tokens.
  // query_start has one entry more than seq_lens. `groups` are the prefixes that requests share, a tree in
  // depth-first order as find_prefix_groups gives it; every row of a reader comes after the tokens it shares.
  // Throws fs::Error with the values on any other input.
  AttentionPlan(std::span<const int32_t> query_start, std::span<const int32_t> seq_lens,
                const AttentionPlanOptions& options, std::span<const PrefixGroup> groups = {});

  // The most work first; with rows_per_warp, the same in each of its two classes.
  const std::vector<AttentionItem>& items() const { return items_; }
  const std::vector<AttentionMerge>& merges() const { return merges_; }
  const std::vector<int32_t>& parts() const { return parts_; }
  int64_t num_slots() const { return num_slots_; }  // each for one row: output, maximum and sum of all heads
  int64_t workspace_floats(int64_t num_heads, int64_t head_dim) const {
    return num_slots_ * num_heads * (head_dim + 2);
  }
  // KV tokens that one KV head's items read.
  int64_t num_tokens_read() const { return num_tokens_read_; }
  // KV tokens that sharing spares one KV head: those of shared nodes, for every reader but one.
  int64_t num_tokens_spared() const { return num_tokens_spared_; }
  int num_shared_items() const { return num_shared_items_; }
  const AttentionPlanOptions& options() const { return options_; }

 private:
  // Rows of one request that walk their KV together, and what they share with others.
  struct RowTile {
    AttentionItem whole;      // all that nobody else reads with them
    int32_t first_link = -1;  // the shared items that hold them, in fold order
    int32_t last_link = -1;
  };
  struct Link {
    int32_t item;
    int32_t next;
  };
  void check(std::span<const int32_t> query_start, std::span<const int32_t> seq_lens) const;
  std::vector<int32_t> make_tiles(std::span<const int32_t> query_start, std::span<const int32_t> seq_lens,
                                  const std::vector<PrefixGroup>& shared);
  void add_shared(const PrefixGroup& node, int32_t begin, int32_t end, int64_t max_cost);
  void add_tile(const RowTile& tile, int64_t max_cost);
  void take(int32_t index, AttentionMerge& merge);
  void number_folds(const AttentionMerge& merge);
  void add_pieces(const AttentionItem& whole, bool fold_begins, bool fold_ends, int64_t max_cost);
  int64_t choose_max_cost(std::span<const int32_t> query_start, const std::vector<PrefixGroup>& shared) const;
  void sort();

  AttentionPlanOptions options_;
  std::vector<AttentionItem> items_;
  std::vector<AttentionMerge> merges_;
  std::vector<int32_t> parts_;
  int64_t num_slots_ = 0;
  int64_t num_tokens_read_ = 0;
  int64_t num_tokens_spared_ = 0;
  int num_shared_items_ = 0;
  std::vector<RowTile> tiles_;  // while the plan is made
  std::vector<Link> links_;
  std::vector<int64_t> part_ends_;  // of the merge at hand: spans
};

}  // namespace fs
