// SPDX-License-Identifier: Apache-2.0
//
// RMSNorm with an optional residual add in front (Zhang and Sennrich 2019). One block per row; the row stays
// in registers between the sum of squares and the scaling, so it is read once. What is normalised is the
// residual as stored, rounded to its format.
//
// Bytes per token: x and the residual read, out and the residual written (8 H with 2-byte activations), and
// the weights from L2; bound: memory.
//
// ptxas: rms_norm_kernel <= 56 registers, 256 threads
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace fs::cuda {

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kFewThreads = 256;  // rows that fit take at most so many
constexpr int kMaxSteps = 4;

// Thread i holds the pieces i, i + blockDim, i + 2 blockDim, ... of kVec elements of the row. kWhole: all
// pieces are aligned and none is short.
template <class A, class W, int kSteps, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_kernel(A* out, const A* x, int64_t x_stride, A* residual, const W* weight, int hidden,
                    float eps) {
  constexpr int kVec = kVecOf<A, W>;
  __shared__ float scratch[kMaxWarps];
  const int64_t t = blockIdx.x;
  const int first = static_cast<int>(threadIdx.x);
  const int step = static_cast<int>(blockDim.x);
  Vec<A, kVec> row[kSteps];
  float squares = 0.0f;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int h = (first + s * step) * kVec;
    if (h < hidden) row[s] = Vec<A, kVec>::template load_piece<kWhole>(x + t * x_stride + h, hidden - h);
  }
  if (residual != nullptr) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int h = (first + s * step) * kVec;
      if (h >= hidden) continue;
      const auto before = Vec<A, kVec>::template load_piece<kWhole>(residual + t * hidden + h, hidden - h);
      float sum[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] = before[i] + row[s][i];
      row[s] = Vec<A, kVec>::from(sum);
      row[s].template store_piece<kWhole>(residual + t * hidden + h, hidden - h);
    }
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if ((first + s * step) * kVec >= hidden) continue;
#pragma unroll
    for (int i = 0; i < kVec; ++i) squares = fmaf(row[s][i], row[s][i], squares);
  }
  const float scale = rsqrtf(block_sum(squares, scratch) / static_cast<float>(hidden) + eps);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int h = (first + s * step) * kVec;
    if (h >= hidden) continue;
    const auto gain = Vec<W, kVec>::template load_piece<kWhole>(weight + h, hidden - h);
    float normed[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) normed[i] = row[s][i] * scale * gain[i];
    Vec<A, kVec>::from(normed).template store_piece<kWhole>(out + t * hidden + h, hidden - h);
  }
}

template <class A, class W, bool kWhole>
void launch_rms_norm(const RmsNorm& op, cudaStream_t stream) {
  constexpr int kVec = kVecOf<A, W>;
  const int64_t hidden = op.out.shape[1];
  const int64_t pieces = ceil_div(hidden, kVec);
  FS_CHECK(pieces <= int64_t{kMaxThreads} * kMaxSteps,
           "rms_norm: H is " << hidden << "; the cuda kernel takes at most " << kMaxThreads * kMaxSteps * kVec
                             << " with these dtypes");
  const auto launch = [&](auto kernel, int steps) {
    const int64_t threads = ceil_div(ceil_div(pieces, steps), kWarp) * kWarp;
    kernel<<<static_cast<unsigned>(op.out.shape[0]), static_cast<unsigned>(threads), 0, stream>>>(
        op.out.ptr<A>(), op.x.ptr<const A>(), op.x.stride[0],
        op.residual.defined() ? op.residual.ptr<A>() : nullptr, op.weight.ptr<const W>(),
        static_cast<int>(hidden), op.eps);
  };
  if (pieces <= kFewThreads) return launch(rms_norm_kernel<A, W, 1, kWhole>, 1);
  if (pieces <= 2 * kFewThreads) return launch(rms_norm_kernel<A, W, 2, kWhole>, 2);
  launch(rms_norm_kernel<A, W, kMaxSteps, kWhole>, kMaxSteps);
}

void rms_norm(const RmsNorm& op, const OpContext& context) {
  const int64_t hidden = op.out.shape[1];
  if (op.out.shape[0] == 0 || hidden == 0) return;
  FS_CHECK(
      op.out.shape[0] == 1 || op.out.stride[0] == hidden,
      "rms_norm: argument 'out' must be contiguous on CUDA; its rows are " << op.out.stride[0] << " apart");
  FS_CHECK(op.out.shape[0] <= kMaxGridX, "rms_norm: " << op.out.shape[0] << " rows are too many");
  visit_formats("rms_norm", op.x.dtype, op.weight.dtype, [&](auto* a, auto* w) {
    using A = std::remove_pointer_t<decltype(a)>;
    using W = std::remove_pointer_t<decltype(w)>;
    constexpr int kVec = kVecOf<A, W>;
    const bool aligned = is_aligned(op.out, hidden, kVec) && is_aligned(op.x, hidden, kVec) &&
                         is_aligned(op.weight, hidden, kVec) &&
                         (!op.residual.defined() || is_aligned(op.residual, hidden, kVec));
    if (aligned) {
      launch_rms_norm<A, W, true>(op, stream_of(context));
    } else {
      launch_rms_norm<A, W, false>(op, stream_of(context));
    }
  });
  check_launch("rms_norm");
}

}  // namespace

FS_REGISTER_CUDA(RmsNorm, rms_norm, kActivations)

}  // namespace fs::cuda
