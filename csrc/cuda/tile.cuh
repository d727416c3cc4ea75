// SPDX-License-Identifier: Apache-2.0
//
// What one warp does with 16 rows of a matrix in tensor-core fragments: attention's tile of queries against
// keys and values in shared memory.
//
// Keys and values lie in groups of 16 tokens, each a row of kDim 16-bit values in swizzled chunks
// (layout/swizzle.h). Lane 4 g + t has the rows g and g + 8 ("halves" 0 and 1) of everything, as described in
// ptx.cuh. No lane's result depends on a row that is not its own.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "layout/swizzle.h"

namespace fs::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kGroupKeys = 16;  // keys of a group, the depth of one product with values
inline constexpr int kTileKeys = 64;   // keys between two updates of the softmax
inline constexpr int kTileGroups = kTileKeys / kGroupKeys;

template <int kDim>
inline constexpr int kGroupBytes = kGroupKeys * kDim * 2;

// 16 rows of queries; query[step][...] is the first operand of the product at columns 16 step.
template <int kDim>
using QueryFragments = uint32_t[kDim / 16][4];
// scores[n]: 16 rows by keys 8 n to 8 n + 7.
using ScoreFragments = float[kTileKeys / 8][4];
// weights[group]: 16 rows by the keys of a group, as first operand.
using WeightFragments = uint32_t[kTileGroups][4];
// out[n]: 16 rows by columns 8 n to 8 n + 7.
template <int kDim>
using OutputFragments = float[kDim / 8][4];

template <int kTiles>
__device__ __forceinline__ void clear(WeightFragments (&weights)[kTiles]) {
#pragma unroll
  for (int i = 0; i < kTiles * kTileGroups * 4; ++i)
    weights[i / (kTileGroups * 4)][i / 4 % kTileGroups][i % 4] = 0;
}

// Read anew by every caller: what the compiler derives from a lane it would else keep in registers from the
// start of the kernel to its end, and there are none left for that.
__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  __builtin_assume(lane >= 0 && lane < kWarp);  // or it divides as signed numbers ask for
  return lane;
}

// For the same reason. Blocks are rows of threads.
__device__ __forceinline__ int thread_id() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  __builtin_assume(thread >= 0 && thread < 1024);
  return thread;
}
__device__ __forceinline__ int warp_id() {
  return thread_id() / kWarp;
}

// Lane t of each four has x[i]; afterwards it has what lane i had as x[t].
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
  const int lane = lane_id();
  const bool odd = lane % 2 != 0;
  const uint32_t a = __shfl_xor_sync(kAllLanes, odd ? x[0] : x[1], 1);
  const uint32_t b = __shfl_xor_sync(kAllLanes, odd ? x[2] : x[3], 1);
  (odd ? x[0] : x[1]) = a;
  (odd ? x[2] : x[3]) = b;
  const bool high = lane % 4 >= 2;
  const uint32_t c = __shfl_xor_sync(kAllLanes, high ? x[0] : x[2], 2);
  const uint32_t d = __shfl_xor_sync(kAllLanes, high ? x[1] : x[3], 2);
  (high ? x[0] : x[2]) = c;
  (high ? x[1] : x[3]) = d;
}

// A lane's two rows of queries, 16 bytes at a time so that four lanes read whole sectors.
template <class T, int kDim>
__device__ __forceinline__ void load_queries(QueryFragments<kDim>& query, const T* const (&rows)[2]) {
#pragma unroll
  for (int columns = 0; columns < kDim; columns += 32) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 loaded = *reinterpret_cast<const uint4*>(rows[half] + columns + lane_id() % 4 * 8);
      uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
      transpose_quad(pairs);
#pragma unroll
      for (int i = 0; i < 4; ++i) query[columns / 16 + i / 2][i % 2 * 2 + half] = pairs[i];
    }
  }
}

