// SPDX-License-Identifier: Apache-2.0
//
// Matrix product on tensor cores with weights that go from memory to registers: what `linear` and
// `linear_int8` have in common.
//
// A block of four warps computes a tile of 16 to 64 rows by 128 columns; each warp owns one panel of 32
// columns. Nobody else needs a warp's weights, so they need no shared memory: each lane reads its own, 16
// bytes at a time and one stage of 64 inputs ahead. Activations pass through a ring of stages in shared
// memory, filled by asynchronous copies.
//
// K is cut as for linear_int4 (stripe_walk.cuh), so that all multiprocessors have work whatever N is. One
// order of additions: an output is the sum over the parts of its column tile, in order, each one chain in
// ascending k from zero. Where parts begin depends on N, K and the number of multiprocessors and never on the
// number of rows.
//
// `Weights`, of one warp and part, says what differs:
//   Stage                          its weights of a stage, in registers
//   load(stage, index)             reads those of stage `index`; zeros after the last one
//   multiply(sums, stage, ring)    adds their products with the activations at `ring`
//   kStep                          the unit in which they are; sums are divided by it in the end
#pragma once

#include "cuda/stripe_walk.cuh"
#include "cuda/tile.cuh"
#include "layout/fragment.h"
#include "layout/swizzle.h"

namespace fs::cuda::linear_tile {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStageDepth = 64;                // inputs of a stage
constexpr int kStageChunks = kStageDepth / 8;  // pieces of 16 bytes in a row of a stage
constexpr int kSteps = kStageDepth / 16;       // products along a stage
constexpr int kStages = 4;
constexpr int kPanelColumns = 32;
constexpr int kProducts = kPanelColumns / 8;  // side by side in a warp's columns

template <class T>
struct Operands {
  T* out;
  const T* x;
  const uint8_t* packed;
  const float* bias;
  int64_t out_stride, x_stride;  // elements
  int64_t panel_bytes;
  int num_rows, num_columns, depth;
  StripeWork work;
  bool pairs;  // outputs can be stored two at a time
};

template <int kTiles>
using Sums = float[kTiles][kProducts][4];

template <class T>
__device__ __forceinline__ const uint8_t* panel_of(const Operands<T>& op, int panel) {
  return op.packed + panel * op.panel_bytes;
}

// The first operand of a product: 16 rows of a tile by the 16 inputs of a step.
__device__ __forceinline__ void load_activations(uint32_t (&a)[4], uint32_t ring, int tile, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = tile * 16 + lane % 16, chunk = step * 2 + lane / 16;
  load_matrices(a, ring + static_cast<uint32_t>(swizzled_offset(row, chunk, kStageChunks)));
}

template <class T, int kTiles>
__device__ __forceinline__ void copy_stage(const Operands<T>& op, uint32_t ring, int stage, int first_row) {
  constexpr int kPieces = kTiles * 16 * kStageChunks / kThreads;  // of a thread
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int piece = thread_id() + i * kThreads;
    const int row = piece / kStageChunks, chunk = piece % kStageChunks;
    const int k = stage * kStageDepth + chunk * 8;
    const bool valid = first_row + row < op.num_rows && k < op.depth;
    const T* from = op.x + (valid ? (first_row + row) * op.x_stride + k : 0);
    copy_async(ring + static_cast<uint32_t>(swizzled_offset(row, chunk, kStageChunks)), from, valid);
  }
}

template <class T, int kTiles>
__device__ __forceinline__ void write_tile(const Operands<T>& op, const Sums<kTiles>& sums, int first_row,
                                           int first_column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
    const int column = first_column + product * 8 + lane % 4 * 2;
    if (column >= op.num_columns) continue;
    const bool both = column + 1 < op.num_columns;
    const float bias0 = op.bias == nullptr ? 0.0f : op.bias[column];
    const float bias1 = op.bias == nullptr || !both ? 0.0f : op.bias[column + 1];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + tile * 16 + half * 8 + lane / 4;
        if (row >= op.num_rows) continue;
        T* to = op.out + row * op.out_stride + column;
        const float y0 = sums[tile][product][2 * half] + bias0,
                    y1 = sums[tile][product][2 * half + 1] + bias1;
        if (op.pairs) {
          *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(y0, y1);
        } else {
          to[0] = from_float<T>(y0);
          if (both) to[1] = from_float<T>(y1);
        }
      }
    }
  }
}

