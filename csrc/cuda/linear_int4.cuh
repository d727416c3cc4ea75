// SPDX-License-Identifier: Apache-2.0
//
// Matrix product with 4-bit weights on tensor cores, for one to any number of rows.
//
// A block of eight warps computes 128 output columns for up to 64 rows. The weights are the left operand, the
// activations the right one: a product of 16 x 8 then takes 8 rows, so that few rows cost few products, and a
// lane's sums belong to the output columns whose scales it holds. Warp w owns the panel of 32 columns w % 4
// and sums the first (w < 4) or second half of the block's range of K. Both operands pass through a ring of
// stages of 128 inputs in shared memory, filled by asynchronous copies several stages ahead; a lane copies
// the codes that it will itself use, so only activations and scales need a barrier, and that one joins the
// four warps of one half only.
//
// A group's products are summed on the tensor cores from zero, and the sum is scaled in float32 (by FMA into
// the running sum): scales keep their full precision for both activation formats, and cost two FMAs per
// product and group instead of a multiplication per pair of codes. Zero points are subtracted from the codes,
// exactly (dequantize.cuh). Minimums multiply the sum of the group's activations, one more product with ones.
//
// One order of additions, whatever the number of rows: an output is the sum over the parts of its column
// tile, in order; a part is first half + second half; a half runs group by group, each a chain of products of
// 16 inputs in ascending order. Where the parts and halves begin depends on N, K and the number of
// multiprocessors (layout/stripes.h). Tiles for 8, 16, 32, 48 and 64 rows are instances of one template and
// differ in how many products go side by side, never along K.
//
// Who computes which part, and how parts are added: stripe_walk.cuh.
//
// Bytes at least: the weights once per 64 rows, with their scales; M K activations once per column tile (from
// L2); M N outputs. Shared memory is reused for another purpose only between two barriers of the whole block.
#pragma once

#include "cuda/int4_stage.cuh"

namespace fs::cuda::int4 {

// After the loop the ring holds first the second half's sums, then the tile of outputs.
template <int kTiles>
struct Epilogue {
  static constexpr int kRowBytes = kStripeColumns * 2 + kChunkBytes;  // an odd number of chunks: no conflicts
  static constexpr int kTile = kTiles * kBlocksOf16 * kHalfThreads * 16;
  static constexpr int kArrived = kTile + kTiles * 8 * kRowBytes;
  static constexpr int kBytes = kArrived + 16;
};

// Once around the ring in one turn of the loop, where that pays: places in the ring are constants then, and
// addresses move on once.
template <int kGroup, bool kMinimums>
constexpr bool kIsUnrolled = kGroup == 128 && !kMinimums;

// Calls f(float4& four sums, index) for each product tile of the warp.
template <int kTiles, class F>
__device__ __forceinline__ void for_each(Sums<kTiles>& sums, const F& f) {
#pragma unroll
  for (int block = 0; block < kBlocksOf16; ++block) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) f(sums[block][tile], block * kTiles + tile);
  }
}

