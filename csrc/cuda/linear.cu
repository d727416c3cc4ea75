// SPDX-License-Identifier: Apache-2.0
//
// Matrix product with 16-bit weights on tensor cores, for callers who want a row's result to depend on that
// row alone.
//
// A block of four warps computes a tile of 16, 32 or 64 rows by 128 columns; each warp owns one panel of 32
// columns. Weights go from memory to registers in the order of layout/fragment.h, 16 bytes per lane, each
// chunk one stage ahead; nobody shares them, so they need no shared memory. Activations pass through a ring
// of stages of 64 inputs in shared memory, filled by asynchronous copies.
//
// K is cut as for linear_int4 (stripe_walk.cuh), so that all multiprocessors have work whatever N is. One
// order of additions: an output is the sum over the parts of its column tile, in order, each one chain of
// m16n8k16 products in ascending k from zero. Where parts begin depends on N, K and the number of
// multiprocessors and never on the number of rows.
//
// Bytes at least: N K weights once per row of tiles, M K activations once per column of tiles (L2), M N
// outputs. Bound: memory up to 64 rows, then tensor cores.
//
// ptxas: linear_kernel <= 224 registers, 128 threads
// ptxas: pack_linear_kernel <= 40 registers, 256 threads
#include <type_traits>

#include "cuda/stripe_walk.cuh"
#include "layout/fragment.h"
#include "layout/swizzle.h"

namespace fs::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStageDepth = 64;                            // inputs of a stage
constexpr int kStageChunks = kStageDepth / 8;              // pieces of 16 bytes in a row of a stage
constexpr int kStageSteps = kStageDepth / kFragmentDepth;  // products along a stage
constexpr int kStages = 4;
constexpr int kProducts = kFragmentRows / 8;  // side by side in a warp's columns

template <class T>
struct Operands {
  T* out;
  const T* x;
  const T* packed;
  const float* bias;
  int64_t out_stride, x_stride;  // elements
  int num_rows, num_columns, depth, num_chunks;
  StripeWork work;
  bool pairs;  // outputs can be stored two at a time
};

// One warp's weights of a stage: two loads of 16 bytes per step.
struct StageWeights {
  uint4 pairs[kStageSteps][2];
};

template <class T>
__device__ __forceinline__ void load_weights(StageWeights& to, const T* panel, int stage, int num_chunks,
                                             bool has_panel) {  // num_chunks: those after it are zeros
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int step = 0; step < kStageSteps; ++step) {
    const int chunk = stage * kStageSteps + step;
    const bool valid = has_panel && chunk < num_chunks;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      to.pairs[step][pair] = uint4{0, 0, 0, 0};
      if (valid) {
        const T* from = panel + chunk * kFragmentChunk + pair * 256 + lane * 8;
        to.pairs[step][pair] = __ldcs(reinterpret_cast<const uint4*>(from));
      }
    }
  }
}

template <class T, int kTiles>
__device__ __forceinline__ void copy_stage(const Operands<T>& op, uint32_t ring, int stage, int first_row) {
  constexpr int kPieces = kTiles * 16 * kStageChunks;
#pragma unroll
  for (int piece = static_cast<int>(threadIdx.x); piece < kPieces; piece += kThreads) {
    const int row = piece / kStageChunks, chunk = piece % kStageChunks;
    const int k = stage * kStageDepth + chunk * 8;
    const bool valid = first_row + row < op.num_rows && k < op.depth;
    const T* from = op.x + (valid ? (first_row + row) * op.x_stride + k : 0);
    copy_async(ring + static_cast<uint32_t>(swizzled_offset(row, chunk, kStageChunks)), from, valid);
  }
}

template <class T, int kTiles>
__device__ __forceinline__ void multiply_stage(float (&sums)[kTiles][kProducts][4],
                                               const StageWeights& weights, uint32_t ring) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int step = 0; step < kStageSteps; ++step) {
    const uint4 low = weights.pairs[step][0], high = weights.pairs[step][1];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t a[4];
      const int row = tile * 16 + lane % 16, chunk = step * 2 + lane / 16;
      load_matrices(a, ring + static_cast<uint32_t>(swizzled_offset(row, chunk, kStageChunks)));
      multiply_add<T>(sums[tile][0], a, low.x, low.y);
      multiply_add<T>(sums[tile][1], a, low.z, low.w);
      multiply_add<T>(sums[tile][2], a, high.x, high.y);
      multiply_add<T>(sums[tile][3], a, high.z, high.w);
    }
  }
}

