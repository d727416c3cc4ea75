// SPDX-License-Identifier: Apache-2.0
//
// Attention over the paged KV cache by the items of an AttentionPlan, in one launch: chunks, decodes, pieces
// of long contexts and shared prefixes.
//
// The unit of arithmetic is a warp with 16 packed rows (row = token * group + head of the group). It walks
// the tokens of a span in tiles of 64 from a partial of nothing, and folds the partials of spans from left to
// right. How warps share out rows and loads never shows in a result:
//   more than 16 rows   a block of four warps has 64 rows, and all of them read each tile from one ring of
//                       stages in shared memory, 64 keys or 64 values per stage
//   up to 16 rows       a warp works for itself, with a quarter of the ring, 16 keys or values per stage
//
// The grid is as large as the device holds at once. Blocks draw units (item x KV head) from a queue; the plan
// has put the large items first, so that a block takes those together and then its warps go on alone. Whoever
// stores the last of the partials that a merge needs does the merge, in the order of its parts.
//
// Bytes at least: K and V of each item once, queries and outputs once, partials twice. Bound: memory up to
// some 100 rows for each key read, then tensor cores.
//
// ptxas: attention_kernel <= 240 registers, 128 threads
#include "cuda/launch.cuh"
#include "cuda/paged_kv.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tile.cuh"
#include "cuda/vec.cuh"
#include "plan/attention_plan.h"

namespace fs::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlockRows = kWarps * kTileRows;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kRingBytes = 48 << 10;
template <int kDim>
constexpr int kParkedVectors = kDim / 8 + 1;  // of 16 bytes, for each thread

template <class T>
struct Operands {
  T* out;
  const T* q;
  PagedKv kv;
  const AttentionItem* items;
  const AttentionMerge* merges;
  const int32_t* parts;
  float* partials;  // [slot][head][dim], not divided
  float2* stats;    // [slot][head]: maximum, sum
  float4* parked;   // [block][vector][thread]
  int* next_unit;   // the queue
  int* num_left;    // blocks that have left it
  int* num_stored;  // [merge][kv_head]: items that have stored their partials
  int64_t out_stride, q_stride;
  float scale;  // times log2(e)
  int num_units, group, span, window;
};

// One of a lane's two rows. The last row of the item stands for those beyond it; what comes of these is not
// stored.
struct LaneRow {
  int token;  // in the item
  int head;   // of all query heads
  bool exists;
};

// The tokens that some of the packed rows [first, end) see.
struct Range {
  int begin, end;

  // Do all of up to num_rows rows see the tile at `at`? Where they begin and end is less than num_rows apart.
  __device__ __forceinline__ bool has_whole(int at, int num_rows) const {
    return at >= begin + num_rows && at + kTileKeys <= end - num_rows;
  }
};
template <class T>
__device__ __forceinline__ Range visible(const Operands<T>& op, const AttentionItem& item, int first,
                                         int end) {
  const int first_position = item.position + first / op.group;
  const int last_position = item.position + (min(end, item.num_rows * op.group) - 1) / op.group;
  return {max(item.kv_begin, op.window == 0 ? 0 : first_position - op.window + 1),
          min(item.kv_end, last_position + 1)};
}

// 16 rows of one item on one warp; without kFolds, of an item that stores each span if it has several.
template <class T, int kDim, bool kFolds>
struct WarpTile {
  const Operands<T>& op;
  const AttentionItem& item;  // in global memory: registers are scarce
  int kv_head, first_row;
  QueryFragments<kDim> query;
  PartialRows<kDim> current;  // of the span at hand
  ScoreFragments scores;
  WeightFragments weights;

  __device__ __forceinline__ WarpTile(const Operands<T>& operands, const AttentionItem& an_item, int of_head,
                                      int from_row)
      : op(operands), item(an_item), kv_head(of_head), first_row(from_row) {
    const T* from[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const LaneRow row = lane_row(half);
      from[half] = op.q + (item.row_begin + row.token) * op.q_stride + row.head * kDim;
    }
    load_queries<T, kDim>(query, from);
    current.clear();
  }

  __device__ __forceinline__ LaneRow lane_row(int half) const {
    const int row = first_row + lane_id() / 4 + 8 * half, num_packed = item.num_rows * op.group;
    const int packed = min(row, num_packed - 1), token = packed / op.group;
    return {token, kv_head * op.group + packed - token * op.group, row < num_packed};
  }

