// SPDX-License-Identifier: Apache-2.0
//
// Copies of keys and values from the paged cache [block][K|V][kv_head][slot][dim] to shared memory, a group
// of 16 tokens at a time, by one warp. A block holds a power of two of tokens, at least a group.
#pragma once

#include <cstdint>

#include "cuda/tile.cuh"

namespace fs::cuda {

struct PagedKv {
  const void* cache;
  const int32_t* tables;
  int64_t block_stride, value_stride;  // elements of a block, and of its keys
  int table_stride;
  int num_kv_heads;
  int block_shift;  // a block has 2^block_shift tokens
};

// Of one request and KV head, tokens [begin, end), in ascending tiles.
//
// Each lane keeps the id of one block, so that a warp looks up 32 at once and the next 32 ahead of their use.
// Only blocks with visible tokens are looked up; other entries of the table may be stale.
template <class T, int kDim>
class GroupLoader {
 public:
  __device__ __forceinline__ GroupLoader(const PagedKv& kv, const int32_t& request, int kv_head, int begin,
                                         int end)
      : kv_(kv), request_(request), begin_(begin), end_(end) {
    const int row = lane_id() / kChunks, chunk = lane_id() % kChunks;
    from_ = (kv_head << kv.block_shift) * kDim + row * kDim + chunk * 8;
    to_ = static_cast<uint32_t>(swizzled_offset(row, chunk, kChunks));
    window_ = (begin / kTileKeys * kTileKeys) >> kv.block_shift;
    ids_ = look_up(window_ + lane_id());
    next_ids_ = look_up(window_ + kWarp + lane_id());
  }

  // Starts to copy the tokens from `token`, a multiple of 16, to `to`. What lies outside [begin, end) becomes
  // zeros: a weight of 0 must not meet a NaN.
  __device__ __forceinline__ void load(int token, bool values, uint32_t to) {
    int block = token >> kv_.block_shift;
    if (block >= window_ + kWarp) {
      window_ += kWarp;
      ids_ = next_ids_;
      next_ids_ = look_up(window_ + kWarp + lane_id());
    }
    block = max(block, begin_ >> kv_.block_shift);
    block = min(block, (end_ - 1) >> kv_.block_shift);
    const int id = __shfl_sync(kAllLanes, ids_, block - window_);
    const int slot = token & ((1 << kv_.block_shift) - 1);
    const T* from = static_cast<const T*>(kv_.cache) + id * kv_.block_stride + (from_ + slot * kDim);
    if (values) from += kv_.value_stride;
    to += to_;
    if (token >= begin_ && token + kGroupKeys <= end_) {
      copy(from, to, [](int) { return true; });
    } else {
      const int row = token + lane_id() / kChunks;
      copy(from, to, [&](int i) { return row + i >= begin_ && row + i < end_; });
    }
  }

 private:
  static constexpr int kChunks = kDim / 8;
  static constexpr int kRows = kWarp / kChunks;  // that a warp copies at once

  template <class IsValid>
  static __device__ __forceinline__ void copy(const T* from, uint32_t to, const IsValid& is_valid) {
#pragma unroll
    for (int i = 0; i < kGroupKeys; i += kRows) {
      // Rows i further on: their chunks' places differ in bits that are 0 in the row of this lane.
      copy_async((to ^ static_cast<uint32_t>(i % 8 * kChunkBytes)) + static_cast<uint32_t>(i * kDim * 2),
                 from + i * kDim, is_valid(i));
    }
  }

  __device__ __forceinline__ int look_up(int block) const {
    const int32_t* table = kv_.tables + static_cast<int64_t>(request_) * kv_.table_stride;
    return __ldg(table + min(max(block, begin_ >> kv_.block_shift), (end_ - 1) >> kv_.block_shift));
  }

  const PagedKv& kv_;
  const int32_t& request_;  // in global memory: registers are scarce
  int begin_, end_;
  int window_, ids_, next_ids_;  // the ids of blocks window + lane, and of the 32 after those
  int from_;                     // this lane's place in the first group of a block
  uint32_t to_;
};

}  // namespace fs::cuda
