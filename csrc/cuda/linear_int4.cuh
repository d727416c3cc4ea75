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
// Few rows: each block computes one stripe. If a column tile has several parts, each block leaves its part,
// in float32, in the workspace, and the last one to arrive adds them up: nobody waits for anybody. The
// counters of arrivals at the beginning of the workspace are zero before and after. Many rows: there are
// enough tiles to give every block whole ones; it computes the parts one after another and adds them in the
// same order.
//
// Bytes at least: the weights once per 64 rows, with their scales; M K activations once per column tile (from
// L2); M N outputs. Shared memory is reused for another purpose only between two barriers of the whole block.
#pragma once

#include <type_traits>

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

// This warp's half of a part: units [begin, end) of the panel's K. A warp without a panel copies activations.
template <class T, int kTiles, int kGroup, bool kMinimums, int kSlots, bool kHasPanel>
__device__ __forceinline__ void sum_half(Sums<kTiles>& sums, const Operands<T>& op, const Place& place,
                                         uint32_t ring, int begin, int end, int first_row,
                                         const uint8_t* panel, uint64_t policy) {
  constexpr auto kStageBytes = static_cast<uint32_t>(Stage<kTiles, kGroup>::kBytes);
  Copier<T, kTiles, kGroup, kMinimums, kHasPanel> copier(op, place, begin, end, first_row, panel, policy);
#pragma unroll
  for (int i = 0; i < kSlots - 1; ++i) {
    copier.copy(ring + static_cast<uint32_t>(i) * kStageBytes);
    commit_copies();
  }
  float x_sums[kTiles][4] = {};
  const uint32_t zero = kMinimums ? 0 : 0x00080008u;
  MinusZero<T> zeros[kBlocksOf16] = {MinusZero<T>(zero, zero), MinusZero<T>(zero, zero)};
  if constexpr (kGroup == 0 && !kMinimums && kHasPanel) {
    if (op.zero_points) {
      uint32_t z = 0;
      if (place.t == 0) z = *reinterpret_cast<const uint32_t*>(panel + op.offsets_at + place.g * 4);
      z = __shfl_sync(kAllLanes, z, place.lane - place.t);
      zeros[0] = MinusZero<T>(twice_byte(z, 0), twice_byte(z, 1));
      zeros[1] = MinusZero<T>(twice_byte(z, 2), twice_byte(z, 3));
    }
  }
  uint32_t slot = ring, free_slot = ring + (kSlots - 1) * kStageBytes;
  while (copier.units_left() > 1 - kSlots) {
    wait_for_copies<kSlots - 2>();
    // The stage is there for the four warps, and all of them have left the one that is filled next.
    named_barrier(1 + place.half, kHalfThreads);
    copier.copy(free_slot);
    commit_copies();
    if constexpr (kHasPanel) {
      multiply_unit<T, kTiles, kGroup, kMinimums>(sums, x_sums, zeros, op.zero_points, place, slot);
    }
    free_slot = slot;
    slot += kStageBytes;
    if (slot == ring + kSlots * kStageBytes) slot = ring;
  }
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
}

// Calls f(float4& four sums, index) for each product tile of the warp.
template <int kTiles, class F>
__device__ __forceinline__ void for_each(Sums<kTiles>& sums, const F& f) {
#pragma unroll
  for (int block = 0; block < kBlocksOf16; ++block) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) f(sums[block][tile], block * kTiles + tile);
  }
}

