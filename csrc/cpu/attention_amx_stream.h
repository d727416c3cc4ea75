// SPDX-License-Identifier: Apache-2.0
//
// Units of few rows, such as decodes, on AMX tiles: memory is all they should wait for. Their sections go
// through three stages, one step of 32 tokens of each beside one of the others, whichever units they are of:
//
//   section    | i + 2              | i + 1                | i
//   stage      | scores: its keys   | weights              | output: its values
//
// So a core reads keys and values all the time, at the same pace, and asks for those of the next step while
// it multiplies these; nothing waits for a maximum or for a tile that was just stored. The arithmetic is that
// of AmxSpans, and so are the bits.
#pragma once

#if defined(FS_SIMD_AMX)

#include <cstdint>
#include <cstring>

#include "cpu/attention_amx_queries.h"
#include "cpu/attention_amx_tiles.h"
#include "cpu/attention_amx_weights.h"
#include "cpu/attention_section.h"
#include "cpu/attention_unit.h"
#include "cpu/each.h"

namespace fs::FS_ISA {

class AmxStream {
 public:
  static constexpr int kMaxRows = kAmxRows;

  AmxStream(const Attention& op, const AttentionShape& shape, AttentionTiles& tiles)
      : op_(op), shape_(shape), cache_(op.kv_cache), queries_(op), tiles_(tiles), results_(shape) {}

  // Rows of one tile that all see the same tokens, some of each span.
  bool takes(const PackedRows& rows) const {
    if (rows.count() > kMaxRows) return false;
    const TokenRange seen = rows.visible(0);
    const TokenRange of_last = rows.visible(rows.item.num_rows - 1);
    const int64_t span = op_.span;
    return seen.begin < seen.end && seen.begin == of_last.begin && seen.end == of_last.end &&
           seen.begin / span == rows.item.kv_begin / span &&
           (seen.end - 1) / span == (rows.item.kv_end - 1) / span;
  }

  // Takes up a unit, whose results may be there only after more of them, or after drain(). `following`, the
  // worker's next unit, may be nullptr.
  void push(const PackedRows& rows, const PackedRows* following) {
    if (rows.count() != num_rows_) {
      drain();
      num_rows_ = rows.count();
    }
    tiles_.configure_all_but_last(num_rows_);
    Rows& of = rows_[next_rows_++ % kInFlight];
    of.item = &rows.item;
    of.kv_head = rows.kv_head;
    queries_.round(rows, 0, num_rows_, of.q);
    if (following != nullptr) ask_for(*following);
    const TokenRange seen = rows.visible(0);
    for (int64_t at = rows.item.kv_begin / op_.span * op_.span; at < seen.end;) {
      Task& task = tasks_[next_task_++ % kInFlight];
      task.section = KvSection(rows, cache_, seen, at);
      task.rows = &of;
      at = task.section.tokens.end;
      task.is_last = at >= seen.end;
      advance(&task);
    }
  }

  // Finishes what was taken up.
  void drain() {
    while (coming_ != nullptr || score_ != nullptr || weigh_ != nullptr) advance(nullptr);
    value_ = nullptr;
  }

 private:
  static constexpr int64_t kTurnDims = 32;
  static constexpr int kTurnsAhead = 2;         // what is asked for
  static constexpr int kTurnsToFirstLines = 4;  // from which the processor goes on by itself
  static constexpr int kInFlight = 4;           // sections: three in their stages, one to come
  static constexpr int64_t kScoreStride = ScoreRows::kScoreStride;
  static constexpr int64_t kWeightStride = ScoreRows::kWeightStride;

  struct Rows {
    const AttentionItem* item;
    int64_t kv_head;
    alignas(64) bf16 q[kMaxRows * kMaxHeadDim];
  };
  struct Task {
    KvSection section;
    const Rows* rows;
    bool is_last;  // of its unit
    float max[kMaxRows];
    alignas(64) float scores[kMaxRows * kScoreStride];
    alignas(64) bf16 weights[kMaxRows * kWeightStride];

