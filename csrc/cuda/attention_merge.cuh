// SPDX-License-Identifier: Apache-2.0
//
// The fold of partial results in `attention`, by whoever stores the last of those that a merge needs.
#pragma once

#include "cuda/attention_rows.cuh"
#include "cuda/vec.cuh"

namespace fs::cuda {

// One warp: the output of a row of a merge and one query head.
template <class T, int kDim>
__device__ __forceinline__ void merge_row(const AttentionOperands<T>& op, const AttentionMerge& merge,
                                          int row, int head) {
  constexpr int kMine = kDim / kWarp, kWaiting = kFoldLevels + 1;
  using Floats = Vec<float, kMine>;
  struct Result {
    float out[kMine];
    float max, sum;
  };
  Result waiting[kWaiting] = {};  // in registers: indexed by constants
  int num_waiting = 0;
  const int num_heads = op.kv.num_kv_heads * op.group;
  for (int p = merge.parts_begin; p < merge.parts_end; ++p) {
    const int part = op.parts[p];
    const int64_t at = static_cast<int64_t>(part_slot(part) + row) * num_heads + head;
    const Floats loaded = Floats::load(op.partials + at * kDim + lane_id() * kMine);
    const float2 stats = op.stats[at];
    Result mine{{}, stats.x, stats.y};
#pragma unroll
    for (int i = 0; i < kMine; ++i) mine.out[i] = loaded[i];
    const int left = num_waiting - part_folds(part, num_waiting);
#pragma unroll
    for (int n = kWaiting - 1; n >= 0; --n) {
      if (n < left || n >= num_waiting) continue;
      const Result& before = waiting[n];
      const Fold both(before.max, mine.max, op.scale);
      mine.max = both.max;
      mine.sum = both(before.sum, mine.sum);
#pragma unroll
      for (int i = 0; i < kMine; ++i) mine.out[i] = both(before.out[i], mine.out[i]);
    }
#pragma unroll
    for (int n = 0; n < kWaiting; ++n) {
      if (n == left) waiting[n] = mine;
    }
    num_waiting = left + 1;
  }
  const float scale = reciprocal_of_sum(waiting[0].sum);
  float out[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) out[i] = __fmaf_rn(waiting[0].out[i], scale, 0.0f);
  T* to = op.out + (merge.row_begin + row) * op.out_stride + head * kDim + lane_id() * kMine;
  Vec<T, kMine>::from(out).store(to);
}

// Notes that the partials of an item and KV head are stored, by threads that this one has met at a barrier
// since; true for the last of those that `merge` needs: it may read the others' after the next barrier.
template <class T>
__device__ __forceinline__ bool is_last(const AttentionOperands<T>& op, int merge, int kv_head) {
  int* counter = op.num_stored + static_cast<int64_t>(merge) * op.kv.num_kv_heads + kv_head;
  const bool last = add_and_synchronise(counter, 1) == op.merges[merge].num_items - 1;
  if (last) *counter = 0;  // for the next launch
  return last;
}

template <class T, int kDim>
__device__ __forceinline__ void merge_by_block(const AttentionOperands<T>& op, const AttentionItem& item,
                                               int kv_head, int* flags) {
  const int warp = warp_id();
  for (int first = 0; first < item.num_merges; first += kAttentionThreads) {
    const int count = min(item.num_merges - first, kAttentionThreads), mine = thread_id();
    __syncthreads();
    if (mine < count) flags[mine] = is_last(op, item.merge_begin + first + mine, kv_head) ? 1 : 0;
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      if (flags[i] == 0) continue;
      const AttentionMerge merge = op.merges[item.merge_begin + first + i];
      for (int row = warp; row < merge.num_rows * op.group; row += kAttentionThreads / kWarp) {
        merge_row<T, kDim>(op, merge, row / op.group, kv_head * op.group + row % op.group);
      }
    }
  }
}

template <class T, int kDim>
__device__ __forceinline__ void merge_by_warp(const AttentionOperands<T>& op, const AttentionItem& item,
                                              int kv_head) {
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

}  // namespace fs::cuda
