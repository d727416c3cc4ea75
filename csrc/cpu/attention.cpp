// SPDX-License-Identifier: Apache-2.0
//
// Attention over the paged KV cache by the items of an AttentionPlan: online softmax in base 2 (Milakov and
// Gimelshein 2018) over tiles of keys at absolute positions, in float32.
//
// Each span of tokens yields a partial (maximum, sum, output) computed from nothing; partials are folded from
// left to right. Items without a slot write the output, the others store partials that a second pass folds. A
// unit of work is one item for one KV head. Bound: memory for decodes, fma throughput for chunks.
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"
#include "ops/ops.h"
#include "plan/attention_plan.h"

namespace fs::FS_ISA {

namespace {

constexpr int kBlockRows = 48;             // rows that walk the KV tokens together
constexpr int kScratchFloats = 24 * 1024;  // q and two outputs of those rows, on the stack
constexpr int kTileTokens = 64;            // of a tile, if blocks are smaller

// The op's arguments, as numbers.
struct Shape {
  int64_t num_heads, num_kv_heads, head_dim, block_size, group;
  int64_t stride;      // of a row in scratch: head_dim up to whole vectors
  int64_t tile;        // tokens
  int64_t slot_size;   // floats of a workspace slot
  int64_t block_rows;  // as many as the scratch holds

  explicit Shape(const Attention& op)
      : num_heads(op.q.shape[1]),
        num_kv_heads(op.kv_cache.shape[2]),
        head_dim(op.q.shape[2]),
        block_size(op.kv_cache.shape[3]),
        group(num_heads / num_kv_heads),
        stride((head_dim + kLanes - 1) / kLanes * kLanes),
        tile(block_size < kTileTokens ? kTileTokens / block_size * block_size : block_size),
        slot_size(num_heads * (head_dim + 2)),
        block_rows(kScratchFloats / (3 * stride) < kBlockRows ? kScratchFloats / (3 * stride) : kBlockRows) {}
};

// softmax(scores) V of one row over some tokens, unnormalised. sum is 0 if it saw none.
struct Partial {
  float* out;
  float* max;
  float* sum;
};

// a = a + b, where b's tokens come after a's.
void fold(const Partial& a, const Partial& b, int64_t dim) {
  if (*b.sum == 0.0f) return;
  if (*a.sum == 0.0f) {
    std::memcpy(a.out, b.out, static_cast<size_t>(dim) * sizeof(float));
    *a.max = *b.max;
    *a.sum = *b.sum;
    return;
  }
  const float highest = *a.max > *b.max ? *a.max : *b.max;
  float factor_a[kLanes];
  float factor_b[kLanes];
  store(factor_a, exp2(set1(*a.max - highest)));
  store(factor_b, exp2(set1(*b.max - highest)));
  const vf of_a = set1(factor_a[0]);
  const vf of_b = set1(factor_b[0]);
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(a.out + d, fma(load(b.out + d), of_b, load(a.out + d) * of_a));
  if (const int rest = static_cast<int>(dim - d); rest > 0) {
    store_first(a.out + d, fma(load_first(b.out + d, rest), of_b, load_first(a.out + d, rest) * of_a), rest);
  }
  *a.max = highest;
  *a.sum = *a.sum * factor_a[0] + *b.sum * factor_b[0];
}

void write_output(float* out, const Partial& from, int64_t dim) {
  const float scale = *from.sum == 0.0f ? 0.0f : 1.0f / *from.sum;
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(from.out + d) * set1(scale));
  for (; d < dim; ++d) out[d] = from.out[d] * scale;
}

// The partials of up to kBlockRows packed rows over one span, or the fold of several.
struct Partials {
  float* out;
  int64_t stride;
  float max[kBlockRows];
  float sum[kBlockRows];

  Partial row(int64_t r) { return {out + r * stride, max + r, sum + r}; }
};

template <class KV>
class Unit {
 public:
  Unit(const Attention& op, const Shape& shape, const AttentionItem& item, int64_t kv_head)
      : op_(op), shape_(shape), item_(item), kv_head_(kv_head), cache_(op.kv_cache) {}

  void run() {
    const int64_t num_packed = item_.num_rows * shape_.group;
    for (int64_t row = 0; row < num_packed; row += shape_.block_rows) {
      run_rows(row, num_packed - row < shape_.block_rows ? num_packed - row : shape_.block_rows);
    }
  }

 private:
  // Packed row r is query head r % group of the KV head's, of the item's token r / group.
  int64_t token_of(int64_t packed) const { return packed / shape_.group; }
  int64_t head_of(int64_t packed) const { return kv_head_ * shape_.group + packed % shape_.group; }