    int num_steps() const { return section.end_step - section.first_step; }
    ScoreRows score_rows(float scale) {
      return {scores, weights, section.first_step, section.end_step, scale};
    }
  };

  // The queries and blocks of a unit, which another core may have made, or keys and values of others driven
  // out of this one's cache.
  void ask_for(const PackedRows& rows) const {
    prefetch(rows.block_table() + rows.item.kv_begin / shape_.block_size);
    const int64_t count = rows.count() < kMaxRows ? rows.count() : kMaxRows;
    rows.for_each(0, count, [&](int64_t, int64_t token, int64_t head) {
      const float* q = rows.query(token, head);
      for (int64_t d = 0; d < shape_.head_dim; d += 16) prefetch(q + d);
    });
  }

  // Every section one stage on, and another one, which may be nullptr, to come.
  void advance(Task* coming) {
    value_ = weigh_;
    weigh_ = score_;
    score_ = coming_;
    coming_ = coming;
    if (value_ != nullptr) begin_values(*value_);
    run_stages();
    if (value_ != nullptr) finish_values(*value_);
  }

  void begin_values(const Task& task) {
    const AttentionItem& item = *task.rows->item;
    if (rows_of_results_ != task.rows) {
      rows_of_results_ = task.rows;
      results_.begin(0, num_rows_, item.kv_begin / op_.span);
      is_first_of_span_ = true;
    }
    to_ = results_.next();
    if (!is_first_of_span_) to_ = section_.partials(to_.stride);
  }

  void finish_values(Task& task) {
    std::memcpy(to_.max, task.max, sizeof(float) * static_cast<size_t>(num_rows_));
    for (int64_t i = 0; i < num_rows_; ++i) to_.sum[i] = sums_[i * kAmxColumns];
    const PackedRows rows{op_, shape_, *task.rows->item, task.rows->kv_head};
    if (!is_first_of_span_) {
      const Partials& span = results_.next();
      fold_rows(num_rows_, [&](int64_t r) { return span.row(r); }, to_, shape_.head_dim);
    }
    is_first_of_span_ = task.section.tokens.end % op_.span == 0;
    if (is_first_of_span_ || task.is_last) results_.add(rows);
    if (!task.is_last) return;
    results_.finish(rows);
    rows_of_results_ = nullptr;
  }

  void find_maxima(Task& task) {
    const ScoreRows rows = task.score_rows(queries_.scale());
    const KvSection& section = task.section;
    const int64_t at = section.tokens.begin;
    const bool all =
        section.seen.begin <= at + rows.first * kAmxDepth && section.seen.end >= at + rows.end * kAmxDepth;
    for (int64_t i = 0; i < num_rows_; ++i) {
      RowMaximum highest;
      for (int step = rows.first; step < rows.end; ++step) {
        const float* score = rows.scores + i * kScoreStride + step * kAmxDepth;
        if (all) {
          highest.add<true>(score, ~0u);
        } else {
          highest.add<false>(score, seen_keys(section, step));
        }
      }
      const float top = highest.value() * queries_.scale();
      task.max[i] = top;
      shifts_[i] = -top;
    }
  }

  static uint32_t seen_keys(const KvSection& section, int step) {
    return ScoreRows::visible_keys(section.seen, section.tokens.begin + step * kAmxDepth);
  }

  __attribute__((always_inline)) void weigh_step(Task& task, int step) {
    const ScoreRows rows = task.score_rows(queries_.scale());
    const uint32_t seen = seen_keys(task.section, step);
    for (int64_t i = 0; i < num_rows_; ++i) rows.weigh_step(i, step, set1(shifts_[i]), seen);
  }

  // The values of a step: where they lie, or a copy.
  const bf16* values_of(const KvSection& section, int step) {
    const bf16* const* halves = section.values + 2 * step;
    const int64_t token = section.tokens.begin + step * kAmxDepth;
    return seen_values(halves, token, section.seen, shape_.head_dim,
                       copied_ + step % 2 * kAmxDepth * kMaxHeadDim);
  }

#if !defined(FS_SIMD_EMULATED)

