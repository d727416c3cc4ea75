// SPDX-License-Identifier: Apache-2.0
//
// Sums over the threads of a warp and of a block, in one fixed order: partner distances 16, 8, 4, 2, 1, then
// the same over the warps. The result is the same bits in every thread.
#pragma once

#include <cstdint>

namespace fs::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kMaxWarps = 32;  // of a block
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// combine(a, b) must be commutative.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T x, const Combine& combine, int width = kWarp) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    if (distance < width) x = combine(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

__device__ __forceinline__ float warp_sum(float x, int width = kWarp) {
  return warp_reduce(x, [](float a, float b) { return a + b; }, width);
}

// All threads of the block, a multiple of 32, must call it; `scratch` is shared memory of kMaxWarps elements,
// free for other use only after the next __syncthreads().
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T x, T identity, T* scratch, const Combine& combine) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  x = warp_reduce(x, combine);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = lane < static_cast<int>(blockDim.x) / kWarp ? scratch[lane] : identity;
  return warp_reduce(x, combine);
}

__device__ __forceinline__ float block_sum(float x, float* scratch) {
  return block_reduce(x, 0.0f, scratch, [](float a, float b) { return a + b; });
}

// The sum of x, below 2^59, over the lanes of a warp: in pieces of 27 bits, of which 32 fit in 32.
__device__ __forceinline__ uint64_t warp_total(uint64_t x) {
  constexpr int kBits = 27;
  constexpr uint64_t kPiece = (uint64_t{1} << kBits) - 1;
  uint64_t total = 0;
#pragma unroll
  for (int shift = 0; shift < 64; shift += kBits) {
    total += static_cast<uint64_t>(__reduce_add_sync(kAllLanes, static_cast<uint32_t>(x >> shift & kPiece)))
             << shift;
  }
  return total;
}

// The sum of x over this lane and those before it.
template <class T>
__device__ __forceinline__ T warp_inclusive_sum(T x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T before = __shfl_up_sync(kAllLanes, x, distance);
    if (lane >= distance) x += before;
  }
  return x;
}

}  // namespace fs::cuda
