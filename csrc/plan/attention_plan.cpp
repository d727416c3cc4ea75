// SPDX-License-Identifier: Apache-2.0
#include "plan/attention_plan.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/error.h"

namespace fs {

namespace {

// Reading a KV token costs as much as computing this many packed rows with it.
constexpr int64_t kRowsPerTokenRead = 4;
// Starting an item costs as much as this many tokens of one row.
constexpr int64_t kItemCost = 64;
// Units of work (item x KV head) that a worker should find when the total is spread evenly.
constexpr int64_t kUnitsPerWorker = 4;

constexpr int32_t kMaxInt = std::numeric_limits<int32_t>::max();

int64_t spans_of(const AttentionItem& item, int64_t span) {
  return (item.kv_end + span - 1) / span - item.kv_begin / span;
}

}  // namespace

AttentionPlan::AttentionPlan(std::span<const int32_t> query_start, std::span<const int32_t> seq_lens,
                             const AttentionPlanOptions& options)
    : options_(options) {
  check(query_start, seq_lens);
  const int32_t rows_per_item = std::max(1, options_.rows_per_item / options_.group_size);

  std::vector<AttentionItem> whole;  // every row tile with all that it sees
  whole.reserve(seq_lens.size() + static_cast<size_t>(query_start.back() / rows_per_item));
  int64_t total = 0;
  for (size_t b = 0; b < seq_lens.size(); ++b) {
    const int32_t first_position = seq_lens[b] - (query_start[b + 1] - query_start[b]);
    for (int64_t next = query_start[b]; next < query_start[b + 1]; next += rows_per_item) {
      const auto row = static_cast<int32_t>(next);
      AttentionItem item{};
      item.row_begin = row;
      item.num_rows = std::min(rows_per_item, query_start[b + 1] - row);
      item.position = first_position + (row - query_start[b]);
      item.kv_begin = options_.window == 0 ? 0 : std::max(0, item.position - options_.window + 1);
      item.kv_end = item.position + item.num_rows;
      item.request = static_cast<int32_t>(b);
      whole.push_back(item);
      total += cost(item);
    }
  }

  // An item larger than its share of the work is cut where spans meet.
  const int64_t max_cost = std::max<int64_t>(
      total * options_.num_kv_heads / (kUnitsPerWorker * std::max(1, options_.num_workers)), 1);
  items_.reserve(whole.size() + 64);
  for (const AttentionItem& item : whole) cut(item, max_cost);
  FS_CHECK(num_slots_ <= kMaxInt, "attention plan: " << num_slots_ << " partial results");
  sort_by_cost();
}

void AttentionPlan::check(std::span<const int32_t> query_start, std::span<const int32_t> seq_lens) const {
  const AttentionPlanOptions& o = options_;
  FS_CHECK(o.block_size >= 1, "attention plan: block_size is " << o.block_size << "; must be at least 1");
  FS_CHECK(o.span >= o.block_size && o.span % o.block_size == 0,
           "attention plan: span is " << o.span << "; must be a multiple of the block size " << o.block_size);
  FS_CHECK(o.group_size >= 1, "attention plan: group_size is " << o.group_size << "; must be at least 1");
  FS_CHECK(o.num_kv_heads >= 1,
           "attention plan: num_kv_heads is " << o.num_kv_heads << "; must be at least 1");
  FS_CHECK(o.window >= 0, "attention plan: window is " << o.window << "; must not be negative");
  FS_CHECK(o.rows_per_item >= 1,
           "attention plan: rows_per_item is " << o.rows_per_item << "; must be at least 1");
  FS_CHECK(o.num_workers >= 1, "attention plan: num_workers is " << o.num_workers << "; must be at least 1");
  FS_CHECK(query_start.size() == seq_lens.size() + 1,
           "attention plan: query_start has " << query_start.size() << " entries for " << seq_lens.size()
                                              << " requests; must have one more");
  FS_CHECK(query_start[0] == 0, "attention plan: query_start[0] is " << query_start[0] << "; must be 0");
  for (size_t b = 0; b < seq_lens.size(); ++b) {
    FS_CHECK(query_start[b] <= query_start[b + 1], "attention plan: query_start["
                                                       << b + 1 << "] is " << query_start[b + 1]
                                                       << ", less than " << query_start[b]);
    const int32_t num_rows = query_start[b + 1] - query_start[b];
    FS_CHECK(num_rows <= seq_lens[b], "attention plan: request " << b << " has " << num_rows
                                                                 << " query rows and only " << seq_lens[b]
                                                                 << " tokens");
  }
}

int64_t AttentionPlan::cost(const AttentionItem& item) const {
  const int64_t packed_rows = int64_t{item.num_rows} * options_.group_size;
  const int64_t tokens = int64_t{item.kv_end} - item.kv_begin + kItemCost;
  return tokens * std::max(packed_rows, kRowsPerTokenRead);
}

// Cuts one row tile into items of at most max_cost, or one span. The first folds its spans itself; those
// after it cannot (the fold starts at the left), and store one partial per span.
void AttentionPlan::cut(const AttentionItem& whole, int64_t max_cost) {
  const int64_t span = options_.span;
  const int64_t num_spans = spans_of(whole, span);
  const int64_t num_items = std::min(num_spans, (cost(whole) + max_cost - 1) / max_cost);
  if (num_items <= 1) {
    AttentionItem item = whole;
    item.slot = -1;
    item.num_parts = 0;
    items_.push_back(item);
    return;
  }
  AttentionMerge merge{};
  merge.row_begin = whole.row_begin;
  merge.num_rows = whole.num_rows;
  merge.parts_begin = static_cast<int32_t>(parts_.size());
  merge.num_items = static_cast<int32_t>(num_items);
  const int64_t first_span = whole.kv_begin / span;
  for (int64_t i = 0; i < num_items; ++i) {
    AttentionItem item = whole;
    if (i > 0) item.kv_begin = static_cast<int32_t>((first_span + num_spans * i / num_items) * span);
    if (i + 1 < num_items)
      item.kv_end = static_cast<int32_t>((first_span + num_spans * (i + 1) / num_items) * span);
    item.num_parts = i == 0 ? 1 : static_cast<int32_t>(spans_of(item, span));
    item.slot = static_cast<int32_t>(num_slots_);
    item.merge_begin = static_cast<int32_t>(merges_.size());
    item.num_merges = 1;
    for (int32_t part = 0; part < item.num_parts; ++part) {
      parts_.push_back(static_cast<int32_t>(num_slots_));
      num_slots_ += item.num_rows;
    }
    items_.push_back(item);
  }
  merge.parts_end = static_cast<int32_t>(parts_.size());
  merges_.push_back(merge);
}

void AttentionPlan::sort_by_cost() {
  std::vector<std::pair<int64_t, uint32_t>> order(items_.size());
  for (size_t i = 0; i < items_.size(); ++i) order[i] = {-cost(items_[i]), static_cast<uint32_t>(i)};
  std::sort(order.begin(), order.end());
  std::vector<AttentionItem> sorted;
  sorted.reserve(items_.size());
  for (const auto& [negative_cost, index] : order) sorted.push_back(items_[index]);
  items_.swap(sorted);
}

}  // namespace fs