  __device__ __forceinline__ void mask_scores(int at) {
    int begin[2], end[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = item.position + lane_row(half).token;
      begin[half] = max(item.kv_begin, op.window == 0 ? 0 : position - op.window + 1);
      end[half] = min(item.kv_end, position + 1);
    }
    mask(scores, at, begin, end);
  }

  __device__ __forceinline__ void clear_scores() {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
    }
  }

  // From scores to weights, for the keys from `at`; `whole` promises that all rows see all of them.
  __device__ __forceinline__ void weigh(int at, bool whole) {
    if (!whole) mask_scores(at);
    update<T, kDim>(current, scores, op.scale, weights);
  }

  // After the last tile of a span, which begins with the tokens of the item or not, and ends with them or
  // not.
  __device__ __forceinline__ void end_span(int at, bool is_first, bool is_last) {
    if (item.num_parts > 1) {
      store(current, at / op.span - item.kv_begin / op.span);
    } else if constexpr (kFolds) {
      if (!is_first) fold_parked();
      if (is_last) return;
      park();
    } else {
      return;  // it is the only one
    }
    current.clear();
  }

  // After the last span.
  __device__ __forceinline__ void finish() {
    if (item.num_parts == 1) store(current, 0);
    if (item.num_parts != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const LaneRow row = lane_row(half);
      T* to = op.out + (item.row_begin + row.token) * op.out_stride + row.head * kDim;
      store_row<T, kDim>(to, current.out, half, reciprocal_of_sum(current.sums[2 * half]), row.exists);
    }
  }

 private:
  // The fold of the spans so far waits in memory while the next one is computed: with both in registers there
  // are not enough of them. Each thread has a place of its own, so nobody else sees it.
  __device__ __forceinline__ float4* parked() const {
    return op.parked + static_cast<int64_t>(blockIdx.x) * kParkedVectors<kDim> * kThreads + threadIdx.x;
  }
  __device__ __forceinline__ void park() const {
    float4* to = parked();
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const float (&out)[4] = current.out[n];
      to[n * kThreads] = make_float4(out[0], out[1], out[2], out[3]);
    }
    to[kDim / 8 * kThreads] = make_float4(current.max[0], current.sums[0], current.max[1], current.sums[2]);
  }
  __device__ __forceinline__ void fold_parked() {
    const float4* from = parked();
    const float4 stats = from[kDim / 8 * kThreads];
    const Fold low(stats.x, current.max[0], op.scale), high(stats.z, current.max[1], op.scale);
    current.max[0] = low.max;
    current.max[1] = high.max;
    current.sums[0] = low(stats.y, current.sums[0]);
    current.sums[2] = high(stats.w, current.sums[2]);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      if (n % 4 == 0) __syncwarp();  // or the compiler loads all at once, and has no registers for them
      const float4 before = from[n * kThreads];
      current.out[n][0] = low(before.x, current.out[n][0]);
      current.out[n][1] = low(before.y, current.out[n][1]);
      current.out[n][2] = high(before.z, current.out[n][2]);
      current.out[n][3] = high(before.w, current.out[n][3]);
    }
  }

  __device__ __forceinline__ void store(const PartialRows<kDim>& partial, int part) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const LaneRow row = lane_row(half);
      if (!row.exists) continue;
      const int64_t slot = item.slot + part * item.num_rows + row.token;
      const int64_t at = slot * (op.kv.num_kv_heads * op.group) + row.head;
      float* to = op.partials + at * kDim + lane_id() % 4 * 2;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<float2*>(to + 8 * n) =
            make_float2(partial.out[n][2 * half], partial.out[n][2 * half + 1]);
      }
      if (lane_id() % 4 == 0) op.stats[at] = make_float2(partial.max[half], partial.sums[2 * half]);
    }
  }
};

// The slots of a ring, one after another.
template <int kSlotBytes, int kSlots>
struct RingSlot {
  uint32_t begin, at;

  explicit __device__ __forceinline__ RingSlot(uint32_t ring) : begin(ring), at(ring) {}
  __device__ __forceinline__ void advance() {
    at += kSlotBytes;
    if (at == begin + kSlots * kSlotBytes) at = begin;
  }
  // The slot before, which is the next one to fill.
  __device__ __forceinline__ uint32_t before() const {
    return (at == begin ? at + kSlots * kSlotBytes : at) - kSlotBytes;
  }
};