// This warp's half of a part: units [begin, end) of the panel's K. A warp without a panel copies activations.
template <class T, int kTiles, int kGroup, bool kMinimums, int kSlots, bool kHasPanel, bool kPlain>
__device__ __forceinline__ void sum_half(Sums<kTiles>& sums, const Operands<T>& op, const Place& place,
                                         uint32_t ring, int begin, int end, int first_row,
                                         const uint8_t* panel, uint64_t policy) {
  constexpr auto kStageBytes = static_cast<uint32_t>(Stage<kTiles, kGroup>::kBytes);
  Copier<T, kTiles, kGroup, kMinimums, kHasPanel, kPlain> copier(op, place, ring, begin, end, first_row,
                                                                 panel, policy);
#pragma unroll
  for (int i = 0; i < kSlots - 1; ++i) {
    copier.copy(static_cast<uint32_t>(i) * kStageBytes, i);
    commit_copies();
  }
  copier.advance(kSlots - 1);
  float x_sums[kTiles][4] = {};
  const uint32_t zero = kMinimums ? 0 : 0x00080008u;
  MinusZero<T> zeros[kBlocksOf16] = {MinusZero<T>(zero, zero), MinusZero<T>(zero, zero)};
  if constexpr (kGroup == 0 && !kMinimums && kHasPanel) {
    if (!kPlain && op.zero_points) {
      uint32_t z = 0;
      if (place.t == 0) z = *reinterpret_cast<const uint32_t*>(panel + op.offsets_at + place.g * 4);
      z = __shfl_sync(kAllLanes, z, place.lane - place.t);
      zeros[0] = MinusZero<T>(twice_byte(z, 0), twice_byte(z, 1));
      zeros[1] = MinusZero<T>(twice_byte(z, 2), twice_byte(z, 3));
    }
  }
  constexpr int kTurn = kIsUnrolled<kGroup, kMinimums> ? kSlots : 1;
  const auto walk_units = [&] {
    uint32_t slot = 0, free_slot = (kSlots - 1) * kStageBytes;
    while (copier.units_left() > 1 - kSlots) {
#pragma unroll
      for (int i = 0; i < kTurn; ++i) {
        if (i > 0 && copier.units_left() - i <= 1 - kSlots) return;
        if constexpr (kTurn > 1) {
          slot = static_cast<uint32_t>(i) * kStageBytes;
          free_slot = static_cast<uint32_t>((i + kSlots - 1) % kSlots) * kStageBytes;
        }
        wait_for_copies<kSlots - 2>();
        // The stage is there for the four warps, and all of them have left the one that is filled next.
        named_barrier(1 + place.half, kHalfThreads);
        copier.copy(free_slot, i);
        commit_copies();
        if constexpr (kHasPanel) {
          multiply_unit<T, kTiles, kGroup, kMinimums, kPlain>(sums, x_sums, zeros, op, place, ring, slot);
        }
        if constexpr (kTurn == 1) {
          free_slot = slot;
          slot = slot == (kSlots - 1) * kStageBytes ? 0 : slot + kStageBytes;
        }
      }
      copier.advance(kTurn);
    }
  };
  walk_units();
  wait_for_copies<0>();  // zeros may still be on their way
  if constexpr (kGroup == 0 && kHasPanel) {
    float scales[kBlocksOf16][2], minimums[kBlocksOf16][2];
    load_scales(scales, panel + op.scales_at, place);
    if constexpr (kMinimums) load_scales(minimums, panel + op.offsets_at, place);
#pragma unroll
    for (int block = 0; block < kBlocksOf16; ++block) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = sums[block][tile][i];
          sum = __fmul_rn(scales[block][i / 2], sum);
          if constexpr (kMinimums) sum = __fmaf_rn(minimums[block][i / 2], x_sums[tile][i % 2], sum);
        }
      }
    }
  }
  if constexpr (kHasPanel) {
    for_each<kTiles>(sums, [](float (&sum)[4], int) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] *= 1.0f / CodeFormat<T>::kStep;  // a power of two
    });
  }
}

__device__ __forceinline__ float4 as_float4(const float (&x)[4]) {
  return float4{x[0], x[1], x[2], x[3]};
}

// The threads of the first half turn their sums around in shared memory and write rows of `out`.
template <class T, int kTiles>
__device__ __forceinline__ void write_tile(const Operands<T>& op, const Place& place, uint8_t* tile,
                                           Sums<kTiles>& sums, int first_row, int first_column,
                                           bool has_panel) {
  constexpr int kRowBytes = Epilogue<kTiles>::kRowBytes;
  if (has_panel) {
#pragma unroll
    for (int block = 0; block < kBlocksOf16; ++block) {
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const int column = place.panel * kInt4Rows + block * 16 + high * 8 + place.g;
        const bool exists = first_column + column < op.num_columns;
        const float bias = op.bias != nullptr && exists ? op.bias[first_column + column] : 0.0f;
#pragma unroll
        for (int row_tile = 0; row_tile < kTiles; ++row_tile) {
#pragma unroll
          for (int low = 0; low < 2; ++low) {
            const int row = row_tile * 8 + place.t * 2 + low;
            *reinterpret_cast<T*>(tile + row * kRowBytes + column * 2) =
                from_float<T>(__fadd_rn(sums[block][row_tile][2 * high + low], bias));
          }
        }
      }
    }
  }
  named_barrier(1, kHalfThreads);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int row = place.in_half / kRowChunks + i * (kHalfThreads / kRowChunks),
              chunk = place.in_half % kRowChunks;
    const int column = first_column + chunk * 8;
    if (first_row + row >= op.num_rows || column >= op.num_columns) continue;
    const uint8_t* from = tile + row * kRowBytes + chunk * kChunkBytes;
    T* to = op.out + (first_row + row) * op.out_stride + column;
    if (op.vector_out && column + 8 <= op.num_columns) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int j = 0; j < 8 && column + j < op.num_columns; ++j) to[j] = reinterpret_cast<const T*>(from)[j];
    }
  }
}

// Blocks on a multiprocessor.
template <int kTiles>
inline constexpr int kBlocksAtOnce = kTiles > 2 ? 1 : 2;

