// SPDX-License-Identifier: Apache-2.0
//
// Copies of keys and values from the paged cache [block][K|V][kv_head][slot][dim] to shared memory, a group
// of 16 tokens at a time, by one warp. A block holds a power of two of tokens, at least a group.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/tile.cuh"

namespace fs::cuda {

struct PagedKv {
  const uint8_t* cache;
  const int32_t* tables;
  uint32_t block_bytes, value_offset;  // bytes of a block, and from its keys to its values
  int table_stride;
  int num_kv_heads;
  int block_shift;  // a block has 2^block_shift tokens
};

// Tokens [begin, end).
struct Range {
  int begin, end;
};

// Of one request and KV head, the tokens of `range`, in ascending tiles of four groups.
//
// Lane i has the block of group i % 4 of the tile at hand. Only blocks with visible tokens are looked up;
// other entries of the table may be stale. With kSavesRegisters, what can be is computed anew for each group.
template <class T, int kDim, bool kSavesRegisters>
class TileLoader {
 public:
  // The references are to shared memory; `place_of_blocks` is the warp's own.
  __device__ __forceinline__ TileLoader(const PagedKv& kv, const int& request, const int& kv_head,
                                        const Range& range, int (&place_of_blocks)[kTileGroups])
      : kv_(kv), request_(request), kv_head_(kv_head), range_(range), kept_blocks_(place_of_blocks) {
    if constexpr (!kSavesRegisters) lane_ = lane_place();
    keep(look_up(range.begin / kTileKeys * kTileKeys));
  }

  // Finds the blocks of a tile, which takes its time; `keep` makes it the one at hand.
  __device__ __forceinline__ int look_up(int tile) const {
    const int32_t* table = kv_.tables + static_cast<int64_t>(request_) * kv_.table_stride;
    const int block = (tile + lane_id() % kTileGroups * kGroupKeys) >> kv_.block_shift;
    const int first = range_.begin >> kv_.block_shift, last = (range_.end - 1) >> kv_.block_shift;
    return __ldg(table + min(max(block, first), last));
  }
  __device__ __forceinline__ void keep(int blocks) {
    if constexpr (kSavesRegisters) {
      __syncwarp();
      if (lane_id() < kTileGroups) kept_blocks_[lane_id()] = blocks;
      __syncwarp();
    } else {
      blocks_ = blocks;
    }
  }

  // Starts to copy a group of the tile at hand to `to`. Keys that nobody sees are masked later; they are
  // zeros here only if that is so of the whole group. kLater: the range begins before this tile.
  template <bool kLater = false>
  __device__ __forceinline__ void load_keys(int tile, int group, uint32_t to) const {
    const int token = tile + group * kGroupKeys;
    const bool any = (kLater || token + kGroupKeys > range_.begin) && token < range_.end;
    const LanePlace lane = kSavesRegisters ? lane_place() : lane_;
    copy(place(lane, group, token), to + lane.to, [any](int) { return any; });
  }
  // What nobody sees becomes zeros: a weight of 0 must not meet a NaN.
  template <bool kLater = false>
  __device__ __forceinline__ void load_values(int tile, int group, uint32_t to) const {
    const int token = tile + group * kGroupKeys;
    const LanePlace lane = kSavesRegisters ? lane_place() : lane_;
    const uint8_t* from = place(lane, group, token) + kv_.value_offset;
    if ((kLater || token >= range_.begin) && token + kGroupKeys <= range_.end) {
      copy(from, to + lane.to, [](int) { return true; });
    } else {
      const int row = token + lane_id() / kChunks;
      copy(from, to + lane.to,
           [&](int i) { return (kLater || row + i >= range_.begin) && row + i < range_.end; });
    }
  }

 private:
  static constexpr int kChunks = kDim / 8;
  static constexpr int kRows = kWarp / kChunks;  // that a warp copies at once
  static constexpr int kRowBytes = kDim * 2;

  // This lane's first chunk of a group: in the first group of block 0, and where it goes.
  struct LanePlace {
    const uint8_t* from;
    uint32_t to;
  };
  __device__ __forceinline__ LanePlace lane_place() const {
    const int row = lane_id() / kChunks, chunk = lane_id() % kChunks;
    const int64_t first = (static_cast<int64_t>(kv_head_) << kv_.block_shift) * kRowBytes;
    return {kv_.cache + first + (row * kRowBytes + chunk * kChunkBytes),
            static_cast<uint32_t>(swizzled_offset(row, chunk, kChunks))};
  }

  __device__ __forceinline__ const uint8_t* place(const LanePlace& lane, int group, int token) const {
    const int block = kSavesRegisters ? kept_blocks_[group] : __shfl_sync(kAllLanes, blocks_, group);
    const uint32_t slot = static_cast<uint32_t>(token) & ((1u << kv_.block_shift) - 1);
    return lane.from + static_cast<uint64_t>(static_cast<uint32_t>(block)) * kv_.block_bytes +
           slot * static_cast<uint32_t>(kRowBytes);
  }

  template <class IsValid>
  static __device__ __forceinline__ void copy(const uint8_t* from, uint32_t to, const IsValid& is_valid) {
#pragma unroll
    for (int i = 0; i < kGroupKeys; i += kRows) {
      // Rows i further on: their chunks' places differ in bits that are 0 in the row of this lane.
      copy_async((to ^ static_cast<uint32_t>(i % 8 * kChunkBytes)) + static_cast<uint32_t>(i * kRowBytes),
                 from + i * kRowBytes, is_valid(i));
    }
  }

  const PagedKv& kv_;
  const int& request_;
  const int& kv_head_;
  std::conditional_t<kSavesRegisters, const Range&, const Range> range_;
  LanePlace lane_;
  int blocks_;
  int (&kept_blocks_)[kTileGroups];
};

}  // namespace fs::cuda
