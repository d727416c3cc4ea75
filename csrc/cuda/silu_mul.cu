// SPDX-License-Identifier: Apache-2.0
//
// The gated activation of Llama-like MLPs: silu(gate) * up with silu(x) = x / (1 + exp(-x)), in float32. A
// thread makes one access of output.
//
// Bytes per token: 2 I activations read, I written; bound: memory.
//
// ptxas: silu_mul_kernel <= 40 registers, 256 threads
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/vec.cuh"

namespace fs::cuda {

namespace {

constexpr int kThreads = 256;
constexpr float kLog2E = 1.44269504f;

template <class A, int kVec>
__global__ void __launch_bounds__(kThreads)
    silu_mul_kernel(A* out, const A* gate_up, int64_t stride, int width) {
  const int64_t t = blockIdx.x;
  const int i = (static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x)) * kVec;
  if (i >= width) return;
  const A* row = gate_up + t * stride;
  const auto gate = Vec<A, kVec>::load(row + i);
  const auto up = Vec<A, kVec>::load(row + width + i);
  float result[kVec];
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const float x = gate[j];
    result[j] = __fdividef(x, 1.0f + exp2_approx(-x * kLog2E)) * up[j];
  }
  Vec<A, kVec>::from(result).store(out + t * width + i);
}

void silu_mul(const SiluMul& op, const OpContext& context) {
  const int64_t num_tokens = op.out.shape[0];
  const int64_t width = op.out.shape[1];
  if (num_tokens == 0 || width == 0) return;
  visit_format(op.out.dtype, [&](auto* a) {
    using A = std::remove_pointer_t<decltype(a)>;
    const auto launch = [&](auto kernel, int vec) {
      const int64_t blocks = ceil_div(width, int64_t{kThreads} * vec);
      FS_CHECK(num_tokens <= kMaxGridX && blocks <= kMaxGridY,
               "silu_mul: " << num_tokens << " x " << width << " is too large");
      kernel<<<dim3(static_cast<unsigned>(num_tokens), static_cast<unsigned>(blocks)), kThreads, 0,
               stream_of(context)>>>(op.out.ptr<A>(), op.gate_up.ptr<const A>(), op.gate_up.stride[0],
                                     static_cast<int>(width));
    };
    constexpr int kVec = kVecOf<A>;
    if (is_aligned(op.out, width, kVec) && is_aligned(op.gate_up, width, kVec)) {
      launch(silu_mul_kernel<A, kVec>, kVec);
    } else {
      launch(silu_mul_kernel<A, 1>, 1);
    }
  });
  check_launch("silu_mul");
}

}  // namespace

FS_REGISTER_CUDA(SiluMul, silu_mul, kActivations)

}  // namespace fs::cuda