  void run_stages() {
    if (weigh_ != nullptr) find_maxima(*weigh_);
    asm volatile("" ::: "memory");
    shape_.head_dim == 64 ? run_turns<64>() : run_turns<0>();
    if (value_ != nullptr) add_weights(*value_);
    asm volatile("" ::: "memory");
  }

  // A turn is 32 dims of a step. Those of values go twice as many dims at a time, whose outputs are in
  // registers, over all steps.
  struct Turn {
    int step;
    int64_t dim;
  };

  // What follows from the head size: constants if that is kDim, and not 0. With fewer instructions between
  // loads a core runs further ahead.
  template <int64_t kDim>
  int64_t dim() const {
    return kDim == 0 ? shape_.head_dim : kDim;
  }
  template <int64_t kDim>
  int turns_of_step() const {
    return static_cast<int>(dim<kDim>() / kTurnDims);
  }
  template <int64_t kDim>
  int num_turns(const Task* task) const {
    return task == nullptr ? 0 : task->num_steps() * turns_of_step<kDim>();
  }
  template <int64_t kDim>
  Turn key_turn(const Task& task, int turn) const {
    const int of_step = turns_of_step<kDim>();
    return {task.section.first_step + turn / of_step, turn % of_step * kTurnDims};
  }
  template <int64_t kDim>
  Turn value_turn(const Task& task, int turn) const {
    const int first = task.section.first_step;
    const int64_t pass = kDim == 2 * kTurnDims ? 0 : turn / (2 * task.num_steps());
    turn -= static_cast<int>(pass) * 2 * task.num_steps();
    const int64_t d = pass * 2 * kTurnDims;
    if (d + kTurnDims == dim<kDim>()) return {first + turn, d};
    return {first + turn / 2, d + turn % 2 * kTurnDims};
  }
  int64_t key_line() const { return 2 * shape_.block_size; }

  template <int64_t kDim>
  void run_turns() {
    const int num_scores = num_turns<kDim>(score_);
    const int num_weights = num_turns<kDim>(weigh_);
    const int num_values = num_turns<kDim>(value_);
    for (int turn = 0; turn < num_scores || turn < num_weights || turn < num_values; ++turn) {
      if (turn < num_scores) score<kDim>(turn);
      if (turn < num_weights) {
        const Turn at = key_turn<kDim>(*weigh_, turn);
        if (at.dim == 0) weigh_step(*weigh_, at.step);
      }
      if (turn < num_values) weigh_values<kDim>(turn);
    }
  }

  // Registers 0 to 3: outputs. 4, 5: scores of a step. 6: queries or weights. 7: keys or values.
  template <int64_t kDim>
  __attribute__((always_inline)) void score(int turn) {
    Task& task = *score_;
    const Turn at = key_turn<kDim>(task, turn);
    const int64_t line = key_line() * int64_t{sizeof(bf16)};
    const int64_t offset = at.dim / 2 * key_line();
    const bf16* const* keys = task.section.keys + 2 * at.step;
    if (turn % 2 == 0) keys_at<kDim>(turn + kTurnsToFirstLines).first_lines();
    KeyAsk ask = keys_at<kDim>(turn + kTurnsAhead);
    if (at.dim == 0) {
      _tile_zero(4);
      _tile_zero(5);
    }
    ask.next_half();
    _tile_loadd(6, task.rows->q + at.dim, dim<kDim>() * int64_t{sizeof(bf16)});
    _tile_loadd(7, keys[0] + offset, line);
    _tile_dpbf16ps(4, 6, 7);
    ask.next_half();
    _tile_loadd(7, keys[1] + offset, line);
    _tile_dpbf16ps(5, 6, 7);
    if (at.dim + kTurnDims < dim<kDim>()) return;
    float* scores = task.scores + at.step * kAmxDepth;
    _tile_stored(4, scores, kScoreStride * sizeof(float));
    _tile_stored(5, scores + kAmxColumns, kScoreStride * sizeof(float));
  }

