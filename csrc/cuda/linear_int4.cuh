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

#include "cuda/dequantize.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "layout/int4_fragment.h"
#include "layout/stripes.h"
#include "layout/swizzle.h"

namespace fs::cuda::int4 {

constexpr int kThreads = 256;
constexpr int kPanels = kStripeColumns / kInt4Rows;  // 4: warps side by side
constexpr int kHalfThreads = 32 * kPanels;
constexpr int kBlocksOf16 = 2;  // in a panel
constexpr int kSteps = kStripeDepth / 16;
constexpr int kCodeBytes = kStripeDepth * kInt4Rows / 2;  // of a panel and stage
constexpr int kRowChunks = kStripeDepth * 2 / kChunkBytes;

template <class T>
struct Operands {
  T* out;
  const T* x;
  const uint8_t* packed;
  const float* bias;
  uint32_t* counters;
  float4* partials;
  int64_t out_stride, x_stride;  // elements
  int64_t panel_bytes;
  int num_rows, num_columns, depth;
  int num_panels, num_groups, scales_at, offsets_at;
  int num_row_tiles;
  int num_slots;  // of the ring
  Stripes stripes;
  bool whole_tiles;  // each block computes whole column tiles, one after another
  bool zero_points;
  bool vector_out;  // rows of out can be stored 16 bytes at a time
};

// What lies where in one stage of the ring.
template <int kTiles, int kGroup>
struct Stage {
  static constexpr int kGroups = kGroup == 0 ? 0 : kStripeDepth / kGroup;
  static constexpr int kX = kTiles * 8 * kRowChunks * kChunkBytes;  // of one half
  static constexpr int kCodes = 2 * kX;
  static constexpr int kScales = kCodes + 2 * kPanels * kCodeBytes;
  static constexpr int kOffsets = kScales + 2 * kPanels * kGroups * 64;
  static constexpr int kBytes = kOffsets + 2 * kPanels * kGroups * 64;
};

// After the loop the ring holds first the second half's sums, then the tile of outputs.
template <int kTiles>
struct Epilogue {
  static constexpr int kRowBytes = kStripeColumns * 2 + kChunkBytes;  // an odd number of chunks: no conflicts
  static constexpr int kTile = kTiles * kBlocksOf16 * kHalfThreads * 16;
  static constexpr int kArrived = kTile + kTiles * 8 * kRowBytes;
  static constexpr int kBytes = kArrived + 16;
};

struct Place {
  int lane, panel, half;  // of the thread in its block
  int g, t;               // lane = 4 g + t
  int in_half;            // thread among those of its half
};

__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}
__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

__device__ __forceinline__ void unpack_scales(float (&scales)[kBlocksOf16][2], uint2 pairs) {
  scales[0][0] = to_float(f16{static_cast<uint16_t>(pairs.x)});
  scales[0][1] = to_float(f16{static_cast<uint16_t>(pairs.x >> 16)});
  scales[1][0] = to_float(f16{static_cast<uint16_t>(pairs.y)});
  scales[1][1] = to_float(f16{static_cast<uint16_t>(pairs.y >> 16)});
}

// A row group's scales or minimums from global memory: the first lane of a quad reads them for all four.
__device__ __forceinline__ void load_scales(float (&scales)[kBlocksOf16][2], const uint8_t* from,
                                            const Place& place) {
  uint2 pairs{0, 0};
  if (place.t == 0) pairs = *reinterpret_cast<const uint2*>(from + place.g * 8);
  pairs.x = __shfl_sync(kAllLanes, pairs.x, place.lane - place.t);
  pairs.y = __shfl_sync(kAllLanes, pairs.y, place.lane - place.t);
  unpack_scales(scales, pairs);
}

