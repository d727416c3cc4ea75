// SPDX-License-Identifier: Apache-2.0
//
// How the KV tokens of some rows are cut into items, and what an item costs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan/attention_plan.h"

namespace fs {

// Spans [begin, end) that one item walks, and the partials that it stores of them.
struct AttentionPiece {
  int64_t begin, end;
  int32_t num_parts;
};

class AttentionCuts {
 public:
  // Whether rows' own KV begins and ends where that of an item does.
  struct Ends {
    bool fold_begins, fold_ends;
  };

  explicit AttentionCuts(const AttentionPlanOptions& options) : options_(options) {}

  // Costs are in packed rows that are computed with a KV token. Starting an item costs as much as kItemCost
  // tokens of its rows.
  int64_t cost(const AttentionItem& item) const {
    return (int64_t{item.kv_end} - item.kv_begin + kItemCost) * cost_of_token(item);
  }
  int64_t cost(const AttentionItem& item, int64_t num_spans, int64_t num_parts) const {
    return (num_spans * options_.span + kItemCost) * cost_of_token(item) + num_parts * cost_of_partial(item);
  }
  int64_t cost_of_token(const AttentionItem& item) const {
    return std::max<int64_t>(int64_t{item.num_rows} * options_.group_size, options_.rows_per_token_read);
  }
  // Of one partial for each row of the item.
  int64_t cost_of_partial(const AttentionItem& item) const {
    return int64_t{item.num_rows} * options_.group_size * options_.tokens_per_partial *
           options_.rows_per_token_read;
  }
  bool is_for_warp(const AttentionItem& item) const {
    return int64_t{item.num_rows} * options_.group_size <= options_.rows_per_warp;
  }
  int64_t num_spans(const AttentionItem& item) const {
    return (item.kv_end + options_.span - 1) / options_.span - item.kv_begin / options_.span;
  }
  // Rows that an item of a shared node has at most. Few spans cannot be cut for all workers; then rows are.
  int64_t rows_of_shared_item(int64_t max_cost) const {
    const int64_t group = options_.group_size;
    const int64_t rows =
        std::min(options_.rows_per_shared_item / group, max_cost / (options_.span + kItemCost) / group);
    return std::max({rows, options_.rows_per_item / group, int64_t{1}});
  }

  // Calls f(AttentionPiece) for the items of at most max_cost, or one span, into which these rows and tokens
  // are cut, from left to right. Pieces are nodes of the trees by which spans fold; a first one with which
  // the fold begins may have several trees, as it stores one partial. Without trees (fold_levels 0) others
  // have several spans, too, and store each.
  template <class F>
  void cut(const AttentionItem& whole, const Ends& ends, int64_t max_cost, const F& f) const {
    const int64_t begin = whole.kv_begin / options_.span, end = begin + num_spans(whole);
    const bool is_whole = end - begin == 1 || cost(whole) <= max_cost, for_warp = is_for_warp(whole);
    if (end - begin == 1 || (is_whole && (for_warp || (ends.fold_begins && ends.fold_ends)))) {
      return f(AttentionPiece{begin, end, for_warp ? static_cast<int32_t>(end - begin) : 1});
    }
    if (for_warp) return cut_for_warp(whole, begin, end, max_cost, f);
    const int64_t of_token = cost_of_token(whole), of_partial = cost_of_partial(whole);
    const int64_t left = std::max<int64_t>(max_cost - kItemCost * of_token, 0);
    const int levels = options_.fold_levels;
    int level = levels;
    while (!is_whole && level > 0 && (options_.span << level) * of_token > left) --level;
    if (level < levels) return cut_into_nodes(begin, end, level, ends, f);

    const int64_t spans = int64_t{1} << levels;
    const int64_t first = ends.fold_begins ? begin / spans : divide_up(begin, spans);
    const int64_t groups = (ends.fold_ends ? divide_up(end, spans) : end / spans) - first;
    if (groups <= 0) return cut_into_nodes(begin, end, level, ends, f);
    const int64_t of_group = spans * options_.span * of_token;
    const int64_t at_once = levels > 0 ? 1
                            : is_whole ? groups
                                       : std::clamp<int64_t>(left / (of_group + of_partial), 1, groups);
    const int64_t at_first = !ends.fold_begins ? 0
                             : is_whole        ? groups
                                               : std::clamp((left - of_partial) / of_group, at_once, groups);
    const int64_t later = groups - at_first, pieces = divide_up(later, at_once);
    const auto clipped = [&](int64_t group) { return std::clamp(group * spans, begin, end); };
    cut_into_nodes(begin, clipped(first), level, {false, false}, f);
    if (at_first > 0) f(AttentionPiece{begin, clipped(first + at_first), 1});
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t from = first + at_first + later * i / pieces,
                    to = first + at_first + later * (i + 1) / pieces;
      f(AttentionPiece{clipped(from), clipped(to), static_cast<int32_t>(to - from)});
    }
    cut_into_nodes(clipped(first + groups), end, level, {false, false}, f);
  }

 private:
  static constexpr int64_t kItemCost = 64;

  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

  // A warp's items store a partial for each span however they are cut.
  template <class F>
  void cut_for_warp(const AttentionItem& whole, int64_t begin, int64_t end, int64_t max_cost,
                    const F& f) const {
    const int64_t of_token = cost_of_token(whole), spans = end - begin;
    const int64_t left = std::max<int64_t>(max_cost - kItemCost * of_token, 0);
    const int64_t pieces = divide_up(spans, std::clamp<int64_t>(left / (options_.span * of_token), 1, spans));
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t from = spans * i / pieces, to = spans * (i + 1) / pieces;
      f(AttentionPiece{begin + from, begin + to, static_cast<int32_t>(to - from)});
    }
  }

  // The largest nodes of at most 2^level spans that make up [begin, end). Where a row's spans begin or end,
  // what is missing of a node is nothing.
  template <class F>
  void cut_into_nodes(int64_t begin, int64_t end, int level, const Ends& ends, const F& f) const {
    for (int64_t at = begin; at < end;) {
      int64_t spans = int64_t{1} << level;
      const bool is_first = ends.fold_begins && at == begin;
      while ((at % spans != 0 && !is_first) || (at / spans * spans + spans > end && !ends.fold_ends))
        spans /= 2;
      const int64_t next = std::min(at / spans * spans + spans, end);
      f(AttentionPiece{at, next, 1});
      at = next;
    }
  }

  const AttentionPlanOptions& options_;
};

}  // namespace fs