  void run_rows(int64_t first, int64_t count) {
    alignas(64) float scratch[kScratchFloats];
    alignas(64) float lane_sums[kBlockRows * kLanes];
    float* q = scratch;
    Partials buffers[2];
    for (int i = 0; i < 2; ++i) {
      buffers[i].out = scratch + (i + 1) * count * shape_.stride;
      buffers[i].stride = shape_.stride;
    }
    load_queries(first, count, q);

    const int64_t span = op_.span;
    const int64_t first_span = item_.kv_begin / span;
    const int64_t end_span = (item_.kv_end + span - 1) / span;
    const bool store_each = item_.num_parts > 1;
    Partials* folded = nullptr;
    Partials* current = &buffers[0];
    for (int64_t s = first_span; s < end_span; ++s) {
      attend_span(first, count, s * span, q, current, lane_sums);
      if (store_each) {
        store_partials(first, count, s - first_span, current);
      } else if (folded == nullptr) {
        folded = current;
        current = &buffers[1];
      } else {
        for (int64_t r = 0; r < count; ++r) fold(folded->row(r), current->row(r), shape_.head_dim);
      }
    }
    if (store_each) return;
    if (item_.num_parts == 1) return store_partials(first, count, 0, folded);
    for (int64_t r = 0; r < count; ++r) {
      float* out = op_.out.ptr<float>() + (item_.row_begin + token_of(first + r)) * op_.out.stride[0] +
                   head_of(first + r) * shape_.head_dim;
      write_output(out, folded->row(r), shape_.head_dim);
    }
  }

  // Scaled such that 2^(q . k) = exp(scale * q . k).
  void load_queries(int64_t first, int64_t count, float* q) const {
    const float scale = op_.scale * 1.44269504f;
    for (int64_t r = 0; r < count; ++r) {
      const float* from = op_.q.ptr<const float>() +
                          (item_.row_begin + token_of(first + r)) * op_.q.stride[0] +
                          head_of(first + r) * shape_.head_dim;
      for (int64_t d = 0; d < shape_.head_dim; ++d) q[r * shape_.stride + d] = from[d] * scale;
    }
  }

  // KV tokens [begin, end) of this item that the packed row sees.
  int64_t visible_begin(int64_t packed) const {
    const int64_t position = item_.position + token_of(packed);
    const int64_t begin = op_.window == 0 ? 0 : position - op_.window + 1;
    return begin > item_.kv_begin ? begin : item_.kv_begin;
  }
  int64_t visible_end(int64_t packed) const {
    const int64_t end = item_.position + token_of(packed) + 1;
    return end < item_.kv_end ? end : item_.kv_end;
  }

  void attend_span(int64_t first, int64_t count, int64_t span_begin, const float* q, Partials* partials,
                   float* lane_sums) {
    const int64_t stride = shape_.stride;
    std::memset(partials->out, 0, static_cast<size_t>(count * stride) * sizeof(float));
    std::memset(lane_sums, 0, static_cast<size_t>(count * kLanes) * sizeof(float));
    for (int64_t r = 0; r < count; ++r) partials->max[r] = -__builtin_inff();

    const int64_t span_end = span_begin + op_.span;
    const int64_t begin = visible_begin(first);
    int64_t end = visible_end(first + count - 1);
    end = end < span_end ? end : span_end;
    const int64_t skipped = begin > span_begin ? (begin - span_begin) / shape_.tile : 0;
    for (int64_t at = span_begin + skipped * shape_.tile; at < end; at += shape_.tile) {
      const int64_t tile_end = at + shape_.tile < span_end ? at + shape_.tile : span_end;
      Tile<KV> tile;
      load_tile(at, begin, tile_end < end ? tile_end : end, &tile);
      for (int64_t r = 0; r < count; r += kGroupRows) {
        RowGroup group;
        group.q = q + r * stride;
        group.out = partials->out + r * stride;
        group.max = partials->max + r;
        group.lane_sums = lane_sums + r * kLanes;
        group.stride = stride;
        const int num_rows = static_cast<int>(count - r < kGroupRows ? count - r : kGroupRows);
        for (int i = 0; i < num_rows; ++i) {
          const int64_t from = visible_begin(first + r + i);
          const int64_t to = visible_end(first + r + i);
          group.begin[i] = static_cast<int>((from > at ? from : at) - at);
          group.end[i] = static_cast<int>((to < tile_end ? to : tile_end) - at);
        }
        attend<KV>(group, tile, num_rows);
      }
    }
    for (int64_t r = 0; r < count; ++r) partials->sum[r] = reduce_add(load(lane_sums + r * kLanes));
  }

  // Block addresses for the tokens [begin, end) of the tile at `at`; others are never looked at.
  void load_tile(int64_t at, int64_t begin, int64_t end, Tile<KV>* tile) const {
    tile->block_size = shape_.block_size;
    tile->head_dim = shape_.head_dim;
    const int32_t* table = op_.block_tables.ptr<const int32_t>() + item_.request * op_.block_tables.shape[1];
    const int64_t first_block = at / shape_.block_size;
    for (int64_t b = (begin > at ? begin : at) / shape_.block_size; b * shape_.block_size < end; ++b) {
      tile->keys[b - first_block] = cache_.keys(table[b], kv_head_);
      tile->values[b - first_block] = cache_.values(table[b], kv_head_);
    }
  }