// Starts the copies of this thread for one unit of K.
template <class T, int kTiles, int kGroup, bool kMinimums>
__device__ __forceinline__ void copy_unit(const Operands<T>& op, const Place& place, uint32_t stage, int unit,
                                          int first_row, const uint8_t* panel, bool has_panel,
                                          uint64_t policy) {
  using Layout = Stage<kTiles, kGroup>;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int row = place.in_half / kRowChunks + i * (kHalfThreads / kRowChunks),
              chunk = place.in_half % kRowChunks;
    const int k = unit * kStripeDepth + chunk * 8;
    const bool valid = first_row + row < op.num_rows && k < op.depth;
    const T* from = op.x + (valid ? (first_row + row) * op.x_stride + k : 0);
    copy_async(
        stage + static_cast<uint32_t>(place.half * Layout::kX + swizzled_offset(row, chunk, kRowChunks)),
        from, valid);
  }
  if (!has_panel) return;
  const int warp = place.half * kPanels + place.panel;
  const uint32_t codes = stage + static_cast<uint32_t>(Layout::kCodes + warp * kCodeBytes + place.lane * 16);
  const uint8_t* from = panel + static_cast<int64_t>(unit) * kCodeBytes + place.lane * 16;
#pragma unroll
  for (int i = 0; i < kCodeBytes / 512; ++i) {
    // K is padded to half a unit only: what lies beyond are scales.
    const bool valid = unit * kCodeBytes + i * 512 < op.scales_at;
    copy_async(codes + i * 512, valid ? from + i * 512 : panel, valid, policy);
  }
  if constexpr (kGroup != 0) {
    constexpr int kScaleChunks = Layout::kGroups * 4;
    const int chunk = place.lane % 16;
    const bool is_scale = place.lane < 16;
    const int first_group = unit * Layout::kGroups;
    const int group_chunks = is_scale || kMinimums ? 4 : 2;  // of 16 bytes; zero points are bytes
    const bool wanted = chunk < Layout::kGroups * group_chunks && (is_scale || kMinimums || op.zero_points);
    const bool valid = first_group + chunk / group_chunks < op.num_groups;
    const int at = is_scale ? op.scales_at : op.offsets_at;
    const uint32_t to = stage + static_cast<uint32_t>((is_scale ? Layout::kScales : Layout::kOffsets) +
                                                      (warp * kScaleChunks + chunk) * 16);
    if (wanted)
      copy_async(to, valid ? panel + at + (first_group * group_chunks + chunk) * 16 : panel, valid, policy);
  }
}

template <int kTiles>
using Sums = float[kBlocksOf16][kTiles][4];

