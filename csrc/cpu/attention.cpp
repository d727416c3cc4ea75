// SPDX-License-Identifier: Apache-2.0
//
// Attention over the paged KV cache by the items of an AttentionPlan: online softmax in base 2 (Milakov and
// Gimelshein 2018) over tiles of keys at absolute positions, in float32.
//
// Each span of tokens yields a partial (maximum, sum, output) computed from nothing; partials are folded from
// left to right. Items without a slot write the output, the others store partials that a second pass folds. A
// unit of work is one item for one KV head. Bound: memory for decodes, fma throughput for chunks.
#include <type_traits>

#include "cpu/attention_amx.h"
#include "cpu/attention_runs.h"
#include "cpu/attention_tile.h"
#include "cpu/attention_unit.h"
#include "cpu/attention_widen.h"
#include "cpu/parallel.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

#if defined(FS_SIMD_AMX)

// What runs caches that tiles do not take.
#if defined(FS_SIMD_EMULATED)
constexpr Isa kVectorIsa = Isa::avx512bf16_emulated;
#else
constexpr Isa kVectorIsa = Isa::avx512bf16;
#endif

#else

// The rows of a unit with fma: a group of rows and a tile of keys at a time.
template <class KV>
class VectorSpans {
 public:
  static constexpr int kBlockRows = 96;
  static constexpr int64_t kL2Bytes = 0;
  static constexpr int64_t kRowsPerTokenRead = 4;

  VectorSpans(const Attention& op, const AttentionShape& shape)
      : op_(op), shape_(shape), cache_(op.kv_cache) {}

  void begin(const PackedRows& rows, const PackedRows* following, int64_t first, int64_t count) {
    rows_ = &rows;
    count_ = count;
    // What is read first of the rows after these, and written last of these: each row lies in a page of its
    // own.
    const int64_t next = first + count;
    if (next < rows.count()) {
      ask_for_queries(rows, next);
    } else if (following != nullptr) {
      ask_for_queries(*following, 0);
    }
    if (rows.item.num_parts == 0) {
      visit_output(rows.op, [&](auto* tag) {
        using Out = std::remove_pointer_t<decltype(tag)>;
        rows.for_each(first, count,
                      [&](int64_t, int64_t token, int64_t head) { ask_for(rows.out<Out>(token, head)); });
      });
    }
    const float scale = op_.scale * 1.44269504f;  // 2^(q . k) = exp(op.scale * q . k)
    rows.for_each(first, count, [&](int64_t r, int64_t token, int64_t head) {
      const float* from = rows.query(token, head);
      for (int64_t d = 0; d < shape_.head_dim; ++d) q_[r * shape_.stride + d] = from[d] * scale;
      const TokenRange visible = rows.visible(token);
      visible_begin_[r] = visible.begin;
      visible_end_[r] = visible.end;
    });
  }

  void attend_span(int64_t span_begin, const Partials& partials) {
    const int64_t count = count_;
    const int64_t stride = shape_.stride;
    std::memset(partials.out, 0, static_cast<size_t>(count * stride) * sizeof(float));
    std::memset(lane_sums_, 0, static_cast<size_t>(count * kLanes) * sizeof(float));
    for (int64_t r = 0; r < count; ++r) partials.max[r] = -__builtin_inff();

    const RowGroup rows{q_, partials.out, partials.max, lane_sums_, stride, {}, {}};
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
    for (int64_t r = 0; r < count; ++r) partials.sum[r] = reduce_add(load(lane_sums_ + r * kLanes));
  }

