// SPDX-License-Identifier: Apache-2.0
//
// Matrix product with 16-bit weights, for callers who want a row's result to depend on that row alone
// (linear_tile.cuh). Weights lie in the order of layout/fragment.h.
//
// Bytes at least: N K weights once per row of tiles, M K activations once per column of tiles (L2), M N
// outputs. Bound: memory up to 64 rows, then tensor cores.
//
// ptxas: linear_kernel <= 224 registers, 128 threads
// ptxas: pack_linear_kernel <= 40 registers, 256 threads
#include <type_traits>

#include "cuda/linear_tile.cuh"

namespace fs::cuda {

namespace {

using linear_tile::kProducts;
using linear_tile::kSteps;
using linear_tile::Operands;
static_assert(linear_tile::kPanelColumns == kFragmentRows);

template <class T>
class Weights {
 public:
  static constexpr float kStep = 1.0f;
  struct Stage {
    uint4 pairs[kSteps][2];
  };

  __device__ __forceinline__ Weights(const Operands<T>& op, int panel, int end_stage)
      : panel_(reinterpret_cast<const T*>(panel_of(op, panel))),
        end_chunk_(min(end_stage * kSteps, (op.depth + 15) / 16)) {}
  __device__ __forceinline__ void load(Stage& to, int stage) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int chunk = stage * kSteps + step;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        to.pairs[step][pair] = uint4{0, 0, 0, 0};
        if (chunk < end_chunk_) {
          const T* from = panel_ + chunk * kFragmentChunk + pair * 256 + lane * 8;
          to.pairs[step][pair] = __ldcs(reinterpret_cast<const uint4*>(from));
        }
      }
    }
  }
  template <int kTiles>
  __device__ __forceinline__ void multiply(linear_tile::Sums<kTiles>& sums, const Stage& weights,
                                           uint32_t ring) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 low = weights.pairs[step][0], high = weights.pairs[step][1];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t a[4];
        linear_tile::load_activations(a, ring, tile, step);
        multiply_add<T>(sums[tile][0], a, low.x, low.y);
        multiply_add<T>(sums[tile][1], a, low.z, low.w);
        multiply_add<T>(sums[tile][2], a, high.x, high.y);
        multiply_add<T>(sums[tile][3], a, high.z, high.w);
      }
    }
  }

 private:
  const T* panel_;
  int end_chunk_;
};

template <class T, int kTiles>
__global__ void __launch_bounds__(linear_tile::kThreads) linear_kernel(const Operands<T> op) {
  linear_tile::multiply_tiles<T, kTiles, Weights<T>>(op);
}

template <class T, int kTiles>
void launch(Operands<T> op, int num_multiprocessors, cudaStream_t stream) {
  const dim3 grid = stripe_grid(op.work, op.num_rows, kTiles * 16, num_multiprocessors);
  linear_kernel<T, kTiles><<<grid, linear_tile::kThreads, 0, stream>>>(op);
}

template <class T>
void linear_of(const Linear& op, cudaStream_t stream) {
  const int multiprocessors = device_attribute("linear", cudaDevAttrMultiProcessorCount, op.x.device_index);
  Operands<T> operands = linear_tile::make_operands<T>(op, multiprocessors);
  operands.packed = op.packed.ptr<const uint8_t>();
  operands.panel_bytes = op.packed.shape[1] * kFragmentRows * 2;
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
  linear_tile::check_inputs(op);
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