  template <int64_t kDim>
  __attribute__((always_inline)) void weigh_values(int turn) {
    const Task& task = *value_;
    const Turn at = value_turn<kDim>(task, turn);
    const int64_t line = 2 * dim<kDim>() * int64_t{sizeof(bf16)};
    const bf16* values = values_of(task.section, at.step) + 2 * at.dim;
    float* out = to_.out + at.dim;
    const int64_t out_line = to_.stride * int64_t{sizeof(float)};
    const bool is_last = at.step + 1 == task.section.end_step;
    const bool is_lower = at.dim % (2 * kTurnDims) == 0;
    if (turn % 2 == 0) values_at<kDim>(turn + kTurnsToFirstLines).first_lines();
    const ValueAsk ask = values_at<kDim>(turn + kTurnsAhead);
    if (is_lower && at.step == task.section.first_step) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    _tile_loadd(6, task.weights + at.step * kAmxDepth, kWeightStride * sizeof(bf16));
    ask.half<0>();
    _tile_loadd(7, values, line);
    if (is_lower) {
      _tile_dpbf16ps(0, 6, 7);
      ask.half<1>();
      _tile_loadd(7, values + 2 * kAmxColumns, line);
      _tile_dpbf16ps(1, 6, 7);
      if (!is_last) return;
      _tile_stored(0, out, out_line);
      _tile_stored(1, out + kAmxColumns, out_line);
    } else {
      _tile_dpbf16ps(2, 6, 7);
      ask.half<1>();
      _tile_loadd(7, values + 2 * kAmxColumns, line);
      _tile_dpbf16ps(3, 6, 7);
      if (!is_last) return;
      _tile_stored(2, out, out_line);
      _tile_stored(3, out + kAmxColumns, out_line);
    }
  }

  void add_weights(const Task& task) {
    _tile_zero(4);
    _tile_loadd(7, kOnes.value, 2 * kAmxColumns * sizeof(bf16));
    for (int step = task.section.first_step; step < task.section.end_step; ++step) {
      _tile_loadd(6, task.weights + step * kAmxDepth, kWeightStride * sizeof(bf16));
      _tile_dpbf16ps(4, 6, 7);
    }
    _tile_stored(4, sums_, kAmxColumns * sizeof(float));
  }

  // Asks for the keys of a turn: 16 pairs of dims of 32 tokens.
  struct KeyAsk {
    const bf16* lower;
    const bf16* upper;
    int64_t line;

    __attribute__((always_inline)) void next_half() {
      if (lower == nullptr) return;
      each<8>([&](auto) FS_INLINE {
        __builtin_prefetch(lower);
        __builtin_prefetch(upper);
        lower += line;
        upper += line;
      });
    }
    __attribute__((always_inline)) void first_lines() const {
      if (lower == nullptr) return;
      prefetch(lower);
      prefetch(upper);
      prefetch(lower + line);
      prefetch(upper + line);
    }
  };
  // Of a turn of the section whose scores are made, or, beyond its last one, of the section to come.
  template <int64_t kDim>
  KeyAsk keys_at(int turn) const {
    const Task* task = score_;
    if (turn >= num_turns<kDim>(task)) {
      turn -= num_turns<kDim>(task);
      task = coming_;
      if (turn >= num_turns<kDim>(task)) return {nullptr, nullptr, 0};
    }
    const Turn at = key_turn<kDim>(*task, turn);
    const int64_t offset = at.dim / 2 * key_line();
    const bf16* const* keys = task->section.keys + 2 * at.step;
    return {keys[0] + offset, keys[1] + offset, key_line()};
  }

  // Asks for the values of a turn, all dims of its pass for half of the tokens: 8 pairs of tokens of four
  // lines.
  struct ValueAsk {
    const bf16* values;
    int64_t line;

