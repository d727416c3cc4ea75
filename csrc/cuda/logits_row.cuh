// SPDX-License-Identifier: Apache-2.0
//
// One row of logits, read by one block of kRowThreads threads: thread i has the quads i, i + kRowThreads, ...
// of four neighbouring tokens, however the row is aligned. A quad is one Philox block and one access of 16
// bytes; in a row that is not aligned to 16 bytes, which every other one is where the vocabulary is odd, one
// and 1/32.
#pragma once

#include <cstdint>

#include "cuda/reduce.cuh"
#include "layout/sampling.h"

namespace fs::cuda {

inline constexpr int kRowThreads = 1024;
inline constexpr float kMinusInfinity = -__builtin_huge_valf();

struct Quad {
  float x[4];
};

class LogitsRow {
 public:
  const float* logits;
  int vocab;

  __device__ __forceinline__ LogitsRow(const float* row, int num_tokens)
      : logits(row),
        vocab(num_tokens),
        lead_(static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(float) % 4)) {}

  __device__ __forceinline__ int num_quads() const { return (vocab + 3) / 4; }

  // f(quad index, quad) for this thread's quads. All threads of the block call it.
  template <class F>
  __device__ __forceinline__ void visit(const F& f) const {
    if (lead_ == 0) {
      for (int index = static_cast<int>(threadIdx.x); index < num_quads(); index += kRowThreads)
        f(index, quad_at<false>(4 * index));
    } else {
      visit_by_warps([&](int index, const Quad& quad) {
        if (index < num_quads()) f(index, quad);
      });
    }
  }
  // The same, but the lanes of a warp come together, the last time perhaps with quads beyond the row: all
  // -infinity, as are the tokens past the end of the vocabulary.
  template <class F>
  __device__ __forceinline__ void visit_by_warps(const F& f) const {
    for (int index = static_cast<int>(threadIdx.x); index - lane() < num_quads(); index += kRowThreads)
      f(index, lead_ == 0 ? quad_at<false>(4 * index) : shifted_quad(index));
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  // The tokens id to id + 3, which lie at a multiple of 16 bytes; those past the row, or before it, are
  // -infinity.
  template <bool kMayBeBefore>
  __device__ __forceinline__ Quad quad_at(int id) const {
    const bool begins = !kMayBeBefore || id >= 0;
    if (begins && id + 4 <= vocab) {
      const float4 all = *reinterpret_cast<const float4*>(logits + id);
      return {{all.x, all.y, all.z, all.w}};
    }
    Quad q;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      q.x[i] = (begins || id + i >= 0) && id + i < vocab ? logits[id + i] : kMinusInfinity;
    }
    return q;
  }

  // A quad that does not begin at a multiple of 16 bytes: its beginning from the lane's own access, the rest
  // from the next lane's. The same tokens as in an aligned row, so that sums over a row are the same bits.
  __device__ __forceinline__ Quad shifted_quad(int index) const {
    const int id = 4 * index - lead_;
    const Quad own = quad_at<true>(id);
    Quad next;
#pragma unroll
    for (int i = 0; i < 3; ++i) next.x[i] = __shfl_down_sync(kAllLanes, own.x[i], 1);
    if (lane() == kWarp - 1) next = quad_at<false>(id + 4);
    const float all[7] = {own.x[0], own.x[1], own.x[2], own.x[3], next.x[0], next.x[1], next.x[2]};
    Quad q;
#pragma unroll
    for (int i = 0; i < 4; ++i) q.x[i] = lead_ == 1 ? all[i + 1] : lead_ == 2 ? all[i + 2] : all[i + 3];
    return q;
  }

  int lead_;  // floats from the last multiple of 16 bytes to the row
};

// Orders tokens by logit descending, then id ascending: larger comes first. All keys of a row differ.
__device__ __forceinline__ uint64_t token_key(float logit, int id) {
  return static_cast<uint64_t>(order_key(logit)) << 32 | static_cast<uint32_t>(~id);
}
__device__ __forceinline__ int id_of_key(uint64_t key) {
  return static_cast<int>(~static_cast<uint32_t>(key));
}
__device__ __forceinline__ float logit_of_key(uint64_t key) {
  return float_from_order_key(static_cast<uint32_t>(key >> 32));
}

__device__ __forceinline__ bool is_sound(float logit) {
  return logit <= kLargestFloat;  // false for NaN and +infinity
}

__device__ __forceinline__ uint64_t block_max_key(uint64_t key, uint64_t* scratch) {
  return block_reduce(key, uint64_t{0}, scratch, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}

// What one pass over a row finds.
struct RowScan {
  uint64_t best;  // the key of the first token in the order
  float own_max;  // of this thread's tokens: the maxima are kRowThreads different tokens' logits
  bool sound;     // no NaN and no +infinity
};

__device__ __forceinline__ RowScan scan_row(const LogitsRow& row, uint64_t* scratch) {
  float own_max = kMinusInfinity;
  int own_id = 0x7fffffff;
  bool sound = true;
  row.visit([&](int index, const Quad& quad) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sound = sound && is_sound(quad.x[i]);
      if (quad.x[i] > own_max) {
        own_max = quad.x[i];
        own_id = 4 * index + i;
      }
    }
  });
  const bool all_sound = __syncthreads_and(sound ? 1 : 0) != 0;
  return {block_max_key(token_key(own_max, own_id), scratch), own_max, all_sound};
}

}  // namespace fs::cuda