__device__ __forceinline__ bool ends_span(int at, int span, int end) {
  return at + kTileKeys >= end || (at + kTileKeys) % span == 0;
}

// All warps: up to 64 packed rows from first_row on.
template <class T, int kDim>
__device__ __forceinline__ void attend_block(const Operands<T>& op, const AttentionItem& item, int kv_head,
                                             int first_row, uint32_t ring) {
  constexpr int kStageBytes = kTileGroups * kGroupBytes<kDim>;
  constexpr int kAhead = (kRingBytes / kStageBytes - 1) / 2;  // tiles on their way, while one is worked on
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warp_row = first_row + warp * kTileRows;
  const Range range = visible(op, item, first_row, first_row + kBlockRows);
  // A warp without rows only loads.
  const int warp_end =
      warp_row < item.num_rows * op.group ? visible(op, item, warp_row, warp_row + kTileRows).end : 0;

  GroupLoader<T, kDim> loader(op.kv, item.request, kv_head, range.begin, range.end);
  const auto load = [&](int at, bool values, uint32_t to) {
    if (at < range.end) {
      loader.load(at + warp * kGroupKeys, values, to + static_cast<uint32_t>(warp * kGroupBytes<kDim>));
    }
    commit_copies();
  };
  const int first_tile = range.begin / kTileKeys * kTileKeys;
#pragma unroll
  for (int stage = 0; stage < 2 * kAhead; ++stage) {
    load(first_tile + stage / 2 * kTileKeys, stage % 2 != 0,
         ring + static_cast<uint32_t>(stage * kStageBytes));
  }
  RingSlot<kStageBytes, 2 * kAhead + 1> slot(ring);
  const auto next_stage = [&](int at, bool values) {
    wait_for_copies<2 * kAhead - 1>();
    __syncthreads();  // the stage is there for all, and all have left the one that is filled next
    load(at + kAhead * kTileKeys, values, slot.before());
  };

  WarpTile<T, kDim, true> tile(op, item, kv_head, warp_row);
  for (int at = first_tile; at < range.end; at += kTileKeys) {
    next_stage(at, false);
    if (at < warp_end) {
      tile.clear_scores();
      multiply_keys<T, kDim, kTileGroups>(tile.scores, tile.query, slot.at, 0);
      tile.weigh(at, range.has_whole(at, kBlockRows));
    }
    slot.advance();
    next_stage(at, true);
    if (at < warp_end) {
      multiply_values<T, kDim, kTileGroups>(tile.current.out, tile.current.sums, tile.weights, slot.at, 0);
    }
    slot.advance();
    if (ends_span(at, op.span, range.end)) {
      tile.end_span(at, at / op.span == range.begin / op.span, at + kTileKeys >= range.end);
    }
  }
  tile.finish();
}

// One warp: an item of at most 16 packed rows.
template <class T, int kDim>
__device__ __forceinline__ void attend_warp(const Operands<T>& op, const AttentionItem& item, int kv_head,
                                            uint32_t ring) {
  constexpr int kSlots = kRingBytes / kWarps / kGroupBytes<kDim>;
  const Range range = visible(op, item, 0, kTileRows);
  GroupLoader<T, kDim> loader(op.kv, item.request, kv_head, range.begin, range.end);
  RingSlot<kGroupBytes<kDim>, kSlots> slot(ring);
  const int first_tile = range.begin / kTileKeys * kTileKeys;
  int next_load = first_tile, next_group = 0;  // groups of keys, then groups of values
  const auto load_next = [&](uint32_t to) {
    if (next_load < range.end) {
      loader.load(next_load + next_group % kTileGroups * kGroupKeys, next_group >= kTileGroups, to);
    }
    commit_copies();
    next_group += 1;
    if (next_group == 2 * kTileGroups) {
      next_group = 0;
      next_load += kTileKeys;
    }
  };
  const auto next_stage = [&] {
    wait_for_copies<kSlots - 2>();
    __syncwarp();
    load_next(slot.before());
  };

#pragma unroll
  for (int stage = 0; stage < kSlots - 1; ++stage) {
    load_next(ring + static_cast<uint32_t>(stage * kGroupBytes<kDim>));
  }
  WarpTile<T, kDim, false> tile(op, item, kv_head, 0);
  for (int at = first_tile; at < range.end; at += kTileKeys) {
    tile.clear_scores();
#pragma unroll
    for (int group = 0; group < kTileGroups; ++group) {
      next_stage();
      multiply_keys<T, kDim, 1>(tile.scores, tile.query, slot.at, group);
      slot.advance();
    }
    tile.weigh(at, range.has_whole(at, kTileRows));
#pragma unroll
    for (int group = 0; group < kTileGroups; ++group) {
      next_stage();
      multiply_values<T, kDim, 1>(tile.current.out, tile.current.sums, tile.weights, slot.at, group);
      slot.advance();
    }
    if (ends_span(at, op.span, range.end)) {
      tile.end_span(at, at / op.span == range.begin / op.span, at + kTileKeys >= range.end);
    }
  }
  tile.finish();
}

