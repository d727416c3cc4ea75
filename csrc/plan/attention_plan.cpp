// SPDX-License-Identifier: Apache-2.0
#include "plan/attention_plan.h"

#include <algorithm>
#include <array>
#include <compare>
#include <limits>

#include "core/error.h"
#include "plan/shared_prefixes.h"

namespace fs {

namespace {

// Starting an item costs as much as this many tokens of one row.
constexpr int64_t kItemCost = 64;
// Units of work (item x KV head) that a worker finds at most when the total is spread evenly: more would only
// be more to start.
constexpr int64_t kUnitsPerWorker = 4;

constexpr int32_t kMaxInt = std::numeric_limits<int32_t>::max();

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t spans_of(const AttentionItem& item, int64_t span) {
  return (item.kv_end + span - 1) / span - item.kv_begin / span;
}

}  // namespace

AttentionPlan::AttentionPlan(std::span<const int32_t> query_start, std::span<const int32_t> seq_lens,
                             const AttentionPlanOptions& options, std::span<const PrefixGroup> groups)
    : options_(options) {
  check(query_start, seq_lens);
  const std::vector<PrefixGroup> shared = choose_shared_prefixes(groups, query_start, seq_lens, options_);
  std::vector<int32_t> first_tile = make_tiles(query_start, seq_lens, shared);

  const int64_t max_cost = choose_max_cost(query_start, shared);
  items_.reserve(tiles_.size() + shared.size() + 64);
  for (const PrefixGroup& node : shared) {
    int64_t num_readers = 0;
    for (int32_t b = node.request_begin; b < node.request_end; ++b) {
      num_readers += first_tile[b] < first_tile[b + 1] ? 1 : 0;
    }
    num_tokens_spared_ += (num_readers - 1) * (node.kv_end - node.kv_begin);
    add_shared(node, first_tile[node.request_begin], first_tile[node.request_end], max_cost);
  }
  num_shared_items_ = static_cast<int32_t>(items_.size());
  for (const RowTile& tile : tiles_) add_tile(tile, max_cost);
  for (const AttentionItem& item : items_) num_tokens_read_ += item.kv_end - item.kv_begin;
  sort();
  tiles_ = {};
  links_ = {};
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
  FS_CHECK(o.rows_per_shared_item >= 1,
           "attention plan: rows_per_shared_item is " << o.rows_per_shared_item << "; must be at least 1");
  FS_CHECK(o.tokens_per_partial >= 0,
           "attention plan: tokens_per_partial is " << o.tokens_per_partial << "; must not be negative");
  FS_CHECK(o.rows_per_token_read >= 1,
           "attention plan: rows_per_token_read is " << o.rows_per_token_read << "; must be at least 1");
  FS_CHECK(o.rows_per_warp >= 0,
           "attention plan: rows_per_warp is " << o.rows_per_warp << "; must not be negative");
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
  return (int64_t{item.kv_end} - item.kv_begin + kItemCost) * cost_of_token(item);
}

int64_t AttentionPlan::cost_of_token(const AttentionItem& item) const {
  return std::max<int64_t>(int64_t{item.num_rows} * options_.group_size, options_.rows_per_token_read);
}

// Of one partial for each row of the item.
int64_t AttentionPlan::cost_of_partial(const AttentionItem& item) const {
  return int64_t{item.num_rows} * options_.group_size * options_.tokens_per_partial *
         options_.rows_per_token_read;
}

// The cost up to which items stay whole; larger ones are cut where spans meet. With small items everybody has
// work until the end, but what does not begin a fold stores a partial for each of its spans. So this is the
// largest of a few costs with which the estimated time is about the shortest.
int64_t AttentionPlan::choose_max_cost(std::span<const int32_t> query_start,
                                       const std::vector<PrefixGroup>& shared) const {
  struct Whole {
    AttentionItem item;
    bool fold_begins;
    bool is_shared;
  };
  std::vector<Whole> wholes;
  int64_t total = 0;
  for (const RowTile& tile : tiles_) total += cost(tile.whole);
  for (const PrefixGroup& node : shared) {
    AttentionItem all{};
    all.num_rows = query_start[node.request_end] - query_start[node.request_begin];
    all.kv_begin = node.kv_begin;
    all.kv_end = node.kv_end;
    total += cost(all);
    wholes.push_back({all, node.kv_begin == 0, true});
  }
  const int64_t workers = options_.num_workers, heads = options_.num_kv_heads;
  const int64_t finest = std::max<int64_t>(total * heads / (kUnitsPerWorker * workers), 1);
  int64_t num_small = 0;  // never cut, nor those that a warp takes anyhow
  for (const RowTile& tile : tiles_) {
    const bool is_large = cost(tile.whole) > finest && !is_for_warp(tile.whole);
    // After a shared prefix nothing folds; one under a window is not worth telling apart.
    const bool fold_begins = tile.whole.kv_begin == 0 || options_.window > 0;
    if (is_large) wholes.push_back({tile.whole, fold_begins, false});
    num_small += is_large ? 0 : 1;
  }
  if (wholes.empty() || options_.tokens_per_partial == 0) return finest;

  struct Choice {
    int64_t max_cost, time;
  };
  std::array<Choice, 6> choices;
  for (size_t i = 0; i < choices.size(); ++i) {
    const int64_t max_cost = i + 1 < choices.size() ? finest << i : std::numeric_limits<int64_t>::max() / 2;
    int64_t spent = total, largest = 0, units = num_small;
    for (const Whole& whole : wholes) {
      AttentionItem item = whole.item;
      int64_t passes = 1;
      if (whole.is_shared) {
        const int64_t rows = std::min<int64_t>(item.num_rows, rows_of_shared_item(max_cost));
        passes = divide_up(item.num_rows, rows);
        item.num_rows = static_cast<int32_t>(rows);
      }
      const Cut cut = cut_of(item, whole.fold_begins, max_cost);
      const bool folds = whole.fold_begins && !is_for_warp(item);
      const int64_t num_spans = spans_of(item, options_.span);
      const int64_t first = folds ? 1 : cut.first_spans, later = num_spans - cut.first_spans;
      const int64_t partials = cut.pieces == 1 && folds && !whole.is_shared ? 0 : first + later;
      const int64_t of_token = cost_of_token(item), of_partial = cost_of_partial(item);
      const auto piece = [&](int64_t spans, int64_t stored) {
        return (spans * options_.span + kItemCost) * of_token + stored * of_partial;
      };
      largest = std::max(largest, piece(cut.first_spans, std::min(first, partials)));
      if (cut.pieces > 1) {
        const int64_t spans = divide_up(later, cut.pieces - 1);
        largest = std::max(largest, piece(spans, spans));
      }
      spent += partials * of_partial * passes;
      units += cut.pieces * passes;
    }
    // One unit for each worker at most: as long as the largest. Else whoever begins the last one, when half
    // of it is left on average, is the last.
    const int64_t share = spent * heads / workers;
    choices[i] = {max_cost, units * heads <= workers ? largest : std::max(largest, share + largest / 2)};
  }
  int64_t shortest = choices[0].time;
  for (const Choice& choice : choices) shortest = std::min(shortest, choice.time);
  int64_t chosen = finest;
  for (const Choice& choice : choices) {
    if (choice.time <= shortest + shortest / 16) chosen = choice.max_cost;
  }
  return chosen;
}

// The row tiles of all requests, and for each request (and one more) the first of its tiles.
std::vector<int32_t> AttentionPlan::make_tiles(std::span<const int32_t> query_start,
                                               std::span<const int32_t> seq_lens,
                                               const std::vector<PrefixGroup>& shared) {
  const int32_t rows_per_item = std::max(1, options_.rows_per_item / options_.group_size);
  std::vector<int32_t> shared_end(seq_lens.size(), 0);
  for (const PrefixGroup& node : shared) {
    std::fill(shared_end.begin() + node.request_begin, shared_end.begin() + node.request_end, node.kv_end);
  }
  std::vector<int32_t> first_tile;
  first_tile.reserve(seq_lens.size() + 1);
  tiles_.reserve(seq_lens.size() + static_cast<size_t>(query_start.back() / rows_per_item));
  for (size_t b = 0; b < seq_lens.size(); ++b) {
    first_tile.push_back(static_cast<int32_t>(tiles_.size()));
    const int32_t first_position = seq_lens[b] - (query_start[b + 1] - query_start[b]);
    for (int64_t next = query_start[b]; next < query_start[b + 1]; next += rows_per_item) {
      const auto row = static_cast<int32_t>(next);
      AttentionItem whole{};
      whole.row_begin = row;
      whole.num_rows = std::min(rows_per_item, query_start[b + 1] - row);
      whole.position = first_position + (row - query_start[b]);
      const int32_t visible = options_.window == 0 ? 0 : std::max(0, whole.position - options_.window + 1);
      whole.kv_begin = std::max(visible, shared_end[b]);
      whole.kv_end = whole.position + whole.num_rows;
      whole.request = static_cast<int32_t>(b);
      tiles_.push_back({whole});
    }
  }
  first_tile.push_back(static_cast<int32_t>(tiles_.size()));
  return first_tile;
}

// Rows that an item of a shared node has at most. Few spans cannot be cut for all workers; then rows are.
int64_t AttentionPlan::rows_of_shared_item(int64_t max_cost) const {
  const int64_t group = options_.group_size;
  const int64_t rows =
      std::min(options_.rows_per_shared_item / group, max_cost / (options_.span + kItemCost) / group);
  return std::max({rows, options_.rows_per_item / group, int64_t{1}});
}

// The items of a shared node: whole row tiles together, as many as fit.
void AttentionPlan::add_shared(const PrefixGroup& node, int32_t begin, int32_t end, int64_t max_cost) {
  int64_t max_rows = rows_of_shared_item(max_cost);
  // `position` makes the first row see just all; the window of the last one must still reach back to the
  // first.
  if (options_.window > 0)
    max_rows = std::min<int64_t>(max_rows, options_.window - node.kv_end + node.kv_begin + 1);
  while (begin < end) {
    AttentionItem whole = tiles_[begin].whole;  // row_begin, request
    whole.kv_begin = node.kv_begin;
    whole.kv_end = node.kv_end;
    int32_t stop = begin + 1;
    while (stop < end && whole.num_rows + tiles_[stop].whole.num_rows <= max_rows) {
      whole.num_rows += tiles_[stop].whole.num_rows;
      ++stop;
    }
    const auto first_item = static_cast<int32_t>(items_.size());
    const bool fold_begins = node.kv_begin == 0;
    add_pieces(whole, cut_of(whole, fold_begins, max_cost), fold_begins);
    for (auto item = first_item; item < static_cast<int32_t>(items_.size()); ++item) {
      items_[item].position = items_[item].kv_end - 1;
      for (int32_t tile = begin; tile < stop; ++tile) {
        const auto link = static_cast<int32_t>(links_.size());
        links_.push_back({item, -1});
        (tiles_[tile].first_link < 0 ? tiles_[tile].first_link : links_[tiles_[tile].last_link].next) = link;
        tiles_[tile].last_link = link;
      }
    }
    begin = stop;
  }
}

// The items of a row tile's own, and the merge of all that have its rows.
void AttentionPlan::add_tile(const RowTile& tile, int64_t max_cost) {
  const Cut cut = cut_of(tile.whole, tile.first_link < 0, max_cost);
  const bool folds = !is_for_warp(tile.whole) || spans_of(tile.whole, options_.span) == 1;
  if (cut.pieces == 1 && folds && tile.first_link < 0) {
    AttentionItem item = tile.whole;
    item.slot = -1;
    item.num_parts = 0;
    items_.push_back(item);
    return;
  }
  const auto first_item = static_cast<int32_t>(items_.size());
  add_pieces(tile.whole, cut, tile.first_link < 0);
  AttentionMerge merge{};
  merge.row_begin = tile.whole.row_begin;
  merge.num_rows = tile.whole.num_rows;
  merge.parts_begin = static_cast<int32_t>(parts_.size());
  const auto take = [&](int32_t index) {
    AttentionItem& item = items_[index];
    if (item.num_merges++ == 0) item.merge_begin = static_cast<int32_t>(merges_.size());
    const int32_t offset = merge.row_begin - item.row_begin;
    for (int32_t p = 0; p < item.num_parts; ++p) parts_.push_back(item.slot + p * item.num_rows + offset);
    ++merge.num_items;
  };
  for (int32_t link = tile.first_link; link >= 0; link = links_[link].next) take(links_[link].item);
  for (auto item = first_item; item < static_cast<int32_t>(items_.size()); ++item) take(item);
  merge.parts_end = static_cast<int32_t>(parts_.size());
  merges_.push_back(merge);
}

// How these rows and tokens are cut into items of at most max_cost, or one span. A first one that folds may
// have more spans than the others, as it stores one partial.
AttentionPlan::Cut AttentionPlan::cut_of(const AttentionItem& whole, bool fold_begins,
                                         int64_t max_cost) const {
  const int64_t num_spans = spans_of(whole, options_.span);
  if (num_spans == 1 || cost(whole) <= max_cost) return {1, num_spans};
  const int64_t of_token = cost_of_token(whole);
  const bool folds = fold_begins && !is_for_warp(whole);
  // A warp's items store their partials however they are cut.
  const int64_t of_partial = is_for_warp(whole) ? 0 : cost_of_partial(whole);
  const int64_t left = std::max<int64_t>(max_cost - kItemCost * of_token, 0);
  const int64_t spans = std::clamp<int64_t>(left / (options_.span * of_token + of_partial), 1, num_spans);
  if (!folds) {
    const int64_t pieces = divide_up(num_spans, spans);
    return {pieces, num_spans / pieces};
  }
  const int64_t first = std::max((left - of_partial) / (options_.span * of_token), spans);
  if (first >= num_spans) return {1, num_spans};
  return {1 + divide_up(num_spans - first, spans), first};
}

// Items that store partials. One with which the fold begins folds its spans itself, unless it is a warp's.
// Those after it cannot (the fold starts at the left), and store one partial per span.
void AttentionPlan::add_pieces(const AttentionItem& whole, const Cut& cut, bool fold_begins) {
  const int64_t span = options_.span;
  const int64_t later_spans = spans_of(whole, span) - cut.first_spans;
  const int64_t first_span = whole.kv_begin / span;
  const auto begin_of = [&](int64_t piece) {
    const int64_t spans =
        piece == 0 ? 0 : cut.first_spans + later_spans * (piece - 1) / std::max<int64_t>(cut.pieces - 1, 1);
    return static_cast<int32_t>((first_span + spans) * span);
  };
  for (int64_t i = 0; i < cut.pieces; ++i) {
    AttentionItem item = whole;
    if (i > 0) item.kv_begin = begin_of(i);
    if (i + 1 < cut.pieces) item.kv_end = begin_of(i + 1);
    const bool folds = i == 0 && fold_begins && !is_for_warp(item);
    item.num_parts = folds ? 1 : static_cast<int32_t>(spans_of(item, span));
    item.slot = static_cast<int32_t>(num_slots_);
    num_slots_ += int64_t{item.num_parts} * item.num_rows;
    FS_CHECK(num_slots_ <= kMaxInt, "attention plan: " << num_slots_ << " partial results");
    items_.push_back(item);
  }
}

bool AttentionPlan::is_for_warp(const AttentionItem& item) const {
  return int64_t{item.num_rows} * options_.group_size <= options_.rows_per_warp;
}

void AttentionPlan::sort() {
  struct Key {
    bool for_warp;
    int64_t negative_cost;
    uint32_t index;
    auto operator<=>(const Key&) const = default;
  };
  std::vector<Key> order(items_.size());
  for (size_t i = 0; i < items_.size(); ++i) {
    order[i] = {is_for_warp(items_[i]), -cost(items_[i]), static_cast<uint32_t>(i)};
  }
  std::sort(order.begin(), order.end());
  std::vector<AttentionItem> sorted;
  sorted.reserve(items_.size());
  for (const Key& key : order) sorted.push_back(items_[key.index]);
  items_.swap(sorted);
}

}  // namespace fs
