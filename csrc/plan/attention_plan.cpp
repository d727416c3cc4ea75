// SPDX-License-Identifier: Apache-2.0
#include "plan/attention_plan.h"

#include <algorithm>
#include <array>
#include <compare>
#include <limits>

#include "core/error.h"
#include "plan/attention_cuts.h"
#include "plan/shared_prefixes.h"

namespace fs {

namespace {

// Units of work (item x KV head) that a worker finds at most when the total is spread evenly: more would only
// be more to start.
constexpr int64_t kUnitsPerWorker = 4;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
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
  FS_CHECK(o.fold_levels >= 0 && o.fold_levels <= kMaxFoldLevels,
           "attention plan: fold_levels is " << o.fold_levels << "; must be from 0 to " << kMaxFoldLevels);
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

// The cost up to which items stay whole; larger ones are cut where spans meet. With small items everybody has
// work until the end, but what does not begin a fold stores a partial for each of its spans. So this is the
// largest of a few costs with which the estimated time is about the shortest.
int64_t AttentionPlan::choose_max_cost(std::span<const int32_t> query_start,
                                       const std::vector<PrefixGroup>& shared) const {
  const AttentionCuts cuts(options_);
  struct Whole {
    AttentionItem item;
    AttentionCuts::Ends ends;
    bool is_shared;
  };
  std::vector<Whole> wholes;
  int64_t total = 0;
  for (const RowTile& tile : tiles_) total += cuts.cost(tile.whole);
  for (const PrefixGroup& node : shared) {
    AttentionItem all{};
    all.num_rows = query_start[node.request_end] - query_start[node.request_begin];
    all.kv_begin = node.kv_begin;
    all.kv_end = node.kv_end;
    total += cuts.cost(all);
    wholes.push_back({all, {node.kv_begin == 0, false}, true});
  }
  const int64_t workers = options_.num_workers, heads = options_.num_kv_heads;
  const int64_t finest = std::max<int64_t>(total * heads / (kUnitsPerWorker * workers), 1);
  int64_t num_small = 0;  // never cut, nor those that a warp takes anyhow
  for (const RowTile& tile : tiles_) {
    const bool is_large = cuts.cost(tile.whole) > finest && !cuts.is_for_warp(tile.whole);
    // After a shared prefix nothing folds; one under a window is not worth telling apart.
    const bool fold_begins = tile.whole.kv_begin == 0 || options_.window > 0;
    if (is_large) wholes.push_back({tile.whole, {fold_begins, true}, false});
    num_small += is_large ? 0 : 1;
  }
  if (wholes.empty() || options_.tokens_per_partial == 0) return finest;

  struct Choice {
    int64_t max_cost, time;
  };
  struct Same {
    int64_t cost, count;
  };
  std::array<Choice, 6> choices;
  std::vector<Same> items;
  for (size_t i = 0; i < choices.size(); ++i) {
    const int64_t max_cost = i + 1 < choices.size() ? finest << i : std::numeric_limits<int64_t>::max() / 2;
    int64_t spent = total, largest = 0, units = num_small;
    items.clear();
    for (const Whole& whole : wholes) {
      AttentionItem item = whole.item;
      int64_t passes = 1;
      if (whole.is_shared) {
        const int64_t rows = std::min<int64_t>(item.num_rows, cuts.rows_of_shared_item(max_cost));
        passes = divide_up(item.num_rows, rows);
        item.num_rows = static_cast<int32_t>(rows);
      }
      const int64_t of_partial = cuts.cost_of_partial(item);
      cuts.cut(item, whole.ends, max_cost, [&](const AttentionPiece& piece) {
        const bool is_output = piece.num_parts == 1 && piece.end - piece.begin == cuts.num_spans(item) &&
                               whole.ends.fold_begins && whole.ends.fold_ends;
        const int64_t stored = is_output ? 0 : piece.num_parts;
        items.push_back({cuts.cost(item, piece.end - piece.begin, stored), passes});
        largest = std::max(largest, items.back().cost);
        spent += stored * of_partial * passes;
        units += passes;
      });
    }
    // One unit for each worker at most: as long as the largest. Else whoever begins the last one, when half
    // of it is left on average, is the last; and if all are about as large as the largest, whoever has most.
    Same large{largest, 0};
    for (const Same& item : items) {
      if (item.cost < largest - largest / 8) continue;
      large = {std::min(large.cost, item.cost), large.count + item.count};
    }
    const int64_t rounds = divide_up(large.count * heads, workers) * large.cost;
    const int64_t share = spent * heads / workers;
    choices[i] = {max_cost, units * heads <= workers ? largest : std::max(rounds, share + largest / 2)};
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

// The items of a shared node: whole row tiles together, as many as fit.
void AttentionPlan::add_shared(const PrefixGroup& node, int32_t begin, int32_t end, int64_t max_cost) {
  int64_t max_rows = AttentionCuts(options_).rows_of_shared_item(max_cost);
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
    add_pieces(whole, node.kv_begin == 0, false, max_cost);
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
  const auto first_item = static_cast<int32_t>(items_.size());
  const bool is_alone = tile.first_link < 0;
  const int64_t first_slot = num_slots_;
  add_pieces(tile.whole, is_alone, true, max_cost);
  if (is_alone && items_.size() == static_cast<size_t>(first_item) + 1 && items_.back().num_parts == 1) {
    items_.back().slot = -1;
    items_.back().num_parts = 0;
    num_slots_ = first_slot;
    return;
  }
  AttentionMerge merge{};
  merge.row_begin = tile.whole.row_begin;
  merge.num_rows = tile.whole.num_rows;
  merge.parts_begin = static_cast<int32_t>(parts_.size());
  for (int32_t link = tile.first_link; link >= 0; link = links_[link].next) take(links_[link].item, merge);
  for (auto item = first_item; item < static_cast<int32_t>(items_.size()); ++item) take(item, merge);
  merge.parts_end = static_cast<int32_t>(parts_.size());
  if (options_.fold_levels > 0) number_folds(merge);
  merges_.push_back(merge);
}

// The parts of one item become some of a merge's.
void AttentionPlan::take(int32_t index, AttentionMerge& merge) {
  AttentionItem& item = items_[index];
  if (item.num_merges++ == 0) item.merge_begin = static_cast<int32_t>(merges_.size());
  const int32_t offset = merge.row_begin - item.row_begin;
  const int64_t begin = item.kv_begin / options_.span, end = begin + AttentionCuts(options_).num_spans(item);
  for (int32_t p = 0; p < item.num_parts; ++p) {
    parts_.push_back(item.slot + p * item.num_rows + offset);
    if (options_.fold_levels > 0) part_ends_.push_back(item.num_parts == 1 ? end : begin + p + 1);
  }
  ++merge.num_items;
}

// Which parts of a merge fold with which, by where each ends: what waits is a complete left half of a node
// for each level, below all groups before.
void AttentionPlan::number_folds(const AttentionMerge& merge) {
  std::array<int, kMaxFoldLevels + 1> waiting;  // levels of what waits, falling
  int num_waiting = 0;
  for (int32_t p = merge.parts_begin; p < merge.parts_end; ++p) {
    const int64_t last_span = part_ends_[static_cast<size_t>(p - merge.parts_begin)] - 1;
    int folds = 0, level = 0;
    if (p + 1 == merge.parts_end) {
      folds = num_waiting;
    } else {
      const auto waits = [&](int at) {
        return num_waiting > folds && waiting[num_waiting - folds - 1] == at;
      };
      while (level < options_.fold_levels && (last_span >> level & 1) != 0) folds += waits(level++) ? 1 : 0;
      if (level == options_.fold_levels) folds += waits(level) ? 1 : 0;
    }
    num_waiting -= folds;
    waiting[num_waiting++] = level;
    parts_[p] |= (folds + 1) << kPartSlotBits;
  }
  part_ends_.clear();
}

void AttentionPlan::add_pieces(const AttentionItem& whole, bool fold_begins, bool fold_ends,
                               int64_t max_cost) {
  const int64_t span = options_.span;
  AttentionCuts(options_).cut(whole, {fold_begins, fold_ends}, max_cost, [&](const AttentionPiece& piece) {
    AttentionItem item = whole;
    item.kv_begin = std::max(whole.kv_begin, static_cast<int32_t>(piece.begin * span));
    item.kv_end = static_cast<int32_t>(std::min<int64_t>(whole.kv_end, piece.end * span));
    item.num_parts = piece.num_parts;
    item.slot = static_cast<int32_t>(num_slots_);
    num_slots_ += int64_t{item.num_parts} * item.num_rows;
    FS_CHECK(num_slots_ <= part_slot(-1), "attention plan: " << num_slots_ << " partial results");
    items_.push_back(item);
  });
}

void AttentionPlan::sort() {
  struct Key {
    bool for_warp;
    int64_t negative_cost;
    uint32_t index;
    auto operator<=>(const Key&) const = default;
  };
  const AttentionCuts cuts(options_);
  std::vector<Key> order(items_.size());
  for (size_t i = 0; i < items_.size(); ++i) {
    order[i] = {cuts.is_for_warp(items_[i]), -cuts.cost(items_[i]), static_cast<uint32_t>(i)};
  }
  std::sort(order.begin(), order.end());
  std::vector<AttentionItem> sorted;
  sorted.reserve(items_.size());
  for (const Key& key : order) sorted.push_back(items_[key.index]);
  items_.swap(sorted);
}

}  // namespace fs
