// SPDX-License-Identifier: Apache-2.0
//
// Attention over the paged KV cache by the items of an AttentionPlan: online softmax in base 2 (Milakov and
// Gimelshein 2018) over tiles of keys at absolute positions, in float32.
//
// Each span of tokens yields a partial (maximum, sum, output) computed from nothing; partials are folded from
// left to right. Items without a slot write the output, the others store partials that a second pass folds. A
// unit of work is one item for one KV head. Bound: memory for decodes, fma throughput for chunks.
#include <type_traits>

#include "cpu/attention_check.h"
#include "cpu/attention_fold.h"
#include "cpu/attention_tile.h"
#include "cpu/attention_widen.h"
#include "cpu/parallel.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

constexpr int kBlockRows = 48;             // rows that walk the KV tokens together
constexpr int kScratchFloats = 24 * 1024;  // q and two outputs of those rows, on the stack

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
  Unit(const Attention& op, const AttentionShape& shape, const AttentionItem& item, int64_t kv_head)
      : op_(op), shape_(shape), item_(item), kv_head_(kv_head), cache_(op.kv_cache) {}

  void run() {
    const int64_t num_packed = item_.num_rows * shape_.group;
    const int64_t fitting = kScratchFloats / (3 * shape_.stride);
    const int64_t step = fitting < kBlockRows ? fitting : kBlockRows;
    // Many rows over the same tokens, such as those of a shared prefix, go span by span: its K and V come
    // from memory once and stay in L2 for all of them.
    const int64_t first_span = item_.kv_begin / op_.span;
    const int64_t end_span = (item_.kv_end + op_.span - 1) / op_.span;
    const int64_t spans = num_packed > step && item_.num_parts > 0 ? 1 : end_span - first_span;
    for (int64_t s = first_span; s < end_span; s += spans) {
      for (int64_t row = 0; row < num_packed; row += step) {
        run_rows(row, num_packed - row < step ? num_packed - row : step, s, s + spans);
      }
    }
  }

 private:
  // Packed row r is query head r % group of the KV head's, of the item's token r / group.
  int64_t token_of(int64_t packed) const { return packed / shape_.group; }
  int64_t head_of(int64_t packed) const { return kv_head_ * shape_.group + packed % shape_.group; }

  // Rows [first, first + count) over the spans [first_span, end_span) of the item.
  void run_rows(int64_t first, int64_t count, int64_t first_span, int64_t end_span) {
    alignas(64) float scratch[kScratchFloats];
    alignas(64) float lane_sums[kBlockRows * kLanes];
    float* q = scratch;
    Partials buffers[2];
    for (int i = 0; i < 2; ++i) {
      buffers[i].out = scratch + (i + 1) * count * shape_.stride;
      buffers[i].stride = shape_.stride;
    }
    load_queries(first, count, q);
    find_visible(first, count);

    const int64_t item_span = item_.kv_begin / op_.span;
    Partials* folded = nullptr;
    Partials* current = &buffers[0];
    for (int64_t s = first_span; s < end_span; ++s) {
      attend_span(count, s * op_.span, q, current, lane_sums);
      if (item_.num_parts > 1) {
        store_partials(first, count, s - item_span, current);
      } else if (folded == nullptr) {
        folded = current;
        current = &buffers[1];
      } else {
        for (int64_t r = 0; r < count; ++r) fold(folded->row(r), current->row(r), shape_.head_dim);
      }
    }
    if (item_.num_parts > 1) return;
    if (item_.num_parts == 1) {
      if (first_span == item_span) return store_partials(first, count, 0, folded);
      for (int64_t r = 0; r < count; ++r) fold(stored(first + r, 0), folded->row(r), shape_.head_dim);
      return;
    }
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

  // Which KV tokens of this item each row sees.
  void find_visible(int64_t first, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t position = item_.position + token_of(first + r);
      const int64_t begin = op_.window == 0 ? 0 : position - op_.window + 1;
      visible_begin_[r] = begin > item_.kv_begin ? begin : item_.kv_begin;
      visible_end_[r] = position + 1 < item_.kv_end ? position + 1 : item_.kv_end;
    }
  }

  void attend_span(int64_t count, int64_t span_begin, const float* q, Partials* partials, float* lane_sums) {
    const int64_t stride = shape_.stride;
    std::memset(partials->out, 0, static_cast<size_t>(count * stride) * sizeof(float));
    std::memset(lane_sums, 0, static_cast<size_t>(count * kLanes) * sizeof(float));
    for (int64_t r = 0; r < count; ++r) partials->max[r] = -__builtin_inff();

    const RowGroup rows{q, partials->out, partials->max, lane_sums, stride, {}, {}};
    const bool is_wide = shape_.head_dim % kLanes != 0 || (sizeof(KV) == 2 && count > kGroupRows);
    const int64_t span_end = span_begin + op_.span;
    const int64_t begin = visible_begin_[0];  // later rows see later tokens
    const int64_t end = visible_end_[count - 1] < span_end ? visible_end_[count - 1] : span_end;
    int64_t at = span_begin;
    while (at < end && end_of_tile(at, span_end) <= begin) at = end_of_tile(at, span_end);
    if (at < end) {
      Tile<KV> tile = load_tile(at, end_of_tile(at, span_end), begin, end);
      if (!is_wide) {
        prefetch_keys(tile, 0, kTileVectors);
        prefetch_values(tile, 0, static_cast<int>(shape_.head_dim / kLanes));
      }
      while (at < end) {
        const int64_t next = end_of_tile(at, span_end);
        Tile<KV> next_tile = tile;
        if (next < end) next_tile = load_tile(next, end_of_tile(next, span_end), begin, end);
        if (is_wide) {
          const int from = static_cast<int>(begin > at ? begin - at : 0);
          attend_tile(rows, count, at, next, widen(tile, from, tile.end, stride, &wide_), nullptr);
        } else {
          attend_tile(rows, count, at, next, tile, next < end ? &next_tile : nullptr);
        }
        tile = next_tile;
        at = next;
      }
    }
    for (int64_t r = 0; r < count; ++r) partials->sum[r] = reduce_add(load(lane_sums + r * kLanes));
  }

  // Tiles are whole blocks up to kTileTokens, or up to kTileTokens of one block, from the start of a span.
  int64_t end_of_tile(int64_t at, int64_t span_end) const {
    const int64_t size = shape_.block_size;
    int64_t tokens = kTileTokens;
    if (size < kTileTokens) tokens = kTileTokens / size * size;
    if (size > kTileTokens && size - at % size < tokens) tokens = size - at % size;
    return at + tokens < span_end ? at + tokens : span_end;
  }

  template <class T>
  void attend_tile(const RowGroup& rows, int64_t count, int64_t at, int64_t next, const Tile<T>& tile,
                   const std::type_identity_t<Tile<T>>* next_tile) const {
    for (int64_t r = 0; r < count; r += kGroupRows) {
      RowGroup group{rows.q + r * rows.stride,
                     rows.out + r * rows.stride,
                     rows.max + r,
                     rows.lane_sums + r * kLanes,
                     rows.stride,
                     {},
                     {}};
      const int num_rows = static_cast<int>(count - r < kGroupRows ? count - r : kGroupRows);
      for (int i = 0; i < num_rows; ++i) {
        const int64_t from = visible_begin_[r + i] > at ? visible_begin_[r + i] : at;
        const int64_t to = visible_end_[r + i] < next ? visible_end_[r + i] : next;
        group.begin[i] = from < to ? static_cast<int>(from - at) : kTileTokens;
        group.end[i] = from < to ? static_cast<int>(to - at) : 0;
      }
      attend<T>(group, tile, r == 0 ? next_tile : nullptr, num_rows);
    }
  }

  // The tile of tokens [at, next). Only blocks that hold some of the tokens [begin, end) are looked up; other
  // tokens get the address of one that is.
  Tile<KV> load_tile(int64_t at, int64_t next, int64_t begin, int64_t end) const {
    Tile<KV> tile;
    begin = begin > at ? begin : at;
    end = end < next ? end : next;
    tile.end = static_cast<int>(end - at);
    tile.key_line = (sizeof(KV) == 2 ? 2 : 1) * shape_.block_size;
    tile.value_dims = shape_.head_dim;
    tile.head_dim = shape_.head_dim;
    const int32_t* table = op_.block_tables.ptr<const int32_t>() + item_.request * op_.block_tables.shape[1];
    const int64_t first_block = begin / shape_.block_size;
    const int64_t last_block = (end - 1) / shape_.block_size;
    int64_t block = at / shape_.block_size;
    int64_t offset = at % shape_.block_size;
    for (int i = 0; i < kTileTokens / 16; ++i) {
      const int64_t known = block < first_block ? first_block : block < last_block ? block : last_block;
      const KV* keys = cache_.keys(table[known], kv_head_);
      for (int j = 0; j < 16 / kLanes; ++j) {
        tile.keys[i * (16 / kLanes) + j] = keys + key_index<KV>(offset + j * kLanes, 0, shape_.block_size);
      }
      tile.values[i] = cache_.values(table[known], kv_head_) + value_index<KV>(offset, 0, shape_.head_dim);
      offset += 16;
      if (offset == shape_.block_size) {
        offset = 0;
        block += 1;
      }
    }
    return tile;
  }

  // Where the workspace has a packed row's partial.
  Partial stored(int64_t packed, int64_t part) const {
    const int64_t slot = item_.slot + part * item_.num_rows + token_of(packed);
    float* at =
        op_.workspace.ptr<float>() + slot * shape_.slot_size + head_of(packed) * (shape_.head_dim + 2);
    return {at, at + shape_.head_dim, at + shape_.head_dim + 1};
  }

  void store_partials(int64_t first, int64_t count, int64_t part, Partials* partials) const {
    for (int64_t r = 0; r < count; ++r) {
      const Partial to = stored(first + r, part);
      std::memcpy(to.out, partials->out + r * shape_.stride,
                  static_cast<size_t>(shape_.head_dim) * sizeof(float));
      *to.max = partials->max[r];
      *to.sum = partials->sum[r];
    }
  }

  const Attention& op_;
  const AttentionShape& shape_;
  const AttentionItem& item_;
  int64_t kv_head_;
  KvCache<KV> cache_;
  int64_t visible_begin_[kBlockRows];
  int64_t visible_end_[kBlockRows];
  WideTile wide_;
};

// The rows of one merge, for the query heads of one KV head.
void merge_rows(const Attention& op, const AttentionShape& shape, const AttentionMerge& merge,
                int64_t kv_head) {
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

void attention(const Attention& op, const OpContext&) {
  check_kv_cache(op.kv_cache, "attention");
  FS_CHECK(op.kv_cache.shape[2] >= 1 && op.q.shape[1] >= 1 && op.q.shape[1] % op.kv_cache.shape[2] == 0,
           "attention: " << op.q.shape[1] << " query heads and " << op.kv_cache.shape[2]
                         << " KV heads; must be a whole multiple");
  const AttentionShape shape(op);
  check_attention(op, shape);

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
