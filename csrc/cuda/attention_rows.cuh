// SPDX-License-Identifier: Apache-2.0
//
// The rows that one warp has in `attention`: where they lie, what they see, and where their results go.
#pragma once

#include "cuda/paged_kv.cuh"
#include "cuda/softmax.cuh"
#include "plan/attention_plan.h"

namespace fs::cuda {

inline constexpr int kAttentionThreads = 128;
inline constexpr int kMaxRowTiles = 2;  // tiles of 16 rows on a warp
// Plans are made with so many: spans fold in fours, ((0 1) (2 3)), and fours from left to right.
inline constexpr int kFoldLevels = 2;
template <int kDim>
inline constexpr int kParkedVectors = kDim / 8 + 1;  // of 16 bytes, for each thread, tile and level

template <class T>
struct AttentionOperands {
  T* out;
  const T* q;
  PagedKv kv;
  const AttentionItem* items;
  const AttentionMerge* merges;
  const int32_t* parts;
  float* partials;  // [slot][head][dim], not divided
  float2* stats;    // [slot][head]: maximum, sum
  float4* parked;   // [block][level][tile][vector][thread]
  int* next_unit;   // the queue
  int* num_left;    // blocks that have left it
  int* num_stored;  // [merge][kv_head]: items that have stored their partials
  int64_t out_stride, q_stride;
  float scale;  // times log2(e)
  int num_units, group, span, window;
  bool wide;  // there is shared memory for the queries of 128 rows
};

// What a block, or a warp, works on: in shared memory, as registers are scarce.
struct ItemAtHand {
  AttentionItem item;
  int kv_head;
  int first_row;  // packed, of the block's
  int unit;
  Range range;              // tokens that any of the rows sees
  int seen_end;             // one past the last token that a row of this warp sees
  int blocks[kTileGroups];  // of the tile that this warp loads next
};

// One of a lane's rows. The last row of the item stands for those beyond it; what comes of these is not
// stored.
struct LaneRow {
  int token;  // in the item
  int head;   // of all query heads
  bool exists;
};
template <class T>
__device__ __forceinline__ LaneRow find_row(const AttentionOperands<T>& op, const ItemAtHand& hand, int row) {
  const int num_packed = hand.item.num_rows * op.group;
  const int packed = min(row, num_packed - 1), token = packed / op.group;
  return {token, hand.kv_head * op.group + packed - token * op.group, row < num_packed};
}
template <class T, int kDim>
__device__ __forceinline__ const T* query_of(const AttentionOperands<T>& op, const ItemAtHand& hand,
                                             const LaneRow& row) {
  return op.q + (hand.item.row_begin + row.token) * op.q_stride + row.head * kDim;
}

// Do all of up to num_rows rows see the tile at `at`? Where they begin and end is less than num_rows apart.
__device__ __forceinline__ bool has_whole(const Range& range, int at, int num_rows) {
  return at >= range.begin + num_rows && at + kTileKeys <= range.end - num_rows;
}

// The tokens that some of the packed rows [first, end) see.
template <class T>
__device__ __forceinline__ Range visible(const AttentionOperands<T>& op, const AttentionItem& item, int first,
                                         int end) {
  const int first_position = item.position + first / op.group;
  const int last_position = item.position + (min(end, item.num_rows * op.group) - 1) / op.group;
  return {max(item.kv_begin, op.window == 0 ? 0 : first_position - op.window + 1),
          min(item.kv_end, last_position + 1)};
}

// kTiles tiles of 16 rows of one item on one warp; without kFolds, of an item that stores each span if it has
// several.
template <class T, int kDim, int kTiles, bool kFolds>
struct WarpRows {
  const AttentionOperands<T>& op;
  const ItemAtHand& hand;
  PartialRows<kDim> current[kTiles];  // of the span at hand

  __device__ __forceinline__ WarpRows(const AttentionOperands<T>& operands, const ItemAtHand& at_hand)
      : op(operands), hand(at_hand) {
    clear();
  }

  // The first packed row of the warp; kFolds is of all warps of a block, which share its rows.
  __device__ __forceinline__ int first_row() const {
    return hand.first_row + (kFolds ? warp_id() * kTiles * kTileRows : 0);
  }
  __device__ __forceinline__ LaneRow lane_row(int tile, int half) const {
    return find_row(op, hand, first_row() + tile * kTileRows + lane_id() / 4 + 8 * half);
  }

  // Of one tile, to registers.
  __device__ __forceinline__ void load_queries(HeldQueries<kDim>& queries) const {
    const T* const from[2] = {query_of<T, kDim>(op, hand, lane_row(0, 0)),
                              query_of<T, kDim>(op, hand, lane_row(0, 1))};
    cuda::load_queries<T, kDim>(queries.fragments, from);
  }
  // Of all tiles, to shared memory: starts the copies.
  __device__ __forceinline__ void copy_queries(uint32_t to) const {
    constexpr int kChunks = kDim / 8, kRowsAtOnce = kWarp / kChunks;
    const int chunk = lane_id() % kChunks;
#pragma unroll 1
    for (int row = lane_id() / kChunks; row < kTiles * kTileRows; row += kRowsAtOnce) {
      const T* from = query_of<T, kDim>(op, hand, find_row(op, hand, first_row() + row));
      copy_async(to + static_cast<uint32_t>(swizzled_offset(row, chunk, kChunks)), from + chunk * 8, true);
    }
  }