__device__ __forceinline__ float4 as_float4(const float (&x)[4]) {
  return float4{x[0], x[1], x[2], x[3]};
}
__device__ __forceinline__ void add(float (&x)[4], const float4& y) {  // x = y + x
  x[0] = __fadd_rn(y.x, x[0]);
  x[1] = __fadd_rn(y.y, x[1]);
  x[2] = __fadd_rn(y.z, x[2]);
  x[3] = __fadd_rn(y.w, x[3]);
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

// Blocks on a multiprocessor. One instance needs a few registers more than 128 on sm_90 and would spill two;
// in groups of 32 two of its blocks do not fit the shared memory of sm_80 anyway.
template <class T, int kTiles, int kGroup>
inline constexpr int kBlocksAtOnce =
    kTiles > 2 || (std::is_same_v<T, bf16> && kTiles == 2 && kGroup == 32) ? 1 : 2;

template <class T, int kTiles, int kGroup, bool kMinimums, int kSlots>
__global__ void __launch_bounds__(kThreads, (kBlocksAtOnce<T, kTiles, kGroup>))
    linear_int4_kernel(const Operands<T> op) {
  extern __shared__ __align__(256) uint8_t shared[];
  uint32_t& arrived = *reinterpret_cast<uint32_t*>(shared + Epilogue<kTiles>::kArrived);
  const uint32_t ring = shared_address(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const Place place{thread % 32, thread / 32 % kPanels, thread / kHalfThreads, thread % 32 / 4,
                    thread % 4,  thread % kHalfThreads};
  const Stripes stripes = op.stripes;
  const int num_tiles = stripes.num_column_tiles;
  const uint64_t policy = cache_policy(op.num_row_tiles == 1);
  const auto block = static_cast<int>(blockIdx.x);

  // A stripe: parts of neighbouring column tiles. Whole tiles: all parts of one column tile after the other.
  int tile = block;  // of whole tiles: column tile * num_row_tiles + row tile
  int row_tile = op.whole_tiles ? tile % op.num_row_tiles : static_cast<int>(blockIdx.y);
  int column_tile = op.whole_tiles ? tile / op.num_row_tiles : block * stripes.length / stripes.pitch;
  int part = op.whole_tiles ? 0 : block - stripes.first_stripe(column_tile);
  const int first_column_tile = column_tile;
  for (;;) {
    const int num_parts = stripes.num_parts(column_tile);
    const int begin = stripes.part_begin(column_tile, part), end = stripes.part_end(column_tile, part);
    const int middle = part_middle(begin, end);
    const int first_row = row_tile * kTiles * 8, first_column = column_tile * kStripeColumns;
    const int panel = column_tile * kPanels + place.panel;
    const bool has_panel = panel < op.num_panels;
    Sums<kTiles> sums = {};
    const int half_begin = place.half == 0 ? begin : middle, half_end = place.half == 0 ? middle : end;
    if (has_panel) {
      sum_half<T, kTiles, kGroup, kMinimums, kSlots, true>(
          sums, op, place, ring, half_begin, half_end, first_row, op.packed + panel * op.panel_bytes, policy);
    } else {
      sum_half<T, kTiles, kGroup, kMinimums, kSlots, false>(sums, op, place, ring, half_begin, half_end,
                                                            first_row, op.packed, policy);
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
      constexpr int kSlot = kBlocksOf16 * kTiles * kHalfThreads;  // float4s
      bool complete = true;
      if (num_parts > 1 && op.whole_tiles) {
        float4* total = op.partials + static_cast<int64_t>(block) * kSlot + place.in_half;
        complete = part == num_parts - 1;
        for_each<kTiles>(sums, [&](float (&sum)[4], int i) {
          if (part > 0) add(sum, total[i * kHalfThreads]);
          if (!complete) total[i * kHalfThreads] = as_float4(sum);
        });
      } else if (num_parts > 1) {
        // A stripe leaves at most two parts that are not whole column tiles: of its first and its last one.
        const int slots_per_stripe = stripes.pitch % stripes.length == 0 ? 1 : 2;
        const auto slot = [&](int stripe, int which) {
          const int64_t of_row_tile = static_cast<int64_t>(row_tile) * stripes.count + stripe;
          return op.partials + (of_row_tile * slots_per_stripe + which) * kSlot + place.in_half;
        };
        float4* mine = slot(block, column_tile != first_column_tile ? 1 : 0);
        for_each<kTiles>(sums, [&](float (&sum)[4], int i) { mine[i * kHalfThreads] = as_float4(sum); });
        named_barrier(1, kHalfThreads);
        uint32_t* counter = op.counters + row_tile * num_tiles + column_tile;
        if (place.in_half == 0) {
          __threadfence();
          arrived = atomicAdd(counter, 1u);
          __threadfence();
        }
        named_barrier(1, kHalfThreads);
        complete = arrived == static_cast<uint32_t>(num_parts - 1);
        if (complete) {
          if (place.in_half == 0) *counter = 0;
          for (int p = 0; p < num_parts; ++p) {
            const int stripe = stripes.first_stripe(column_tile) + p;
            const bool is_first = stripe * stripes.length / stripes.pitch == column_tile;
            const float4* from = slot(stripe, is_first ? 0 : 1);
            for_each<kTiles>(sums, [&](float (&sum)[4], int i) {
              const float4 next = __ldcg(from + i * kHalfThreads);
              sum[0] = p == 0 ? next.x : __fadd_rn(sum[0], next.x);
              sum[1] = p == 0 ? next.y : __fadd_rn(sum[1], next.y);
              sum[2] = p == 0 ? next.z : __fadd_rn(sum[2], next.z);
              sum[3] = p == 0 ? next.w : __fadd_rn(sum[3], next.w);
            });
          }
        }
      }
      if (complete) {
        write_tile<T, kTiles>(op, place, shared + Epilogue<kTiles>::kTile, sums, first_row, first_column,
                              has_panel);
      }
    }
    __syncthreads();  // the ring is free again

    if (op.whole_tiles) {
      if (++part < num_parts) continue;
      tile += static_cast<int>(gridDim.x);
      if (tile >= op.num_row_tiles * num_tiles) return;
      row_tile = tile % op.num_row_tiles;
      column_tile = tile / op.num_row_tiles;
    } else {
      ++column_tile;
      if (column_tile == num_tiles || column_tile * stripes.pitch >= (block + 1) * stripes.length) return;
    }
    part = 0;
  }
}

template <class T, int kTiles, int kGroup, bool kMinimums, int kSlots>
void launch_with(Operands<T> op, int num_multiprocessors, cudaStream_t stream) {
  constexpr int kRingBytes = kSlots * Stage<kTiles, kGroup>::kBytes;
  constexpr int kBytes = kRingBytes > Epilogue<kTiles>::kBytes ? kRingBytes : Epilogue<kTiles>::kBytes;
  op.num_row_tiles = static_cast<int>(ceil_div(op.num_rows, kTiles * 8));
  const int64_t tiles = static_cast<int64_t>(op.num_row_tiles) * op.stripes.num_column_tiles;
  op.whole_tiles = op.num_row_tiles > 1 && tiles >= num_multiprocessors;
  const auto kernel = linear_int4_kernel<T, kTiles, kGroup, kMinimums, kSlots>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  FS_CHECK(error == cudaSuccess, "linear_int4: the device refuses "
                                     << kBytes << " bytes of shared memory: " << cudaGetErrorString(error));
  const int64_t resident = 2 * static_cast<int64_t>(num_multiprocessors);
  const dim3 grid(
      static_cast<unsigned>(op.whole_tiles ? (tiles < resident ? tiles : resident) : op.stripes.count),
      static_cast<unsigned>(op.whole_tiles ? 1 : op.num_row_tiles));
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