template <class T, int kTiles>
__device__ __forceinline__ void write_tile(const Operands<T>& op, const float (&sums)[kTiles][kProducts][4],
                                           int first_row, int first_column) {
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

template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads) linear_kernel(const Operands<T> op) {
  __shared__ alignas(128) uint8_t ring[kStages][kTiles * 16 * kStageDepth * sizeof(T)];
  __shared__ uint32_t arrived;
  constexpr int kUnitStages = kStripeDepth / kStageDepth;
  StripeWalk walk(op.work);
  do {
    const int first_row = walk.row_tile * kTiles * 16;
    const int panel = walk.column_tile * kWarps + static_cast<int>(threadIdx.x) / 32;
    const int first_column = panel * static_cast<int>(kFragmentRows);
    const bool has_panel = first_column < op.num_columns;
    const T* weights = op.packed + static_cast<int64_t>(panel) * op.num_chunks * kFragmentChunk;
    const int begin = walk.begin() * kUnitStages;
    const int end = min(walk.end() * kUnitStages, (op.num_chunks + kStageSteps - 1) / kStageSteps);
    const int end_chunk = min(end * kStageSteps, op.num_chunks);

#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      const int stage = begin + i;
      if (stage < end) copy_stage<T, kTiles>(op, shared_address(ring[stage % kStages]), stage, first_row);
      commit_copies();
    }
    StageWeights current, next;
    load_weights(current, weights, begin, end_chunk, has_panel);
    float sums[kTiles][kProducts][4] = {};
    for (int stage = begin; stage < end; ++stage) {
      load_weights(next, weights, stage + 1, end_chunk, has_panel);
      wait_for_copies<kStages - 2>();
      __syncthreads();  // the stage is there for all, and all have left the one that is filled next
      const int ahead = stage + kStages - 1;
      if (ahead < end) copy_stage<T, kTiles>(op, shared_address(ring[ahead % kStages]), ahead, first_row);
      commit_copies();
      multiply_stage<T, kTiles>(sums, current, shared_address(ring[stage % kStages]));
      current = next;
    }
    const bool complete = walk.add_parts<kThreads, kTiles * kProducts>(
        static_cast<int>(threadIdx.x), arrived, [&](const auto& f) {
#pragma unroll
          for (int i = 0; i < kTiles * kProducts; ++i) f(sums[i / kProducts][i % kProducts], i);
        });
    if (complete && has_panel) write_tile<T, kTiles>(op, sums, first_row, first_column);
    __syncthreads();  // the ring is free again
  } while (walk.advance());
}

template <class T, int kTiles>
void launch(Operands<T> op, int num_multiprocessors, cudaStream_t stream) {
  const dim3 grid = stripe_grid(op.work, op.num_rows, kTiles * 16, num_multiprocessors);
  linear_kernel<T, kTiles><<<grid, kThreads, 0, stream>>>(op);
}

template <class T>
void linear_of(const Linear& op, cudaStream_t stream) {
  Operands<T> operands{};
  operands.out = op.out.ptr<T>();
  operands.x = op.x.ptr<const T>();
  operands.packed = op.packed.ptr<const T>();
  operands.bias = op.bias.defined() ? op.bias.ptr<const float>() : nullptr;
  operands.out_stride = op.out.stride[0];
  operands.x_stride = op.x.stride[0];
  operands.num_rows = static_cast<int>(op.x.shape[0]);
  operands.num_columns = static_cast<int>(op.out.shape[1]);
  operands.depth = static_cast<int>(op.x.shape[1]);
  operands.num_chunks = static_cast<int>(op.packed.shape[1] / kFragmentDepth);
  operands.pairs = is_aligned(op.out, op.out.shape[1], 2);
  const int multiprocessors = device_attribute("linear", cudaDevAttrMultiProcessorCount, op.x.device_index);
  operands.work = make_stripe_work(op, multiprocessors,
                                   stripes_workspace_bytes(linear_tile_rows(op.x.shape[0]), multiprocessors));
  if (operands.num_rows <= 16) return launch<T, 1>(operands, multiprocessors, stream);
  if (operands.num_rows <= 32) return launch<T, 2>(operands, multiprocessors, stream);
  launch<T, 4>(operands, multiprocessors, stream);
}