    template <int kHalf>
    __attribute__((always_inline)) void half() const {
      if (values == nullptr) return;
      const bf16* pair = values + kHalf * 4 * line;
      each<4>([&](auto) FS_INLINE {
        each<4>([&](auto tile) FS_INLINE { __builtin_prefetch(pair + tile.value * 32); });
        pair += line;
      });
    }
    __attribute__((always_inline)) void first_lines() const {
      if (values == nullptr) return;
      each<4>([&](auto tile) FS_INLINE { prefetch(values + tile.value * 32); });
    }
  };
  // Of a turn of the section whose values are multiplied, or, beyond its last one, of the one that follows.
  template <int64_t kDim>
  ValueAsk values_at(int turn) const {
    const Task* task = value_;
    if (turn >= num_turns<kDim>(task)) {
      turn -= num_turns<kDim>(task);
      task = weigh_;
      if (turn >= num_turns<kDim>(task)) return {nullptr, 0};
    }
    const Turn at = value_turn<kDim>(*task, turn);
    const int64_t half = at.dim / kTurnDims % 2;
    const bf16* values = task->section.values[2 * at.step + half];
    return {values == nullptr ? nullptr : values + 2 * (at.dim - half * kTurnDims), 2 * dim<kDim>()};
  }

#else

  void run_stages() {
    const int64_t dim = shape_.head_dim;
    if (score_ != nullptr) {
      const KvSection& section = score_->section;
      for (int step = section.first_step; step < section.end_step; ++step) {
        tiles_.multiply(score_->scores + step * kAmxDepth, kScoreStride, score_->rows->q, dim, num_rows_,
                        dim / kAmxDepth, 2 * shape_.block_size, [&](int64_t depth, int half) {
                          return section.keys[2 * step + half] + depth * kAmxDepth * shape_.block_size;
                        });
      }
    }
    if (weigh_ != nullptr) {
      find_maxima(*weigh_);
      const KvSection& section = weigh_->section;
      for (int step = section.first_step; step < section.end_step; ++step) weigh_step(*weigh_, step);
    }
    if (value_ == nullptr) return;
    const KvSection& section = value_->section;
    const bf16* weights = value_->weights + section.first_step * kAmxDepth;
    for (int64_t d = 0; d < dim; d += 2 * kAmxColumns) {
      tiles_.multiply(to_.out + d, to_.stride, weights, kWeightStride, num_rows_, value_->num_steps(),
                      2 * dim, [&](int64_t step, int column) {
                        return values_of(section, section.first_step + static_cast<int>(step)) + 2 * d +
                               column * 2 * kAmxColumns;
                      });
    }
    tiles_.multiply<1>(sums_, kAmxColumns, weights, kWeightStride, num_rows_, value_->num_steps(),
                       2 * kAmxColumns, [&](int64_t, int) { return kOnes.value; });
  }

#endif

  const Attention& op_;
  const AttentionShape& shape_;
  KvCache<bf16> cache_;
  AmxQueries queries_;
  AttentionTiles& tiles_;
  int64_t num_rows_ = 0;
  Task* coming_ = nullptr;
  Task* score_ = nullptr;
  Task* weigh_ = nullptr;
  Task* value_ = nullptr;
  // Of the unit whose values are multiplied:
  const Rows* rows_of_results_ = nullptr;
  bool is_first_of_span_ = true;
  Partials to_{};
  SpanResults<kMaxRows> results_;
  PartialsMemory<kMaxRows> section_;
  int64_t next_rows_ = 0, next_task_ = 0;
  float shifts_[kMaxRows];
  Rows rows_[kInFlight];
  Task tasks_[kInFlight];
  alignas(64) float sums_[kMaxRows * kAmxColumns];
  alignas(64) bf16 copied_[2 * kAmxDepth * kMaxHeadDim];
};

}  // namespace fs::FS_ISA

#endif
