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

template <class Spans>
class Unit {
 public:
  Unit(const Attention& op, const AttentionShape& shape) : shape_(shape), spans_(op, shape) {}

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
        run_rows(rows, following, row, num_packed - row < kStep ? num_packed - row : kStep, s, s + spans);
      }
    }
  }

 private:
  // Rows [first, first + count) over the spans [first_span, end_span) of the item.
  void run_rows(const PackedRows& rows, const PackedRows* following, int64_t first, int64_t count,
                int64_t first_span, int64_t end_span) {
    spans_.begin(rows, following, first, count);
    const AttentionItem& item = rows.item;
    const int64_t dim = shape_.head_dim;
    const int64_t span = rows.op.span;
    const int64_t item_span = item.kv_begin / span;
    const Partials buffers[2] = {memory_[0].partials(shape_.stride), memory_[1].partials(shape_.stride)};
    const Partials* folded = nullptr;
    const Partials* current = &buffers[0];
    for (int64_t s = first_span; s < end_span; ++s) {
      spans_.attend_span(s * span, *current);
      if (item.num_parts > 1) {
        store_partials(rows, first, count, s - item_span, *current);
      } else if (folded == nullptr) {
        folded = current;
        current = &buffers[1];
      } else {
        fold_rows(count, [&](int64_t r) { return folded->row(r); }, *current, dim);
      }
    }
    if (item.num_parts > 1) return;
    if (item.num_parts == 1) {
      if (first_span == item_span) return store_partials(rows, first, count, 0, *folded);
      Partial stored[Spans::kBlockRows];
      rows.for_each(first, count,
                    [&](int64_t r, int64_t token, int64_t head) { stored[r] = rows.stored(token, head, 0); });
      return fold_rows(count, [&](int64_t r) { return stored[r]; }, *folded, dim);
    }
    visit_output(rows.op, [&](auto* tag) {
      using Out = std::remove_pointer_t<decltype(tag)>;
      rows.for_each(first, count, [&](int64_t r, int64_t token, int64_t head) {
        write_output(rows.out<Out>(token, head), folded->row(r), dim);
      });
    });
  }

  void store_partials(const PackedRows& rows, int64_t first, int64_t count, int64_t part,
                      const Partials& partials) const {
    rows.for_each(first, count, [&](int64_t r, int64_t token, int64_t head) {
      const Partial to = rows.stored(token, head, part);
      std::memcpy(to.out, partials.out + r * partials.stride,
                  static_cast<size_t>(shape_.head_dim) * sizeof(float));
      *to.max = partials.max[r];
      *to.sum = partials.sum[r];
    });
  }

  const AttentionShape& shape_;
  Spans spans_;
  PartialsMemory<Spans::kBlockRows> memory_[2];
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
