// SPDX-License-Identifier: Apache-2.0
//
// A unit of attention's work: one item for one KV head. Its packed rows go over the spans of its KV tokens;
// what a span yields is written, folded or stored as the plan says. Spans themselves are computed by `Spans`:
//
//   static constexpr int kBlockRows     rows that walk the KV tokens together
//   static constexpr int64_t kL2Bytes   KV of one head that stays in L2 for the rows after them
//   static constexpr int64_t kRowsPerTokenRead   packed rows computed with a token while it is read
//   Spans(const Attention&, const AttentionShape&)
//   void begin(const PackedRows& rows, const PackedRows* following, int64_t first, int64_t count)
//                                       the next rows are [first, first + count) of `rows`; the worker's
//                                       next unit, if known, is `following`
//   void attend_span(int64_t span_begin, const Partials& to)
//                                       their partials over one span, from nothing
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/attention_check.h"
#include "cpu/attention_fold.h"
#include "cpu/kv_layout.h"
#include "ops/ops.h"
#include "plan/attention_plan.h"

namespace fs::FS_ISA {

// Calls f with a null pointer of the output's element type: float, or bf16 if a product alone reads it.
template <class F>
void visit_output(const Attention& op, const F& f) {
  if (op.out.dtype == DType::bf16) {
    f(static_cast<bf16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

// Packed row r is query head r % group of the KV head's, of the item's token r / group.
struct PackedRows {
  const Attention& op;
  const AttentionShape& shape;
  const AttentionItem& item;
  int64_t kv_head;

  int64_t count() const { return item.num_rows * shape.group; }
  int64_t token_of(int64_t packed) const { return packed / shape.group; }
  // Calls f(i, token, head) for packed rows first + i, i < count: the item's token and the query head.
  template <class F>
  __attribute__((always_inline)) void for_each(int64_t first, int64_t count, const F& f) const {
    int64_t token = first / shape.group;
    int64_t of_group = first % shape.group;
    for (int64_t i = 0; i < count; ++i) {
      f(i, token, kv_head * shape.group + of_group);
      of_group += 1;
      if (of_group == shape.group) {
        of_group = 0;
        token += 1;
      }
    }
  }
  const float* query(int64_t token, int64_t head) const {
    return op.q.ptr<const float>() + (item.row_begin + token) * op.q.stride[0] + head * shape.head_dim;
  }
  template <class Out>
  Out* out(int64_t token, int64_t head) const {
    return op.out.ptr<Out>() + (item.row_begin + token) * op.out.stride[0] + head * shape.head_dim;
  }
  // Where the workspace has a row's partial.
  Partial stored(int64_t token, int64_t head, int64_t part) const {
    const int64_t slot = item.slot + part * item.num_rows + token;
    float* at = op.workspace.ptr<float>() + slot * shape.slot_size + head * (shape.head_dim + 2);
    return {at, at + shape.head_dim, at + shape.head_dim + 1};
  }
  // Which KV tokens of this item a token sees. Later ones see later tokens.
  TokenRange visible(int64_t token) const {
    const int64_t position = item.position + token;
    const int64_t begin = op.window == 0 ? 0 : position - op.window + 1;
    return overlap({begin, position + 1}, {item.kv_begin, item.kv_end});
  }
  int64_t kv_bytes() const {
    const int64_t element = op.kv_cache.dtype == DType::f32 ? 4 : 2;
    return (int64_t{item.kv_end} - item.kv_begin) * 2 * shape.head_dim * element;
  }
  const int32_t* block_table() const {
    return op.block_tables.ptr<const int32_t>() + item.request * op.block_tables.shape[1];
  }
};

template <int kRows>
struct PartialsMemory {
  alignas(64) float out[(kRows + 16) * kMaxHeadDim];
  float max[kRows];
  float sum[kRows];

  Partials partials(int64_t stride) { return {out, stride, max, sum}; }
};

// The results of some packed rows of a unit, span after span: written, folded or stored as the plan says.
template <int kMaxRows>
class SpanResults {
 public:
  explicit SpanResults(const AttentionShape& shape)
      : dim_(shape.head_dim),
        buffers_{memory_[0].partials(shape.stride), memory_[1].partials(shape.stride)} {}

  // Of rows [first, first + count) over consecutive spans from first_span on.
  void begin(int64_t first, int64_t count, int64_t first_span) {
    first_ = first;
    count_ = count;
    first_span_ = span_ = first_span;
    has_folded_ = false;
  }

  // Where the partials of the next span go, before add() is called.
  const Partials& next() const { return buffers_[has_folded_ ? 1 : 0]; }

  void add(const PackedRows& rows) {
    if (rows.item.num_parts > 1) {
      store(rows, span_ - rows.item.kv_begin / rows.op.span, next());
    } else if (!has_folded_) {
      has_folded_ = true;
    } else {
      fold_rows(count_, [&](int64_t r) { return buffers_[0].row(r); }, buffers_[1], dim_);
    }
    span_ += 1;
  }

  void finish(const PackedRows& rows) const {
    if (rows.item.num_parts > 1) return;
    const Partials& folded = buffers_[0];
    if (rows.item.num_parts == 1) {
      if (first_span_ == rows.item.kv_begin / rows.op.span) return store(rows, 0, folded);
      Partial stored[kMaxRows];
      rows.for_each(first_, count_,
                    [&](int64_t r, int64_t token, int64_t head) { stored[r] = rows.stored(token, head, 0); });
      return fold_rows(count_, [&](int64_t r) { return stored[r]; }, folded, dim_);
    }
    visit_output(rows.op, [&](auto* tag) {
      using Out = std::remove_pointer_t<decltype(tag)>;
      rows.for_each(first_, count_, [&](int64_t r, int64_t token, int64_t head) {
        write_output(rows.out<Out>(token, head), folded.row(r), dim_);
      });
    });
  }

 private:
  void store(const PackedRows& rows, int64_t part, const Partials& partials) const {
    rows.for_each(first_, count_, [&](int64_t r, int64_t token, int64_t head) {
      const Partial to = rows.stored(token, head, part);
      std::memcpy(to.out, partials.out + r * partials.stride, static_cast<size_t>(dim_) * sizeof(float));
      *to.max = partials.max[r];
      *to.sum = partials.sum[r];
    });
  }

  int64_t dim_;
  PartialsMemory<kMaxRows> memory_[2];
  const Partials buffers_[2];  // the first has what was folded, if anything was
  int64_t first_ = 0, count_ = 0, first_span_ = 0, span_ = 0;
  bool has_folded_ = false;
};

template <class Spans>
class Unit {
 public:
  Unit(const Attention& op, const AttentionShape& shape) : spans_(op, shape), results_(shape) {}

  // `following` may be nullptr.
  void run(const PackedRows& rows, const PackedRows* following) {
    const int64_t num_packed = rows.count();
    constexpr int64_t kStep = Spans::kBlockRows;
    // Many rows over the same tokens, such as those of a shared prefix, go span by span if there are more
    // than stay in L2: K and V come from memory once.
    const AttentionItem& item = rows.item;
    const int64_t span = rows.op.span;
    const int64_t first_span = item.kv_begin / span;
    const int64_t end_span = (item.kv_end + span - 1) / span;
    const bool stays = num_packed <= kStep || item.num_parts == 0 || rows.kv_bytes() <= Spans::kL2Bytes;
    const int64_t spans = stays ? end_span - first_span : 1;
    for (int64_t s = first_span; s < end_span; s += spans) {
      for (int64_t row = 0; row < num_packed; row += kStep) {
        const int64_t count = num_packed - row < kStep ? num_packed - row : kStep;
        spans_.begin(rows, following, row, count);
        results_.begin(row, count, s);
        for (int64_t of_rows = s; of_rows < s + spans; ++of_rows) {
          spans_.attend_span(of_rows * span, results_.next());
          results_.add(rows);
        }
        results_.finish(rows);
      }
    }
  }

  Spans& spans() { return spans_; }

 private:
  Spans spans_;
  SpanResults<Spans::kBlockRows> results_;
};

// The rows of one merge.
template <class Out>
void merge_rows(const Attention& op, const AttentionShape& shape, const AttentionMerge& merge) {
  constexpr int64_t kHeads = kLanes;  // together
  const int64_t dim = shape.head_dim;
  const int32_t* parts = op.parts.ptr<const int32_t>();
  alignas(64) float buffer[kHeads * kMaxHeadDim];
  for (int64_t row = 0; row < merge.num_rows; ++row) {
    Out* out = op.out.ptr<Out>() + (merge.row_begin + row) * op.out.stride[0];
    for (int64_t head = 0; head < shape.num_heads; head += kHeads) {
      const int64_t count = shape.num_heads - head < kHeads ? shape.num_heads - head : kHeads;
      float max[kHeads] = {};
      float sum[kHeads] = {};
      const Partials folded{buffer, shape.stride, max, sum};
      for (int32_t p = merge.parts_begin; p < merge.parts_end; ++p) {
        float* part = op.workspace.ptr<float>() + (parts[p] + row) * shape.slot_size + head * (dim + 2);
        fold_rows(
            count, [&](int64_t r) { return folded.row(r); },
            [&](int64_t r) {
              float* at = part + r * (dim + 2);
              return Partial{at, at + dim, at + dim + 1};
            },
            dim);
      }
      for (int64_t r = 0; r < count; ++r) {
        if (sum[r] == 0.0f) std::memset(folded.row(r).out, 0, static_cast<size_t>(dim) * sizeof(float));
        write_output(out + (head + r) * dim, folded.row(r), dim);
      }
    }
  }
}

}  // namespace fs::FS_ISA
