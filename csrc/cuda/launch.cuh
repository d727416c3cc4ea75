// SPDX-License-Identifier: Apache-2.0
//
// The host side that all CUDA kernels share: registration, choice of the instantiation, the launch itself.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx.cuh"
#include "ops/ops.h"

// Puts `kernel`, a host function void(const Op&, const OpContext&), into the op's CUDA slot.
#define FS_REGISTER_CUDA(Op, kernel, variants)                                                \
  namespace {                                                                                 \
  const ::fs::RegisterKernel<Op> register_##kernel(::fs::Slot<Op>::cuda, kernel, (variants)); \
  }

namespace fs::cuda {

inline constexpr int64_t kMaxGridX = 0x7fffffff;
inline constexpr int64_t kMaxGridY = 65535;

inline cudaStream_t stream_of(const OpContext& context) {
  return static_cast<cudaStream_t>(context.stream);
}

// After every launch: the error of the launch itself. What happens while the kernel runs is reported by the
// next synchronisation, which is not ours.
inline void check_launch(const char* op_name) {
  const cudaError_t error = cudaGetLastError();
  FS_CHECK(error == cudaSuccess, op_name << ": the CUDA launch failed: " << cudaGetErrorString(error));
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Threads for `count` pieces of work: whole warps, at most `limit`.
inline unsigned threads_for(int64_t count, int64_t limit) {
  const int64_t whole = ceil_div(count, 32) * 32;
  return static_cast<unsigned>(whole < limit ? whole : limit);
}

// Can the rows of this tensor, cut into pieces of `vec` elements every `row` elements, be moved by one access
// per piece? A tensor of one row may come with any stride.
inline bool is_aligned(const Tensor& tensor, int64_t row, int vec) {
  const int64_t bytes = static_cast<int64_t>(vec) * size_of(tensor.dtype);
  const bool rows_aligned = tensor.ndim < 2 || tensor.shape[0] <= 1 || tensor.stride[0] % vec == 0;
  return reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(bytes) == 0 && row % vec == 0 &&
         rows_aligned;
}

// Calls f(A*, W*) with null pointers of the types of activations and weights. Built are: equal formats, and
// float32 activations with any weights.
template <class F>
void visit_formats(const char* op_name, DType activations, DType weights, const F& f) {
  float* const f32 = nullptr;
  f16* const half = nullptr;
  bf16* const brain = nullptr;
  if (activations == DType::f32 && weights == DType::f32) return f(f32, f32);
  if (activations == DType::f32 && weights == DType::f16) return f(f32, half);
  if (activations == DType::f32 && weights == DType::bf16) return f(f32, brain);
  if (activations == DType::f16 && weights == DType::f16) return f(half, half);
  if (activations == DType::bf16 && weights == DType::bf16) return f(brain, brain);
  FS_CHECK(false, op_name << ": activations are " << name_of(activations) << " and weights "
                          << name_of(weights)
                          << "; the cuda kernel takes equal formats, or float32 activations");
}

template <class F>
void visit_format(DType activations, const F& f) {
  if (activations == DType::f16) return f(static_cast<f16*>(nullptr));
  if (activations == DType::bf16) return f(static_cast<bf16*>(nullptr));
  f(static_cast<float*>(nullptr));
}

}  // namespace fs::cuda