void check_packed(const char* op_name, const Tensor& packed, int64_t num_columns, int64_t depth) {
  const int64_t panels = ceil_div(num_columns, kFragmentRows);
  FS_CHECK(packed.shape[0] == panels && packed.shape[1] == fragment_depth(depth),
           op_name << ": packed is " << describe(packed) << "; a weight of " << num_columns << " x " << depth
                   << " needs [" << panels << ", " << fragment_depth(depth) << ", 32]");
}

void linear(const Linear& op, const OpContext& context) {
  const int64_t num_rows = op.x.shape[0], depth = op.x.shape[1], num_columns = op.out.shape[1];
  check_packed("linear", op.packed, num_columns, depth);
  FS_CHECK(op.x.dtype == op.packed.dtype, "linear: x is " << name_of(op.x.dtype) << " and packed is "
                                                          << name_of(op.packed.dtype)
                                                          << "; the cuda kernel takes equal formats");
  if (num_rows == 0 || num_columns == 0) return;
  FS_CHECK(reinterpret_cast<uintptr_t>(op.packed.data) % 16 == 0,
           "linear: packed is not aligned to 16 bytes");
  FS_CHECK(depth % 8 == 0 && is_aligned(op.x, depth, 8),
           "linear: K is " << depth << "; the cuda kernel takes multiples of 8, and rows of x that start at "
                           << "multiples of 16 bytes");
  if (op.x.dtype == DType::f16) {
    linear_of<f16>(op, stream_of(context));
  } else {
    linear_of<bf16>(op, stream_of(context));
  }
  check_launch("linear");
}

constexpr int kPackThreads = 256;

// One thread per packed element; the array is written in order.
__global__ void __launch_bounds__(kPackThreads)
    pack_linear_kernel(uint16_t* packed, const uint16_t* weight, int64_t stride, int num_rows, int depth,
                       int64_t size) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (at >= size) return;
  const int64_t chunks = fragment_depth(depth) / kFragmentDepth;
  const int64_t panel = at / (chunks * kFragmentChunk);
  const auto chunk = static_cast<int>(at / kFragmentChunk % chunks);
  const auto inside = static_cast<int>(at % kFragmentChunk);
  const int lane = inside % 256 / 8;
  const int64_t n = panel * kFragmentRows + inside / 256 * 16 + inside % 8 / 4 * 8 + lane / 4;
  const int k = chunk * 16 + inside % 4 / 2 * 8 + lane % 4 * 2 + inside % 2;
  packed[at] = n < num_rows && k < depth ? weight[n * stride + k] : uint16_t{0};
}

void pack_linear(const PackLinear& op, const OpContext& context) {
  const int64_t num_rows = op.weight.shape[0], depth = op.weight.shape[1];
  check_packed("pack_linear", op.packed, num_rows, depth);
  const int64_t size = op.packed.numel();
  if (size == 0) return;
  const int64_t blocks = ceil_div(size, kPackThreads);
  FS_CHECK(blocks <= kMaxGridX && num_rows <= 0x7fffffff && depth <= 0x7fffffff - 16,
           "pack_linear: " << num_rows << " x " << depth << " is too large");
  pack_linear_kernel<<<static_cast<unsigned>(blocks), kPackThreads, 0, stream_of(context)>>>(
      op.packed.ptr<uint16_t>(), op.weight.ptr<const uint16_t>(), op.weight.stride[0],
      static_cast<int>(num_rows), static_cast<int>(depth), size);
  check_launch("pack_linear");
}

}  // namespace

FS_REGISTER_CUDA(Linear, linear, DType::f16 | DType::bf16)
FS_REGISTER_CUDA(PackLinear, pack_linear, DType::f16 | DType::bf16)

}  // namespace fs::cuda