template <class T, int kTiles, int kGroup, bool kMinimums, int kSlots>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kTiles>) linear_int4_kernel(const Operands<T> op) {
  extern __shared__ __align__(256) uint8_t shared[];
  uint32_t& arrived = *reinterpret_cast<uint32_t*>(shared + Epilogue<kTiles>::kArrived);
  const uint32_t ring = shared_address(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = __shfl_sync(kAllLanes, thread / 32, 0);  // one for all lanes, as the compiler then knows
  const Place place{thread % 32,     warp % kPanels, warp / kPanels,
                    thread % 32 / 4, thread % 4,     thread % kHalfThreads};
  const uint64_t policy = cache_policy(op.work.num_row_tiles == 1);
  StripeWalk walk(op.work);
  do {
    const int begin = walk.begin(), end = walk.end();
    const int middle = part_middle(begin, end);
    const int first_row = walk.row_tile * kTiles * 8, first_column = walk.column_tile * kStripeColumns;
    const int panel = walk.column_tile * kPanels + place.panel;
    const bool has_panel = panel < op.num_panels;
    Sums<kTiles> sums = {};
    const int half_begin = place.half == 0 ? begin : middle, half_end = place.half == 0 ? middle : end;
    const auto sum = [&]<bool kHasPanel, bool kPlain>() {
      const uint8_t* from = op.packed + (kHasPanel ? panel * op.panel_bytes : 0);
      sum_half<T, kTiles, kGroup, kMinimums, kSlots, kHasPanel, kPlain>(sums, op, place, ring, half_begin,
                                                                        half_end, first_row, from, policy);
    };
    constexpr bool kHasPlain = kIsUnrolled<kGroup, kMinimums>;
    if (!has_panel) {
      sum.template operator()<false, false>();
    } else if (kHasPlain && is_plain(op)) {
      sum.template operator()<true, kHasPlain>();
    } else {
      sum.template operator()<true, false>();
    }
    __syncthreads();  // all have left the ring
    auto* second_half = reinterpret_cast<float4*>(shared) + place.in_half;
    if (place.half == 1) {
      for_each<kTiles>(sums, [&](float (&sum)[4], int i) { second_half[i * kHalfThreads] = as_float4(sum); });
    }
    __syncthreads();
    if (place.half == 0) {
      for_each<kTiles>(sums, [&](float (&sum)[4], int i) {
        const float4 other = second_half[i * kHalfThreads];
        sum[0] = __fadd_rn(sum[0], other.x);
        sum[1] = __fadd_rn(sum[1], other.y);
        sum[2] = __fadd_rn(sum[2], other.z);
        sum[3] = __fadd_rn(sum[3], other.w);
      });
      const bool complete = walk.add_parts<kHalfThreads, kBlocksOf16 * kTiles>(
          place.in_half, arrived, [&](const auto& f) { for_each<kTiles>(sums, f); });
      if (complete) {
        write_tile<T, kTiles>(op, place, shared + Epilogue<kTiles>::kTile, sums, first_row, first_column,
                              has_panel);
      }
    }
    __syncthreads();  // the ring is free again
  } while (walk.advance());
}

template <class T, int kTiles, int kGroup, bool kMinimums, int kSlots>
void launch_with(Operands<T> op, int num_multiprocessors, cudaStream_t stream) {
  constexpr int kRingBytes = kSlots * Stage<kTiles, kGroup>::kBytes;
  constexpr int kBytes = kRingBytes > Epilogue<kTiles>::kBytes ? kRingBytes : Epilogue<kTiles>::kBytes;
  const dim3 grid = stripe_grid(op.work, op.num_rows, kTiles * 8, num_multiprocessors);
  const auto kernel = linear_int4_kernel<T, kTiles, kGroup, kMinimums, kSlots>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  FS_CHECK(error == cudaSuccess, "linear_int4: the device refuses "
                                     << kBytes << " bytes of shared memory: " << cudaGetErrorString(error));
  kernel<<<grid, kThreads, kBytes, stream>>>(op);
}

// Few rows wait for memory: three stages. Many rows compute on a stage for longer than the next one takes to
// come: two. 32 rows: three where they fit.
template <class T, int kTiles, int kGroup, bool kMinimums>
void launch(const Operands<T>& op, int num_multiprocessors, int max_shared_bytes, cudaStream_t stream) {
  constexpr int kThree = 3 * Stage<kTiles, kGroup>::kBytes;
  if constexpr (kTiles == 4) {
    if (max_shared_bytes < kThree) {
      return launch_with<T, kTiles, kGroup, kMinimums, 2>(op, num_multiprocessors, stream);
    }
  }
  launch_with<T, kTiles, kGroup, kMinimums, kTiles <= 4 ? 3 : 2>(op, num_multiprocessors, stream);
}

}  // namespace fs::cuda::int4