// Adds one unit of K to `sums`: for kGroup = 0 the bare products, else scaled. `x_sums` is for kGroup = 0
// with minimums only.
template <class T, int kTiles, int kGroup, bool kMinimums>
__device__ __forceinline__ void multiply_unit(Sums<kTiles>& sums, float (&x_sums)[kTiles][4],
                                              MinusZero<T> (&zeros)[kBlocksOf16], bool zero_points,
                                              const Place& place, uint32_t stage) {
  using Layout = Stage<kTiles, kGroup>;
  constexpr int kGroups = kGroup == 0 ? 1 : Layout::kGroups;
  constexpr int kGroupSteps = kSteps / kGroups;
  const int warp = place.half * kPanels + place.panel, lane = place.lane;
  const uint32_t codes = stage + static_cast<uint32_t>(Layout::kCodes + warp * kCodeBytes + lane * 16);
  // One load of four matrices gives two row tiles their operands of one step, or one row tile those of two.
  constexpr bool kPairs = kTiles > 1;
  const int row = kPairs ? lane / 16 * 8 + lane % 8 : lane % 8;
  const int chunk = kPairs ? lane % 16 / 8 : lane / 8;
  const uint32_t x =
      stage + static_cast<uint32_t>(place.half * Layout::kX + swizzled_offset(row, chunk, kRowChunks));
  const uint32_t scales_at = stage + static_cast<uint32_t>(Layout::kScales + warp * Layout::kGroups * 64);
  const uint32_t offsets_at = stage + static_cast<uint32_t>(Layout::kOffsets + warp * Layout::kGroups * 64);
  uint32_t b[kTiles + kTiles % 2][4];
  uint4 words{};
  constexpr int kUnroll = kTiles <= 2 && !kMinimums ? kGroups : 1;  // or registers run out
#pragma unroll kUnroll
  for (int group = 0; group < kGroups; ++group) {
    Sums<kTiles> products = {};
    float x_products[kTiles][4] = {};
    if constexpr (kGroup != 0 && !kMinimums) {
      if (zero_points) {
        const uint32_t z = load_shared_4(offsets_at + static_cast<uint32_t>(group * 32 + place.g * 4));
        zeros[0] = MinusZero<T>(z & 0xff, z >> 8 & 0xff);
        zeros[1] = MinusZero<T>(z >> 16 & 0xff, z >> 24);
      }
    }
    Sums<kTiles>& target = *(kGroup == 0 ? &sums : &products);
    float (&x_target)[kTiles][4] = *(kGroup == 0 ? &x_sums : &x_products);
#pragma unroll
    for (int in_group = 0; in_group < kGroupSteps; ++in_group) {
      const int step = group * kGroupSteps + in_group;
      if (step % 2 == 0) words = load_shared_16(codes + static_cast<uint32_t>(step / 2 * 512));
      // Swizzling is an exclusive or with the row, so a step along the row is one with the address.
      const uint32_t at = x ^ static_cast<uint32_t>(step * 32);
      if constexpr (kPairs) {
#pragma unroll
        for (int tile = 0; tile < kTiles; tile += 2) {
          uint32_t m[4];
          load_matrices(m, at + static_cast<uint32_t>(tile * 8 * kRowChunks * kChunkBytes));
          b[tile][0] = m[0];
          b[tile][1] = m[1];
          b[tile + 1][0] = m[2];
          b[tile + 1][1] = m[3];
        }
      } else if (step % 2 == 0) {
        load_matrices(b[0], at);
      } else {
        b[0][0] = b[0][2];
        b[0][1] = b[0][3];
      }
      uint32_t a[4];
      if constexpr (kMinimums) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = kOnes<T>;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) multiply_add<T>(x_target[tile], a, b[tile][0], b[tile][1]);
      }
#pragma unroll
      for (int block = 0; block < kBlocksOf16; ++block) {
        const uint32_t word =
            step % 2 == 0 ? (block == 0 ? words.x : words.y) : (block == 0 ? words.z : words.w);
        dequantize<T>(a, word, zeros[block]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
          multiply_add<T>(target[block][tile], a, b[tile][0], b[tile][1]);
      }
    }
    if constexpr (kGroup != 0) {
      float scales[kBlocksOf16][2], minimums[kBlocksOf16][2];
      unpack_scales(scales, load_shared_8(scales_at + static_cast<uint32_t>(group * 64 + place.g * 8)));
      if constexpr (kMinimums) {
        unpack_scales(minimums, load_shared_8(offsets_at + static_cast<uint32_t>(group * 64 + place.g * 8)));
      }
#pragma unroll
      for (int block = 0; block < kBlocksOf16; ++block) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& sum = sums[block][tile][i];
            sum = __fmaf_rn(scales[block][i / 2], products[block][tile][i], sum);
            if constexpr (kMinimums) sum = __fmaf_rn(minimums[block][i / 2], x_products[tile][i % 2], sum);
          }
        }
      }
    }
  }
}