// One warp: the output of a row of a merge and one query head.
template <class T, int kDim>
__device__ __forceinline__ void merge_row(const Operands<T>& op, const AttentionMerge& merge, int row,
                                          int head) {
  constexpr int kMine = kDim / kWarp;
  using Floats = Vec<float, kMine>;
  const int num_heads = op.kv.num_kv_heads * op.group;
  float out[kMine] = {};
  float max = __int_as_float(0xff800000), sum = 0.0f;
  for (int p = merge.parts_begin; p < merge.parts_end; ++p) {
    const int64_t at = static_cast<int64_t>(op.parts[p] + row) * num_heads + head;
    const Floats part = Floats::load(op.partials + at * kDim + lane_id() * kMine);
    const float2 stats = op.stats[at];
    const Fold both(max, stats.x, op.scale);
    max = both.max;
    sum = both(sum, stats.y);
#pragma unroll
    for (int i = 0; i < kMine; ++i) out[i] = both(out[i], part[i]);
  }
  const float scale = reciprocal_of_sum(sum);
#pragma unroll
  for (int i = 0; i < kMine; ++i) out[i] = __fmaf_rn(out[i], scale, 0.0f);
  T* to = op.out + (merge.row_begin + row) * op.out_stride + head * kDim + lane_id() * kMine;
  Vec<T, kMine>::from(out).store(to);
}

// Notes that the partials of an item and KV head are stored, by threads that this one has met at a barrier
// since; true for the last of those that `merge` needs: it may read the others' after the next barrier.
template <class T>
__device__ __forceinline__ bool is_last(const Operands<T>& op, int merge, int kv_head) {
  int* counter = op.num_stored + static_cast<int64_t>(merge) * op.kv.num_kv_heads + kv_head;
  const bool last = add_and_synchronise(counter, 1) == op.merges[merge].num_items - 1;
  if (last) *counter = 0;  // for the next launch
  return last;
}

template <class T, int kDim>
__device__ __forceinline__ void merge_by_block(const Operands<T>& op, const AttentionItem& item, int kv_head,
                                               int* flags) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int first = 0; first < item.num_merges; first += kThreads) {
    const int count = min(item.num_merges - first, kThreads), mine = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (mine < count) flags[mine] = is_last(op, item.merge_begin + first + mine, kv_head) ? 1 : 0;
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      if (flags[i] == 0) continue;
      const AttentionMerge merge = op.merges[item.merge_begin + first + i];
      for (int row = warp; row < merge.num_rows * op.group; row += kWarps) {
        merge_row<T, kDim>(op, merge, row / op.group, kv_head * op.group + row % op.group);
      }
    }
  }
}

