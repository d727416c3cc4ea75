// SPDX-License-Identifier: Apache-2.0
//
// Embedding rows. One block copies (and converts) one row.
//
// Bytes per token: H weights read, H activations written, 4 of the token id; bound: memory.
// An id outside the vocabulary reads nothing and gives a row of NaN, so that only its request fails (`sample`
// answers -1 for it); the CPU op throws there.
//
// ptxas: embedding_kernel <= 32 registers, 256 threads
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/vec.cuh"

namespace fs::cuda {

namespace {

constexpr int kThreads = 256;

template <class A, class W, int kVec>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(A* out, const int32_t* token_ids, const W* weight, int64_t vocab, int hidden) {
  const int64_t t = blockIdx.x;
  const int64_t id = token_ids[t];
  const bool known = id >= 0 && id < vocab;
  const W* row = weight + (known ? id : 0) * hidden;
  for (int h = static_cast<int>(threadIdx.x) * kVec; h < hidden; h += static_cast<int>(blockDim.x) * kVec) {
    float x[kVec];
    if (known) {
      const auto from = Vec<W, kVec>::load(row + h);
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] = from[i];
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] = __uint_as_float(0x7fc00000u);
    }
    Vec<A, kVec>::from(x).store(out + t * hidden + h);
  }
}

void embedding(const Embedding& op, const OpContext& context) {
  const int64_t num_tokens = op.out.shape[0];
  const int64_t hidden = op.out.shape[1];
  if (num_tokens == 0 || hidden == 0) return;
  FS_CHECK(num_tokens <= kMaxGridX && hidden <= 0x7fffffff,
           "embedding: " << num_tokens << " x " << hidden << " is too large");
  visit_formats("embedding", op.out.dtype, op.weight.dtype, [&](auto* a, auto* w) {
    using A = std::remove_pointer_t<decltype(a)>;
    using W = std::remove_pointer_t<decltype(w)>;
    const auto launch = [&](auto kernel, int vec) {
      kernel<<<static_cast<unsigned>(num_tokens), threads_for(ceil_div(hidden, vec), kThreads), 0,
               stream_of(context)>>>(op.out.ptr<A>(), op.token_ids.ptr<const int32_t>(),
                                     op.weight.ptr<const W>(), op.weight.shape[0], static_cast<int>(hidden));
    };
    constexpr int kVec = kVecOf<A, W>;
    if (is_aligned(op.out, hidden, kVec) && is_aligned(op.weight, hidden, kVec)) {
      launch(embedding_kernel<A, W, kVec>, kVec);
    } else {
      launch(embedding_kernel<A, W, 1>, 1);
    }
  });
  check_launch("embedding");
}

}  // namespace

FS_REGISTER_CUDA(Embedding, embedding, kWeights)

}  // namespace fs::cuda