  void store_partials(int64_t first, int64_t count, int64_t part, Partials* partials) const {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t slot = item_.slot + part * item_.num_rows + token_of(first + r);
      float* to =
          op_.workspace.ptr<float>() + slot * shape_.slot_size + head_of(first + r) * (shape_.head_dim + 2);
      std::memcpy(to, partials->out + r * shape_.stride,
                  static_cast<size_t>(shape_.head_dim) * sizeof(float));
      to[shape_.head_dim] = partials->max[r];
      to[shape_.head_dim + 1] = partials->sum[r];
    }
  }

  const Attention& op_;
  const Shape& shape_;
  const AttentionItem& item_;
  int64_t kv_head_;
  KvCache<KV> cache_;
};

// The rows of one merge, for the query heads of one KV head.
void merge_rows(const Attention& op, const Shape& shape, const AttentionMerge& merge, int64_t kv_head) {
  const int64_t dim = shape.head_dim;
  const int32_t* parts = op.parts.ptr<const int32_t>();
  for (int64_t row = 0; row < merge.num_rows; ++row) {
    for (int64_t head = kv_head * shape.group; head < (kv_head + 1) * shape.group; ++head) {
      alignas(64) float buffer[kMaxHeadDim];
      float max = 0.0f;
      float sum = 0.0f;
      const Partial folded{buffer, &max, &sum};
      std::memset(buffer, 0, sizeof(buffer));
      for (int32_t p = merge.parts_begin; p < merge.parts_end; ++p) {
        float* part = op.workspace.ptr<float>() + (parts[p] + row) * shape.slot_size + head * (dim + 2);
        fold(folded, {part, part + dim, part + dim + 1}, dim);
      }
      write_output(op.out.ptr<float>() + (merge.row_begin + row) * op.out.stride[0] + head * dim, folded,
                   dim);
    }
  }
}

void check_item(const Attention& op, const Shape& shape, int64_t index, const AttentionItem& item,
                int64_t num_slots) {
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
}

void check_merge(const Attention& op, int64_t index, const AttentionMerge& merge, int64_t num_slots) {
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
void check(const Attention& op, const Shape& shape) {
  FS_CHECK(op.span >= shape.block_size && op.span % shape.block_size == 0,
           "attention: span is " << op.span << "; must be a multiple of the block size " << shape.block_size);
  FS_CHECK(op.window >= 0, "attention: window is " << op.window << "; must not be negative");
  const int64_t num_slots = op.workspace.shape[0] / shape.slot_size;
  const auto* items = op.items.ptr<const AttentionItem>();
  for (int64_t i = 0; i < op.items.shape[0]; ++i) check_item(op, shape, i, items[i], num_slots);
  const auto* merges = op.merges.ptr<const AttentionMerge>();
  for (int64_t i = 0; i < op.merges.shape[0]; ++i) check_merge(op, i, merges[i], num_slots);
}

void attention(const Attention& op, const OpContext&) {
  FS_CHECK(op.q.dtype == DType::f32 && op.out.dtype == DType::f32,
           "attention: out and q are " << name_of(op.out.dtype) << " and " << name_of(op.q.dtype)
                                       << "; the cpu kernel takes float32");
  check_kv_cache(op.kv_cache, "attention");
  FS_CHECK(op.kv_cache.shape[2] >= 1 && op.q.shape[1] >= 1 && op.q.shape[1] % op.kv_cache.shape[2] == 0,
           "attention: " << op.q.shape[1] << " query heads and " << op.kv_cache.shape[2]
                         << " KV heads; must be a whole multiple");
  const Shape shape(op);
  check(op, shape);

  // Head by head: a block that several items share stays in the cache meanwhile.
  const int64_t num_items = op.items.shape[0];
  const auto* items = op.items.ptr<const AttentionItem>();
  const bool is_float = op.kv_cache.dtype == DType::f32;
  parallel_rows(num_items * shape.num_kv_heads, 1, [&](int64_t unit, int64_t, int) {
    if (is_float) {
      Unit<float>(op, shape, items[unit % num_items], unit / num_items).run();
    } else {
      Unit<bf16>(op, shape, items[unit % num_items], unit / num_items).run();
    }
  });
  const auto* merges = op.merges.ptr<const AttentionMerge>();
  parallel_rows(op.merges.shape[0] * shape.num_kv_heads, 1, [&](int64_t unit, int64_t, int) {
    merge_rows(op, shape, merges[unit / shape.num_kv_heads], unit % shape.num_kv_heads);
  });
}

}  // namespace

FS_REGISTER_CPU(Attention, attention, DType::f32 | DType::bf16)

}  // namespace fs::FS_ISA