  // From scores to weights, for the keys from `at`; `whole` promises that all rows see all of them.
  __device__ __forceinline__ void weigh(ScoreFragments (&scores)[kTiles], WeightFragments (&weights)[kTiles],
                                        int at, bool whole) {
    if (!whole) mask_scores(scores, at);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      update<T, kDim>(current[tile], scores[tile], op.scale, weights[tile]);
    }
  }

  // After the last tile of a span, of a fold that begins with span `first` and, if is_last, ends here. What
  // waits to be folded with what comes later, a left half of a node for each level and all fours before, is
  // parked.
  __device__ __forceinline__ void end_span(int span, int first, bool is_last) {
    if (hand.item.num_parts > 1) {
      store(span - hand.item.kv_begin / op.span);
    } else if constexpr (kFolds) {
      // Levels of which this ends a right half, or all that are parked. With two tiles there are no registers
      // for a loop written out, nor for one that is left early.
      constexpr int kFull = (1 << kFoldLevels) - 1;
      const int ended = is_last ? span & kFull : (span ^ (span + 1)) >> 1 & kFull;
      const bool is_full = is_last || ended == kFull;
#pragma unroll(kTiles == 1 ? kFoldLevels + 1 : 1)
      for (int level = 0; level <= kFoldLevels; ++level) {
        const bool ends = level == kFoldLevels ? is_full : (ended >> level & 1) != 0;
        if (ends && span >> level > first >> level) fold_parked(level);
      }
      if (is_last) return;
      park(is_full ? kFoldLevels : __popc(ended));
    } else {
      return;  // it is the only one
    }
    clear();
  }

  // After the last span.
  __device__ __forceinline__ void finish() {
    if (hand.item.num_parts == 1) store(0);
    if (hand.item.num_parts != 0) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const LaneRow row = lane_row(tile, half);
        T* to = op.out + (hand.item.row_begin + row.token) * op.out_stride + row.head * kDim;
        store_row<T, kDim>(to, current[tile].out, half, reciprocal_of_sum(current[tile].sums[half]),
                           row.exists);
      }
    }
  }

 private:
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) current[tile].clear();
  }

  __device__ __forceinline__ void mask_scores(ScoreFragments (&scores)[kTiles], int at) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        __syncwarp();  // or the compiler works on all rows at once, and has no registers for that
        const int position = hand.item.position + lane_row(tile, half).token;
        const int begin = max(hand.item.kv_begin, op.window == 0 ? 0 : position - op.window + 1);
        mask(scores[tile], half, at, begin, min(hand.item.kv_end, position + 1));
      }
    }
  }

  // Results wait in memory while the next span is computed: with both in registers there are not enough of
  // them. Each thread has places of its own, so nobody else sees them.
  __device__ __forceinline__ float4* parked(int level, int tile) const {
    const int place = (static_cast<int>(blockIdx.x) * (kFoldLevels + 1) + level) * kMaxRowTiles + tile;
    return op.parked + static_cast<int64_t>(place) * kParkedVectors<kDim> * kAttentionThreads + thread_id();
  }
  __device__ __forceinline__ void park(int level) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const PartialRows<kDim>& rows = current[tile];
      float4* to = parked(level, tile);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float (&out)[4] = rows.out[n];
        to[n * kAttentionThreads] = make_float4(out[0], out[1], out[2], out[3]);
      }
      to[kDim / 8 * kAttentionThreads] = make_float4(rows.max[0], rows.sums[0], rows.max[1], rows.sums[1]);
    }
  }
  __device__ __forceinline__ void fold_parked(int level) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      PartialRows<kDim>& rows = current[tile];
      const float4* from = parked(level, tile);
      const float4 stats = from[kDim / 8 * kAttentionThreads];
      const Fold low(stats.x, rows.max[0], op.scale), high(stats.z, rows.max[1], op.scale);
      rows.max[0] = low.max;
      rows.max[1] = high.max;
      rows.sums[0] = low(stats.y, rows.sums[0]);
      rows.sums[1] = high(stats.w, rows.sums[1]);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        if (n % 2 == 0) __syncwarp();  // or the compiler loads all at once, and has no registers for them
        const float4 before = from[n * kAttentionThreads];
        rows.out[n][0] = low(before.x, rows.out[n][0]);
        rows.out[n][1] = low(before.y, rows.out[n][1]);
        rows.out[n][2] = high(before.z, rows.out[n][2]);
        rows.out[n][3] = high(before.w, rows.out[n][3]);
      }
    }
  }

  __device__ __forceinline__ void store(int part) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const LaneRow row = lane_row(tile, half);
        if (!row.exists) continue;
        const int64_t slot = hand.item.slot + static_cast<int64_t>(part) * hand.item.num_rows + row.token;
        const int64_t at = slot * (op.kv.num_kv_heads * op.group) + row.head;
        float* to = op.partials + at * kDim + lane_id() % 4 * 2;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          const float* out = &current[tile].out[n][2 * half];
          *reinterpret_cast<float2*>(to + 8 * n) = make_float2(out[0], out[1]);
        }
        if (lane_id() % 4 == 0) op.stats[at] = make_float2(current[tile].max[half], current[tile].sums[half]);
      }
    }
  }
};

}  // namespace fs::cuda
