// SPDX-License-Identifier: Apache-2.0
//
// Which units of attention each worker does, and in what order.
#pragma once

#include <cstdint>

#include "core/thread_pool.h"
#include "cpu/attention_unit.h"

namespace fs::FS_ISA {

// All units, head by head: a block that several items share stays in the cache meanwhile. Workers take runs
// of consecutive units, a sixteenth of a worker's share of the work at most, or one unit, and claim the next
// one before they begin the last unit of a run: who knows what comes next asks for that memory in time.
class UnitRuns {
 public:
  // `rows_per_token_read`: packed rows that are computed with a token while it is read.
  UnitRuns(const Attention& op, const AttentionShape& shape, int64_t rows_per_token_read)
      : op_(op),
        shape_(shape),
        items_(op.items.ptr<const AttentionItem>()),
        num_items_(op.items.shape[0]),
        num_units_(op.items.shape[0] * shape.num_kv_heads) {
    const auto cost = [&](const AttentionItem& item) {
      const int64_t rows = item.num_rows * shape.group;
      const int64_t tokens = int64_t{item.kv_end} - item.kv_begin + 64;
      return tokens * (rows < rows_per_token_read ? rows_per_token_read : rows);
    };
    int64_t total = 0;
    for (int64_t i = 0; i < num_items_; ++i) total += cost(items_[i]);
    const int64_t max_cost = total * shape.num_kv_heads / (16 * int64_t{pool().num_threads()});
    int64_t run_cost = 0;
    int64_t unit = 0;
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
      for (int64_t item = 0; item < num_items_; ++item, ++unit) {
        const int64_t of_unit = cost(items_[item]);
        if (unit == 0 || (run_cost + of_unit > max_cost && count_ < kMaxRuns)) {
          begin_[count_++] = static_cast<int32_t>(unit);
          run_cost = 0;
        }
        run_cost += of_unit;
      }
    }
  }
  UnitRuns(const UnitRuns&) = delete;
  UnitRuns& operator=(const UnitRuns&) = delete;

  // The next run that nobody has, if there is one.
  bool claim(int64_t* begin, int64_t* end) {
    const int64_t run = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
    if (run >= count_) return false;
    *begin = begin_[run];
    *end = run + 1 < count_ ? begin_[run + 1] : num_units_;
    return true;
  }
  PackedRows rows(int64_t unit) const { return {op_, shape_, items_[unit % num_items_], unit / num_items_}; }

 private:
  // Two neighbours together are more than max_cost, so that up to 64 workers find all the runs they can use.
  static constexpr int64_t kMaxRuns = 2048;

  const Attention& op_;
  const AttentionShape& shape_;
  const AttentionItem* items_;
  int64_t num_items_, num_units_;
  int64_t count_ = 0;
  int32_t begin_[kMaxRuns];
  alignas(64) int64_t next_ = 0;
};

// The units of one worker, one after another.
class WorkerUnits {
 public:
  explicit WorkerUnits(UnitRuns& runs) : runs_(runs) {}

  bool next(int64_t* unit) {
    if (at_ == end_ && !runs_.claim(&at_, &end_)) return false;
    *unit = at_++;
    return true;
  }

 private:
  UnitRuns& runs_;
  int64_t at_ = 0;
  int64_t end_ = 0;
};

}  // namespace fs::FS_ISA