// The kernels: all tiles of this block.
template <class T, int kTiles, class Weights>
__device__ __forceinline__ void multiply_tiles(const Operands<T>& op) {
  __shared__ alignas(128) uint8_t ring[kStages][kTiles * 16 * kStageDepth * sizeof(T)];
  __shared__ uint32_t arrived;
  constexpr int kUnitStages = kStripeDepth / kStageDepth;
  StripeWalk walk(op.work);
  do {
    const int first_row = walk.row_tile * kTiles * 16;
    const int panel = walk.column_tile * kWarps + static_cast<int>(threadIdx.x) / 32;
    const int first_column = panel * kPanelColumns;
    const bool has_panel = first_column < op.num_columns;
    const int begin = walk.begin() * kUnitStages;
    const int end = min(walk.end() * kUnitStages, (op.depth + kStageDepth - 1) / kStageDepth);

#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      const int stage = begin + i;
      if (stage < end) copy_stage<T, kTiles>(op, shared_address(ring[stage % kStages]), stage, first_row);
      commit_copies();
    }
    const Weights weights(op, panel, has_panel ? end : 0);
    typename Weights::Stage current, next;
    weights.load(current, begin);
    Sums<kTiles> sums = {};
    for (int stage = begin; stage < end; ++stage) {
      weights.load(next, stage + 1);
      wait_for_copies<kStages - 2>();
      __syncthreads();  // the stage is there for all, and all have left the one that is filled next
      const int ahead = stage + kStages - 1;
      if (ahead < end) copy_stage<T, kTiles>(op, shared_address(ring[ahead % kStages]), ahead, first_row);
      commit_copies();
      weights.template multiply<kTiles>(sums, current, shared_address(ring[stage % kStages]));
      current = next;
    }
    const auto for_each = [&](const auto& f) {
#pragma unroll
      for (int i = 0; i < kTiles * kProducts; ++i) f(sums[i / kProducts][i % kProducts], i);
    };
    if constexpr (Weights::kStep != 1.0f) {
      for_each([](float (&sum)[4], int) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] *= 1.0f / Weights::kStep;  // a power of two
      });
    }
    const bool complete =
        walk.add_parts<kThreads, kTiles * kProducts>(static_cast<int>(threadIdx.x), arrived, for_each);
    if (complete && has_panel) write_tile<T, kTiles>(op, sums, first_row, first_column);
    __syncthreads();  // the ring is free again
  } while (walk.advance());
}

// What both ops fill in; packed and panel_bytes are theirs.
template <class T, class Op>
Operands<T> make_operands(const Op& op, int num_multiprocessors) {
  Operands<T> operands{};
  operands.out = op.out.template ptr<T>();
  operands.x = op.x.template ptr<const T>();
  operands.bias = op.bias.defined() ? op.bias.template ptr<const float>() : nullptr;
  operands.out_stride = op.out.stride[0];
  operands.x_stride = op.x.stride[0];
  operands.num_rows = static_cast<int>(op.x.shape[0]);
  operands.num_columns = static_cast<int>(op.out.shape[1]);
  operands.depth = static_cast<int>(op.x.shape[1]);
  operands.pairs = is_aligned(op.out, op.out.shape[1], 2);
  operands.work = make_stripe_work(
      op, num_multiprocessors, stripes_workspace_bytes(linear_tile_rows(op.x.shape[0]), num_multiprocessors));
  return operands;
}

template <class Op>
void check_inputs(const Op& op) {
  const int64_t depth = op.x.shape[1];
  FS_CHECK(reinterpret_cast<uintptr_t>(op.packed.data) % 16 == 0,
           Op::info.name << ": packed is not aligned to 16 bytes");
  FS_CHECK(depth % 8 == 0 && is_aligned(op.x, depth, 8),
           Op::info.name << ": K is " << depth
                         << "; the cuda kernel takes multiples of 8, and rows of x that start at "
                         << "multiples of 16 bytes");
}

}  // namespace fs::cuda::linear_tile