 private:
  template <class T>
  void ask_for(const T* row) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t d = 0; d < shape_.head_dim; d += kLine) prefetch(row + d);
  }
  void ask_for_queries(const PackedRows& rows, int64_t first) const {
    const int64_t left = rows.count() - first;
    rows.for_each(first, left < kBlockRows ? left : kBlockRows,
                  [&](int64_t, int64_t token, int64_t head) { ask_for(rows.query(token, head)); });
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
                   const std::type_identity_t<Tile<T> >* next_tile) const {
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
    const int32_t* table = rows_->block_table();
    const int64_t first_block = begin / shape_.block_size;
    const int64_t last_block = (end - 1) / shape_.block_size;
    int64_t block = at / shape_.block_size;
    int64_t offset = at % shape_.block_size;
    for (int i = 0; i < kTileTokens / 16; ++i) {
      const int64_t known = block < first_block ? first_block : block < last_block ? block : last_block;
      const KV* keys = cache_.keys(table[known], rows_->kv_head);
      for (int j = 0; j < 16 / kLanes; ++j) {
        tile.keys[i * (16 / kLanes) + j] = keys + key_index<KV>(offset + j * kLanes, 0, shape_.block_size);
      }
      tile.values[i] =
          cache_.values(table[known], rows_->kv_head) + value_index<KV>(offset, 0, shape_.head_dim);
      offset += 16;
      if (offset == shape_.block_size) {
        offset = 0;
        block += 1;
      }
    }
    return tile;
  }

  const Attention& op_;
  const AttentionShape& shape_;
  KvCache<KV> cache_;
  const PackedRows* rows_ = nullptr;
  int64_t count_ = 0;
  int64_t visible_begin_[kBlockRows];
  int64_t visible_end_[kBlockRows];
  alignas(64) float q_[kBlockRows * kMaxHeadDim];
  alignas(64) float lane_sums_[kBlockRows * kLanes];
  WideTile wide_;
};

#endif

// The units of a worker, and a stream for those that it takes, if there is one for such spans.
template <class Spans>
class Worker {
 public:
  Worker(const Attention& op, const AttentionShape& shape) : unit_(op, shape) {}
  void run(const PackedRows& rows, const PackedRows* following) { unit_.run(rows, following); }
  void finish() {}

 private:
  Unit<Spans> unit_;
};

template <class Spans>
  requires requires { typename Spans::Stream; }
class Worker<Spans> {
 public:
  Worker(const Attention& op, const AttentionShape& shape)
      : unit_(op, shape), stream_(op, shape, unit_.spans().tiles()) {}
  void run(const PackedRows& rows, const PackedRows* following) {
    if (stream_.takes(rows)) return stream_.push(rows, following);
    stream_.drain();
    unit_.run(rows, following);
  }
  void finish() { stream_.drain(); }

 private:
  Unit<Spans> unit_;
  typename Spans::Stream stream_;
};

template <class Spans>
void run_items(const Attention& op, const AttentionShape& shape) {
  UnitRuns runs(op, shape, Spans::kRowsPerTokenRead);
  pool().parallel_for(pool().num_threads(), [&](int64_t, int) {
    WorkerUnits units(runs);
    Worker<Spans> worker(op, shape);
    int64_t now, then;
    for (bool has = units.next(&now); has; now = then) {
      const PackedRows rows = runs.rows(now);
      has = units.next(&then);
      if (has) {
        const PackedRows following = runs.rows(then);
        worker.run(rows, &following);
      } else {
        worker.run(rows, nullptr);
      }
    }
    worker.finish();
  });
}

void attention(const Attention& op, [[maybe_unused]] const OpContext& context) {
#if defined(FS_SIMD_AMX)
  // The choice depends on what a model's cache is like, never on rows.
  if (op.kv_cache.dtype != DType::bf16 || !AmxSpans::takes(op.q.shape[2])) {
    return Slot<Attention>::cpu[static_cast<int>(kVectorIsa)].kernel(op, context);
  }
#endif
  check_kv_cache(op.kv_cache, "attention");
  FS_CHECK(op.kv_cache.shape[2] >= 1 && op.q.shape[1] >= 1 && op.q.shape[1] % op.kv_cache.shape[2] == 0,
           "attention: " << op.q.shape[1] << " query heads and " << op.kv_cache.shape[2]
                         << " KV heads; must be a whole multiple");
  const AttentionShape shape(op);
  check_attention(op, shape);

#if defined(FS_SIMD_AMX)
  run_items<AmxSpans>(op, shape);
#else
  if (op.kv_cache.dtype == DType::f32) {
    run_items<VectorSpans<float> >(op, shape);
  } else {
    run_items<VectorSpans<bf16> >(op, shape);
  }
#endif
  const auto* merges = op.merges.ptr<const AttentionMerge>();
  visit_output(op, [&](auto* tag) {
    using Out = std::remove_pointer_t<decltype(tag)>;
    parallel_rows(op.merges.shape[0], 4, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) merge_rows<Out>(op, shape, merges[i]);
    });
  });
}

}  // namespace

FS_REGISTER_CPU(Attention, attention, DType::f32 | DType::bf16)

}  // namespace fs::FS_ISA