template <class T, int kDim>
__device__ __forceinline__ void merge_by_warp(const Operands<T>& op, const AttentionItem& item, int kv_head) {
  __syncwarp();
  for (int first = 0; first < item.num_merges; first += kWarp) {
    const int mine = first + lane_id();
    const bool last = mine < item.num_merges && is_last(op, item.merge_begin + mine, kv_head);
    uint32_t left = __ballot_sync(kAllLanes, last);
    __syncwarp();
    for (; left != 0; left &= left - 1) {
      const AttentionMerge merge = op.merges[item.merge_begin + first + __ffs(static_cast<int>(left)) - 1];
      for (int row = 0; row < merge.num_rows * op.group; ++row) {
        merge_row<T, kDim>(op, merge, row / op.group, kv_head * op.group + row % op.group);
      }
    }
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) attention_kernel(const Operands<T> op) {
  __shared__ alignas(1024) uint8_t ring[kRingBytes];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int* const scratch = reinterpret_cast<int*>(ring);  // between two items the ring is free
  const auto is_for_warp = [&](const AttentionItem& item) { return item.num_rows * op.group <= kTileRows; };

  int unit = 0;
  while (true) {
    __syncthreads();
    if (threadIdx.x == 0) *scratch = atomicAdd(op.next_unit, 1);
    __syncthreads();
    unit = *scratch;
    __syncthreads();
    if (unit >= op.num_units) break;
    const AttentionItem& item = op.items[unit / op.kv.num_kv_heads];
    if (is_for_warp(item)) break;
    const int kv_head = unit % op.kv.num_kv_heads;
    for (int row = 0; row < item.num_rows * op.group; row += kBlockRows) {
      attend_block<T, kDim>(op, item, kv_head, row, shared_address(ring));
      __syncthreads();
    }
    merge_by_block<T, kDim>(op, item, kv_head, scratch);
  }

  // The unit at hand is the first warp's; the others draw their own.
  const auto draw = [&] {
    int drawn = 0;
    if (lane_id() == 0) drawn = atomicAdd(op.next_unit, 1);
    return __shfl_sync(kAllLanes, drawn, 0);
  };
  if (warp > 0 && unit < op.num_units) unit = draw();
  while (unit < op.num_units) {
    const AttentionItem& item = op.items[unit / op.kv.num_kv_heads];
    if (item.num_rows == 0) break;     // padding, which comes last
    if (!is_for_warp(item)) __trap();  // the plan was made with other rows_per_warp
    const int kv_head = unit % op.kv.num_kv_heads;
    attend_warp<T, kDim>(op, item, kv_head,
                         shared_address(ring) + static_cast<uint32_t>(warp * (kRingBytes / kWarps)));
    merge_by_warp<T, kDim>(op, item, kv_head);
    __syncwarp();
    unit = draw();
  }

  // The last block to leave makes the queue ready for the next launch.
  __syncthreads();
  if (threadIdx.x != 0 || add_and_synchronise(op.num_left, 1) != static_cast<int>(gridDim.x) - 1) return;
  *op.next_unit = 0;
  *op.num_left = 0;
}

// Blocks of a launch: as many as the device holds at once, but for some more on the largest ones.
int64_t max_blocks() {
  constexpr int kMaxDevices = 64;
  static int multiprocessors[kMaxDevices] = {};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device < kMaxDevices && multiprocessors[device] == 0) {
    error = cudaDeviceGetAttribute(&multiprocessors[device], cudaDevAttrMultiProcessorCount, device);
  }
  FS_CHECK(error == cudaSuccess && device < kMaxDevices,
           "attention: CUDA device " << device << ": " << cudaGetErrorString(error));
  return kBlocksPerMultiprocessor * multiprocessors[device];
}

template <class T>
void attention_of(const Attention& op, cudaStream_t stream) {
  Operands<T> o{};
  const int64_t num_heads = op.q.shape[1], head_dim = op.q.shape[2], num_kv_heads = op.kv_cache.shape[2];
  o.out = op.out.ptr<T>();
  o.q = op.q.ptr<const T>();
  o.kv.cache = op.kv_cache.data;
  o.kv.tables = op.block_tables.ptr<const int32_t>();
  o.kv.block_stride = op.kv_cache.stride[0];
  o.kv.value_stride = op.kv_cache.stride[1];
  o.kv.table_stride = static_cast<int>(op.block_tables.shape[1]);
  o.kv.num_kv_heads = static_cast<int>(num_kv_heads);
  while ((int64_t{1} << o.kv.block_shift) < op.kv_cache.shape[3]) ++o.kv.block_shift;
  o.items = op.items.ptr<const AttentionItem>();
  o.merges = op.merges.ptr<const AttentionMerge>();
  o.parts = op.parts.ptr<const int32_t>();
  const int64_t blocks = max_blocks();
  const int64_t parked = blocks * kThreads * 4 * (head_dim / 8 + 1);
  FS_CHECK(op.workspace.shape[0] >= parked, "attention: the cuda kernel needs a workspace of "
                                                << parked << " floats and those of the plan; given "
                                                << op.workspace.shape[0]);
  const int64_t num_slots = (op.workspace.shape[0] - parked) / (num_heads * (head_dim + 2));
  o.parked = op.workspace.ptr<float4>();
  o.partials = op.workspace.ptr<float>() + parked;
  o.stats = reinterpret_cast<float2*>(o.partials + num_slots * num_heads * head_dim);
  o.next_unit = op.counters.ptr<int32_t>();
  o.num_left = o.next_unit + 1;
  o.num_stored = o.next_unit + kAttentionQueueCounters;
  o.out_stride = op.out.stride[0];
  o.q_stride = op.q.stride[0];
  o.scale = op.scale * 1.44269504f;
  o.num_units = static_cast<int>(op.items.shape[0] * num_kv_heads);
  o.group = static_cast<int>(num_heads / num_kv_heads);
  o.span = static_cast<int>(op.span);
  o.window = static_cast<int>(op.window);
  const auto grid = static_cast<unsigned>(o.num_units < blocks ? o.num_units : blocks);
  if (head_dim == 64) {
    attention_kernel<T, 64><<<grid, kThreads, 0, stream>>>(o);
  } else {
    attention_kernel<T, 128><<<grid, kThreads, 0, stream>>>(o);
  }
}

