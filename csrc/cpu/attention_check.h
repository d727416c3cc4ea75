// SPDX-License-Identifier: Apache-2.0
//
// Attention's arguments as numbers, and the checks that keep the kernel inside its tensors.
#pragma once

#include <cstdint>

#include "core/error.h"
#include "core/simd.h"
#include "ops/ops.h"
#include "plan/attention_plan.h"

namespace fs::FS_ISA {

// The op's arguments, as numbers.
struct AttentionShape {
  int64_t num_heads, num_kv_heads, head_dim, block_size, group;
  int64_t stride;     // of a row in scratch: head_dim up to whole vectors
  int64_t slot_size;  // floats of a workspace slot

  explicit AttentionShape(const Attention& op)
      : num_heads(op.q.shape[1]),
        num_kv_heads(op.kv_cache.shape[2]),
        head_dim(op.q.shape[2]),
        block_size(op.kv_cache.shape[3]),
        group(num_heads / num_kv_heads),
        stride((head_dim + kLanes - 1) / kLanes * kLanes),
        slot_size(num_heads * (head_dim + 2)) {}
};

inline void check_attention_item(const Attention& op, const AttentionShape& shape, int64_t index,
                                 const AttentionItem& item, int64_t num_slots) {
  FS_CHECK(item.row_begin >= 0 && item.num_rows >= 1 && item.num_rows <= op.q.shape[0] - item.row_begin,
           "attention: items[" << index << "] has " << item.num_rows << " rows from " << item.row_begin
                               << "; the step has " << op.q.shape[0]);
  FS_CHECK(item.kv_begin >= 0 && item.kv_begin < item.kv_end && item.position >= 0,
           "attention: items[" << index << "] has KV tokens " << item.kv_begin << " to " << item.kv_end
                               << " at position " << item.position);
  FS_CHECK(item.request >= 0 && item.request < op.block_tables.shape[0],
           "attention: items[" << index << "] is of request " << item.request << "; block_tables has "
                               << op.block_tables.shape[0]);
  const int64_t first_block = item.kv_begin / shape.block_size;
  const int64_t end_block = (item.kv_end + shape.block_size - 1) / shape.block_size;
  FS_CHECK(end_block <= op.block_tables.shape[1],
           "attention: items[" << index << "] reads " << item.kv_end << " tokens; block_tables has "
                               << op.block_tables.shape[1] << " blocks of " << shape.block_size);
  const int64_t num_blocks = op.kv_cache.shape[0];
  const int32_t* table = op.block_tables.ptr<const int32_t>() + item.request * op.block_tables.shape[1];
  for (int64_t b = first_block; b < end_block; ++b) {
    FS_CHECK(table[b] >= 0 && table[b] < num_blocks, "attention: block_tables["
                                                         << item.request << "][" << b << "] is " << table[b]
                                                         << "; the cache has " << num_blocks << " blocks");
  }
  const int64_t num_spans = (item.kv_end + op.span - 1) / op.span - item.kv_begin / op.span;
  FS_CHECK(item.num_parts == 0 || item.num_parts == 1 || item.num_parts == num_spans,
           "attention: items[" << index << "] stores " << item.num_parts << " partials of " << num_spans
                               << " spans; was the plan made with span " << op.span << "?");
  FS_CHECK(item.num_parts == 0 ||
               (item.slot >= 0 && item.slot + int64_t{item.num_parts} * item.num_rows <= num_slots),
           "attention: items[" << index << "] stores " << item.num_parts << " partials of " << item.num_rows
                               << " rows from slot " << item.slot << "; the workspace has " << num_slots);
  FS_CHECK(item.merge_begin >= 0 && item.num_merges >= 0 &&
               item.num_merges <= op.merges.shape[0] - item.merge_begin,
           "attention: items[" << index << "] is part of " << item.num_merges << " merges from "
                               << item.merge_begin << "; there are " << op.merges.shape[0]);
}

inline void check_attention_merge(const Attention& op, int64_t index, const AttentionMerge& merge,
                                  int64_t num_slots) {
  FS_CHECK(merge.row_begin >= 0 && merge.num_rows >= 1 && merge.num_rows <= op.q.shape[0] - merge.row_begin,
           "attention: merges[" << index << "] has " << merge.num_rows << " rows from " << merge.row_begin
                                << "; the step has " << op.q.shape[0]);
  FS_CHECK(
      merge.parts_begin >= 0 && merge.parts_begin <= merge.parts_end && merge.parts_end <= op.parts.shape[0],
      "attention: merges[" << index << "] has parts " << merge.parts_begin << " to " << merge.parts_end
                           << " of " << op.parts.shape[0]);
  const int32_t* parts = op.parts.ptr<const int32_t>();
  for (int32_t p = merge.parts_begin; p < merge.parts_end; ++p) {
    FS_CHECK(parts[p] >= 0 && parts[p] <= num_slots - merge.num_rows,
             "attention: parts[" << p << "] is " << parts[p] << " for " << merge.num_rows
                                 << " rows; the workspace has " << num_slots << " slots");
  }
}

// Everything that could make the kernel touch memory that is not its own.
inline void check_attention(const Attention& op, const AttentionShape& shape) {
  FS_CHECK(op.span >= shape.block_size && op.span % shape.block_size == 0,
           "attention: span is " << op.span << "; must be a multiple of the block size " << shape.block_size);
  FS_CHECK(op.window >= 0, "attention: window is " << op.window << "; must not be negative");
  const int64_t num_slots = op.workspace.shape[0] / shape.slot_size;
  const auto* items = op.items.ptr<const AttentionItem>();
  for (int64_t i = 0; i < op.items.shape[0]; ++i) check_attention_item(op, shape, i, items[i], num_slots);
  const auto* merges = op.merges.ptr<const AttentionMerge>();
  for (int64_t i = 0; i < op.merges.shape[0]; ++i) check_attention_merge(op, i, merges[i], num_slots);
}

}  // namespace fs::FS_ISA