// This warp's half of a part: units [begin, end) of the panel's K.
template <class T, int kTiles, int kGroup, bool kMinimums>
__device__ __forceinline__ void sum_half(Sums<kTiles>& sums, const Operands<T>& op, const Place& place,
                                         uint32_t ring, int begin, int end, int first_row,
                                         const uint8_t* panel, bool has_panel, uint64_t policy) {
  using Layout = Stage<kTiles, kGroup>;
  const auto copy = [&](int slot, int unit) {
    copy_unit<T, kTiles, kGroup, kMinimums>(op, place, ring + static_cast<uint32_t>(slot * Layout::kBytes),
                                            unit, first_row, panel, has_panel, policy);
  };
  const int ahead = op.num_slots - 1;
  for (int i = 0; i < ahead; ++i) {
    if (begin + i < end) copy(i, begin + i);
    commit_copies();
  }
  float x_sums[kTiles][4] = {};
  const uint32_t zero = kMinimums ? 0 : 8;
  MinusZero<T> zeros[kBlocksOf16] = {MinusZero<T>(zero, zero), MinusZero<T>(zero, zero)};
  if constexpr (kGroup == 0 && !kMinimums) {
    if (op.zero_points && has_panel) {
      uint32_t z = 0;
      if (place.t == 0) z = *reinterpret_cast<const uint32_t*>(panel + op.offsets_at + place.g * 4);
      z = __shfl_sync(kAllLanes, z, place.lane - place.t);
      zeros[0] = MinusZero<T>(z & 0xff, z >> 8 & 0xff);
      zeros[1] = MinusZero<T>(z >> 16 & 0xff, z >> 24);
    }
  }
  int slot = 0, free_slot = ahead;
  for (int unit = begin; unit < end; ++unit) {
    if (ahead == 1) {
      wait_for_copies<0>();
    } else if (ahead == 2) {
      wait_for_copies<1>();
    } else {
      wait_for_copies<2>();
    }
    // The stage is there for the four warps, and all of them have left the one that is filled next.
    named_barrier(1 + place.half, kHalfThreads);
    if (unit + ahead < end) copy(free_slot, unit + ahead);
    commit_copies();
    if (has_panel) {
      multiply_unit<T, kTiles, kGroup, kMinimums>(sums, x_sums, zeros, op.zero_points, place,
                                                  ring + static_cast<uint32_t>(slot * Layout::kBytes));
    }
    slot = slot + 1 == op.num_slots ? 0 : slot + 1;
    free_slot = free_slot + 1 == op.num_slots ? 0 : free_slot + 1;
  }
  if constexpr (kGroup == 0) {
    if (!has_panel) return;
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

template <class T, int kTiles, int kGroup, bool kMinimums>
__global__ void __launch_bounds__(kThreads, kTiles <= 2 ? 2 : 1) linear_int4_kernel(const Operands<T> op) {
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
    sum_half<T, kTiles, kGroup, kMinimums>(sums, op, place, ring, place.half == 0 ? begin : middle,
                                           place.half == 0 ? middle : end, first_row,
                                           op.packed + panel * op.panel_bytes, has_panel, policy);
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

template <class T, int kTiles, int kGroup, bool kMinimums>
void launch(Operands<T> op, int num_multiprocessors, int max_shared_bytes, cudaStream_t stream) {
  constexpr int kMaxSlots = 3;
  constexpr int kStageBytes = Stage<kTiles, kGroup>::kBytes;
  op.num_slots = kMaxSlots;
  while (op.num_slots > 2 && op.num_slots * kStageBytes > max_shared_bytes) --op.num_slots;
  const int ring_bytes = op.num_slots * kStageBytes;
  const int bytes = ring_bytes > Epilogue<kTiles>::kBytes ? ring_bytes : Epilogue<kTiles>::kBytes;
  op.num_row_tiles = static_cast<int>(ceil_div(op.num_rows, kTiles * 8));
  const int64_t tiles = static_cast<int64_t>(op.num_row_tiles) * op.stripes.num_column_tiles;
  op.whole_tiles = op.num_row_tiles > 1 && tiles >= num_multiprocessors;
  const auto kernel = linear_int4_kernel<T, kTiles, kGroup, kMinimums>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  FS_CHECK(error == cudaSuccess, "linear_int4: the device refuses "
                                     << bytes << " bytes of shared memory: " << cudaGetErrorString(error));
  const int64_t resident = 2 * static_cast<int64_t>(num_multiprocessors);
  const dim3 grid(
      static_cast<unsigned>(op.whole_tiles ? (tiles < resident ? tiles : resident) : op.stripes.count),
      static_cast<unsigned>(op.whole_tiles ? 1 : op.num_row_tiles));
  kernel<<<grid, kThreads, bytes, stream>>>(op);
}

}  // namespace fs::cuda::int4