void check_attention(const Attention& op) {
  const int64_t num_heads = op.q.shape[1], head_dim = op.q.shape[2];
  const int64_t num_kv_heads = op.kv_cache.shape[2], block_size = op.kv_cache.shape[3];
  FS_CHECK(op.q.dtype == op.kv_cache.dtype, "attention: q is " << name_of(op.q.dtype) << " and kv_cache is "
                                                               << name_of(op.kv_cache.dtype)
                                                               << "; the cuda kernel takes equal formats");
  FS_CHECK(head_dim == 64 || head_dim == 128,
           "attention: head_dim is " << head_dim << "; the cuda kernel takes 64 and 128");
  FS_CHECK(num_kv_heads >= 1 && num_heads >= 1 && num_heads % num_kv_heads == 0,
           "attention: " << num_heads << " query heads and " << num_kv_heads
                         << " KV heads; must be a whole multiple");
  FS_CHECK(block_size >= kGroupKeys && (block_size & (block_size - 1)) == 0,
           "attention: the block size is " << block_size << "; the cuda kernel takes powers of two from "
                                           << kGroupKeys);
  FS_CHECK(op.span >= block_size && op.span % block_size == 0 && op.span % kTileKeys == 0,
           "attention: span is " << op.span << "; must be a multiple of the block size " << block_size
                                 << " and, for the cuda kernel, of " << kTileKeys);
  FS_CHECK(op.window >= 0, "attention: window is " << op.window << "; must not be negative");
  FS_CHECK(op.scale > 0.0f, "attention: scale is " << op.scale << "; must be above 0");
  FS_CHECK(
      is_aligned(op.q, head_dim, 8) && is_aligned(op.out, head_dim, 8) &&
          reinterpret_cast<uintptr_t>(op.kv_cache.data) % 16 == 0,
      "attention: rows of q and out, and kv_cache, must start at multiples of 16 bytes for the cuda kernel");
  FS_CHECK(reinterpret_cast<uintptr_t>(op.workspace.data) % 16 == 0,
           "attention: workspace must start at a multiple of 16 bytes for the cuda kernel");
  const int64_t counters = attention_counters(op.merges.shape[0], num_kv_heads);
  FS_CHECK(op.counters.defined() && op.counters.shape[0] >= counters,
           "attention: the cuda kernel needs " << counters << " counters, zeros at first; given "
                                               << (op.counters.defined() ? op.counters.shape[0] : 0));
  FS_CHECK(op.items.shape[0] * num_kv_heads <= 0x3fffffff &&
               op.block_tables.shape[1] <= 0x7fffffff / block_size && op.span <= 0x3fffffff &&
               op.window <= 0x7fffffff,
           "attention: " << op.items.shape[0] << " items of " << num_kv_heads << " KV heads, block tables of "
                         << op.block_tables.shape[1] << ", span " << op.span << " or window " << op.window
                         << " is too large");
}

void attention(const Attention& op, const OpContext& context) {
  check_attention(op);
  if (op.items.shape[0] == 0) return;
  if (op.q.dtype == DType::f16) {
    attention_of<f16>(op, stream_of(context));
  } else {
    attention_of<bf16>(op, stream_of(context));
  }
  check_launch("attention");
}

}  // namespace

FS_REGISTER_CUDA(Attention, attention, DType::f16 | DType::bf16)

}  // namespace fs::cuda