// A lane's row of outputs times `scale`, the same way back. Never a negative zero, so that a product with
// nothing visible, which may turn it into a positive one, changes no bit.
template <class T, int kDim>
__device__ __forceinline__ void store_row(T* row, const OutputFragments<kDim>& out, int half, float scale,
                                          bool exists) {
#pragma unroll
  for (int columns = 0; columns < kDim; columns += 32) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* from = &out[columns / 8 + i][2 * half];
      pairs[i] = pack_pair<T>(__fmaf_rn(from[0], scale, 0.0f), __fmaf_rn(from[1], scale, 0.0f));
    }
    transpose_quad(pairs);
    if (exists) {
      *reinterpret_cast<uint4*>(row + columns + lane_id() % 4 * 8) =
          make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

// The first operands of a warp's products with keys, kTiles of 16 rows each: of one tile in registers, of
// more of them in shared memory, as groups of keys lie there.
template <int kDim>
struct HeldQueries {
  QueryFragments<kDim> fragments;

  __device__ __forceinline__ void get(int step, uint32_t (&a)[1][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[0][i] = fragments[step][i];
  }
};
template <int kDim, int kTiles>
struct SharedQueries {
  uint32_t begin;  // of the block's queries

  __device__ __forceinline__ uint32_t of_warp() const {
    return begin + static_cast<uint32_t>(warp_id() * kTiles * kGroupBytes<kDim>);
  }
  __device__ __forceinline__ void get(int step, uint32_t (&a)[kTiles][4]) const {
    const int lane = lane_id();
    const uint32_t mine = of_warp() + static_cast<uint32_t>(swizzled_offset(lane % 16, lane / 16, kDim / 8));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      load_matrices(a[tile], (mine ^ static_cast<uint32_t>(step * 2 * kChunkBytes)) +
                                 static_cast<uint32_t>(tile * kGroupBytes<kDim>));
    }
  }
};

// scores[tile][2 first ...] = queries keys^T for kCount groups of keys that lie one after another. Each score
// is one chain of products in ascending columns, from zero.
template <class T, int kDim, int kTiles, int kCount, class Queries>
__device__ __forceinline__ void multiply_keys(ScoreFragments (&scores)[kTiles], const Queries& queries,
                                              uint32_t keys, int first) {
  const int lane = lane_id();
  const uint32_t mine =
      keys + static_cast<uint32_t>(swizzled_offset(lane / 16 * 8 + lane % 8, lane % 16 / 8, kDim / 8));
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int n = 0; n < 2 * kCount; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[tile][2 * first + n][i] = 0.0f;
    }
  }
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t q[kTiles][4];
    queries.get(step, q);
#pragma unroll
    for (int group = 0; group < kCount; ++group) {
      uint32_t k[4];
      load_matrices(k, (mine ^ static_cast<uint32_t>(step * 2 * kChunkBytes)) +
                           static_cast<uint32_t>(group * kGroupBytes<kDim>));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_add<T>(scores[tile][2 * (first + group)], q[tile], k[0], k[1]);
        multiply_add<T>(scores[tile][2 * (first + group) + 1], q[tile], k[2], k[3]);
      }
    }
  }
}

// Each tile's out += weights values and sums += weights, for kCount groups that lie one after another, each
// output one chain in ascending keys. The sums are of the rounded weights, the same ones that weigh the
// values.
template <class T, int kDim, int kTiles, int kCount, class Rows>
__device__ __forceinline__ void multiply_values(Rows (&rows)[kTiles],
                                                const WeightFragments (&weights)[kTiles], uint32_t values,
                                                int first) {
  const int lane = lane_id();
  const uint32_t mine = values + static_cast<uint32_t>(swizzled_offset(lane % 16, lane / 16, kDim / 8));
  float sums[kTiles][4];  // all columns of a product with ones are alike
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[tile][i] = rows[tile].sums[i / 2];
  }
#pragma unroll
  for (int group = 0; group < kCount; ++group) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      multiply_add<T>(sums[tile], weights[tile][first + group], kOnes<T>, kOnes<T>);
    }
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t v[4];
      load_transposed(v, (mine ^ static_cast<uint32_t>(step * 2 * kChunkBytes)) +
                             static_cast<uint32_t>(group * kGroupBytes<kDim>));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_add<T>(rows[tile].out[2 * step], weights[tile][first + group], v[0], v[1]);
        multiply_add<T>(rows[tile].out[2 * step + 1], weights[tile][first + group], v[2], v[3]);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    rows[tile].sums[0] = sums[tile][0];
    rows[tile].sums[1] = sums[tile][2];
  }
}

}  // namespace fs::cuda
