// SPDX-License-Identifier: Apache-2.0
//
// Embedding rows, of weights or of 8-bit codes with scales. One block copies (and converts) one row.
//
// Bytes per token: H weights (or codes, and a scale for each group) read, H activations written, 4 of the
// token id; bound: memory.
// An id outside the vocabulary reads nothing and gives a row of NaN, so that only its request fails (`sample`
// answers -1 for it); the CPU op throws there.
//
// ptxas: embedding_kernel <= 32 registers, 256 threads
// ptxas: embedding_int8_kernel <= 32 registers, 256 threads
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/vec.cuh"
#include "layout/int4.h"

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

// kVec neighbouring codes, which share a group: 1, 4 or 8.
template <int kVec>
struct Codes {
  uint32_t word[(kVec + 3) / 4];

  static __device__ __forceinline__ Codes load(const int8_t* from) {
    Codes codes;
    if constexpr (kVec == 8) {
      const uint2 bits = *reinterpret_cast<const uint2*>(from);
      codes.word[0] = bits.x;
      codes.word[1] = bits.y;
    } else if constexpr (kVec == 4) {
      codes.word[0] = *reinterpret_cast<const uint32_t*>(from);
    } else {
      codes.word[0] = static_cast<uint8_t>(*from);
    }
    return codes;
  }

  __device__ __forceinline__ float operator[](int i) const {
    return static_cast<float>(static_cast<int8_t>(word[i / 4] >> (i % 4 * 8)));
  }
};

template <class A, int kVec>
__global__ void __launch_bounds__(kThreads)
    embedding_int8_kernel(A* out, const int32_t* token_ids, const int8_t* codes, const f16* scales,
                          int64_t vocab, int hidden, int group_size, int num_groups) {
  const int64_t t = blockIdx.x;
  const int64_t id = token_ids[t];
  const bool known = id >= 0 && id < vocab;
  const int8_t* row = codes + (known ? id : 0) * hidden;
  const f16* row_scales = scales + (known ? id : 0) * num_groups;
  for (int h = static_cast<int>(threadIdx.x) * kVec; h < hidden; h += static_cast<int>(blockDim.x) * kVec) {
    float x[kVec];
    if (known) {
      const auto from = Codes<kVec>::load(row + h);
      const float scale = to_float(row_scales[h / group_size]);
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] = scale * from[i];
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] = __uint_as_float(0x7fc00000u);
    }
    Vec<A, kVec>::from(x).store(out + t * hidden + h);
  }
}

void embedding_int8(const EmbeddingInt8& op, const OpContext& context) {
  const int64_t num_tokens = op.out.shape[0];
  const int64_t hidden = op.out.shape[1];
  check_groups(op.info.name, op.scales, hidden, op.group_size);
  const int64_t num_groups = op.scales.shape[1];
  if (num_tokens == 0 || hidden == 0) return;
  FS_CHECK(num_tokens <= kMaxGridX && hidden <= 0x7fffffff,
           "embedding_int8: " << num_tokens << " x " << hidden << " is too large");
  visit_format(op.out.dtype, [&](auto* a) {
    using A = std::remove_pointer_t<decltype(a)>;
    const auto launch = [&](auto kernel, int vec) {
      const int64_t group_size = op.group_size < hidden ? op.group_size : hidden;
      kernel<<<static_cast<unsigned>(num_tokens), threads_for(ceil_div(hidden, vec), kThreads), 0,
               stream_of(context)>>>(op.out.ptr<A>(), op.token_ids.ptr<const int32_t>(),
                                     op.codes.ptr<const int8_t>(), op.scales.ptr<const f16>(),
                                     op.codes.shape[0], static_cast<int>(hidden),
                                     static_cast<int>(group_size), static_cast<int>(num_groups));
    };
    constexpr int kVec = kVecOf<A>;
    if (is_aligned(op.out, hidden, kVec) && is_aligned(op.codes, hidden, kVec)) {
      launch(embedding_int8_kernel<A, kVec>, kVec);
    } else {
      launch(embedding_int8_kernel<A, 1>, 1);
    }
  });
  check_launch("embedding_int8");
}

}  // namespace

FS_REGISTER_CUDA(Embedding, embedding, kWeights)
FS_REGISTER_CUDA(EmbeddingInt8, embedding_int8, DType::i8)

}  // namespace fs::cuda
