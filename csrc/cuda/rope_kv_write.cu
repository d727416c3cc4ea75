// SPDX-License-Identifier: Apache-2.0
//
// Rotary position embedding (Su et al. 2021; halves rotated as in GPT-NeoX), with an RMS norm of every query
// and key head in front where the model has one (Qwen3), and the write of keys and values to the paged cache
// [NB, 2, Nkv, S, D]. One block per token; a group of threads takes a head, each of them one access in either
// half of it, so that a rotated pair meets in one thread. The angles and the norms' weights wait in shared
// memory.
//
// Bytes per token: q read and written, k and v read, their cache slots written, D floats of cos_sin; bound:
// memory. Sectors are full where half a head is a multiple of 32 bytes.
// A position outside the table gives NaN (its request fails alone); a slot outside the cache is not written,
// as with -1 for padding.
//
// ptxas: rope_kv_write_kernel <= 64 registers, 256 threads
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace fs::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kMaxHeadDim = 512;
constexpr int kMaxHalf = kMaxHeadDim / 2;

enum Plane { kCos, kSin, kQueryLow, kQueryHigh, kKeyLow, kKeyHigh, kNumPlanes };

template <class A, class C>
struct Heads {
  A* q;
  const A* k;
  const A* v;
  C* kv_cache;
  const int32_t* positions;
  const int32_t* slot_mapping;
  const float* cos_sin;
  const void* q_norm;  // or nullptr; of dtype q_norm_dtype
  const void* k_norm;
  int64_t q_stride, k_stride, v_stride;
  int64_t num_slots, max_position;
  int num_q_heads, num_kv_heads, block_size, head_dim;
  int group;  // threads per head: a power of two
  float eps;
  DType q_norm_dtype, k_norm_dtype;
};

// Where element i of a plane lies. A thread with eight elements reads two neighbouring 16-byte chunks, that
// is every other chunk in one instruction; swapping the chunks of a pair in every second group of eight
// spreads these over all banks.
__device__ __forceinline__ int plane_index(int i) {
  const int chunk = i / 4;
  return (chunk ^ (chunk / 8 % 2)) * 4 + i % 4;
}

__device__ __forceinline__ float weight_at(const void* weight, DType dtype, int i) {
  if (dtype == DType::f32) return static_cast<const float*>(weight)[i];
  if (dtype == DType::f16) return to_float(static_cast<const f16*>(weight)[i]);
  return to_float(static_cast<const bf16*>(weight)[i]);
}

template <int kVec>
__device__ __forceinline__ void read_plane(float (&x)[kVec], const float* plane, int i) {
  static_assert(kVec % 4 == 0);
#pragma unroll
  for (int j = 0; j < kVec; j += 4) {
    const float4 chunk = *reinterpret_cast<const float4*>(plane + plane_index(i + j));
    x[j] = chunk.x;
    x[j + 1] = chunk.y;
    x[j + 2] = chunk.z;
    x[j + 3] = chunk.w;
  }
}

// kSteps pieces of kVec elements of each half are one thread's share of a head. kWhole: all pieces are
// aligned and none is short.
template <class A, class C, int kSteps, bool kWhole>
__global__ void __launch_bounds__(kThreads) rope_kv_write_kernel(const Heads<A, C> heads) {
  constexpr int kVec = kVecOf<A, C>;
  __shared__ alignas(16) float planes[kNumPlanes][kMaxHalf];
  const int64_t t = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int dim = heads.head_dim;
  const int half = dim / 2;

  const int64_t position = heads.positions[t];
  const bool in_table = position >= 0 && position < heads.max_position;
  const float* angles = heads.cos_sin + (in_table ? position : 0) * dim;
  // Short pieces read on to a multiple of kVec, which must be initialised.
  for (int i = thread; i < (half + kVec - 1) / kVec * kVec; i += static_cast<int>(blockDim.x)) {
    const bool inside = i < half;
    const int at = plane_index(i);
    planes[kCos][at] = inside && in_table ? angles[i] : __uint_as_float(0x7fc00000u);
    planes[kSin][at] = inside && in_table ? angles[half + i] : __uint_as_float(0x7fc00000u);
    if (heads.q_norm != nullptr) {
      planes[kQueryLow][at] = inside ? weight_at(heads.q_norm, heads.q_norm_dtype, i) : 0.0f;
      planes[kQueryHigh][at] = inside ? weight_at(heads.q_norm, heads.q_norm_dtype, half + i) : 0.0f;
    }
    if (heads.k_norm != nullptr) {
      planes[kKeyLow][at] = inside ? weight_at(heads.k_norm, heads.k_norm_dtype, i) : 0.0f;
      planes[kKeyHigh][at] = inside ? weight_at(heads.k_norm, heads.k_norm_dtype, half + i) : 0.0f;
    }
  }
  __syncthreads();

  const int64_t slot = heads.slot_mapping[t];
  const bool kept = slot >= 0 && slot < heads.num_slots;
  const int64_t block = kept ? slot / heads.block_size : 0;
  const int offset = kept ? static_cast<int>(slot % heads.block_size) : 0;
  const bool any_norm = heads.q_norm != nullptr || heads.k_norm != nullptr;
  const int num_heads = heads.num_q_heads + 2 * heads.num_kv_heads;
  const int groups = static_cast<int>(blockDim.x) / heads.group;
  const int member = thread % heads.group;
  // Every thread makes every round, with or without a head: the warp reduces together.
  for (int first = 0; first < num_heads; first += groups) {
    const int head = first + thread / heads.group;
    const bool is_query = head < heads.num_q_heads;
    const bool is_value = head >= heads.num_q_heads + heads.num_kv_heads;
    const int kv_head = head - heads.num_q_heads - (is_value ? heads.num_kv_heads : 0);
    const bool active = head < num_heads && (is_query || kept);
    A* const query = heads.q + t * heads.q_stride + static_cast<int64_t>(head) * dim;
    const A* from = query;
    if (!is_query) {
      from = is_value ? heads.v + t * heads.v_stride : heads.k + t * heads.k_stride;
      from += static_cast<int64_t>(kv_head) * dim;
    }

    Vec<A, kVec> low[kSteps], high[kSteps];
    float squares = 0.0f;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int i = (member + s * heads.group) * kVec;
      low[s] = high[s] = Vec<A, kVec>{};
      if (!active || i >= half) continue;
      low[s] = Vec<A, kVec>::template load_piece<kWhole>(from + i, half - i);
      high[s] = Vec<A, kVec>::template load_piece<kWhole>(from + half + i, half - i);
#pragma unroll
      for (int j = 0; j < kVec; ++j)
        squares = fmaf(low[s][j], low[s][j], fmaf(high[s][j], high[s][j], squares));
    }
    float scale = 1.0f;
    if (any_norm) scale = rsqrtf(warp_sum(squares, heads.group) / static_cast<float>(dim) + heads.eps);
    if (!active) continue;

    C* const cached =
        heads.kv_cache +
        (((block * 2 + (is_value ? 1 : 0)) * heads.num_kv_heads + kv_head) * heads.block_size + offset) * dim;
    const bool has_norm = !is_value && (is_query ? heads.q_norm : heads.k_norm) != nullptr;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int i = (member + s * heads.group) * kVec;
      if (i >= half) continue;
      float a[kVec], b[kVec], factor[kVec], other[kVec];
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        a[j] = low[s][j];
        b[j] = high[s][j];
      }
      if (has_norm) {
        read_plane(factor, planes[is_query ? kQueryLow : kKeyLow], i);
        read_plane(other, planes[is_query ? kQueryHigh : kKeyHigh], i);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          a[j] = a[j] * scale * factor[j];
          b[j] = b[j] * scale * other[j];
        }
      }
      if (!is_value) {
        read_plane(factor, planes[kCos], i);
        read_plane(other, planes[kSin], i);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const float x = a[j];
          a[j] = x * factor[j] - b[j] * other[j];
          b[j] = b[j] * factor[j] + x * other[j];
        }
      }
      if (is_query) {
        Vec<A, kVec>::from(a).template store_piece<kWhole>(query + i, half - i);
        Vec<A, kVec>::from(b).template store_piece<kWhole>(query + half + i, half - i);
      } else {
        Vec<C, kVec>::from(a).template store_piece<kWhole>(cached + i, half - i);
        Vec<C, kVec>::from(b).template store_piece<kWhole>(cached + half + i, half - i);
      }
    }
  }
}

template <class A, class C>
void launch_rope_kv_write(const RopeKvWrite& op, cudaStream_t stream) {
  constexpr int kVec = kVecOf<A, C>;
  const Tensor& cache = op.kv_cache;
  Heads<A, C> heads{};
  heads.q = op.q.ptr<A>();
  heads.k = op.k.ptr<const A>();
  heads.v = op.v.ptr<const A>();
  heads.kv_cache = cache.ptr<C>();
  heads.positions = op.positions.ptr<const int32_t>();
  heads.slot_mapping = op.slot_mapping.ptr<const int32_t>();
  heads.cos_sin = op.cos_sin.ptr<const float>();
  heads.q_norm = op.q_norm.defined() ? op.q_norm.data : nullptr;
  heads.k_norm = op.k_norm.defined() ? op.k_norm.data : nullptr;
  heads.q_norm_dtype = op.q_norm.dtype;
  heads.k_norm_dtype = op.k_norm.dtype;
  heads.q_stride = op.q.stride[0];
  heads.k_stride = op.k.stride[0];
  heads.v_stride = op.v.stride[0];
  heads.num_slots = cache.shape[0] * cache.shape[3];
  heads.max_position = op.cos_sin.shape[0];
  heads.num_q_heads = static_cast<int>(op.q.shape[1]);
  heads.num_kv_heads = static_cast<int>(op.k.shape[1]);
  heads.block_size = static_cast<int>(cache.shape[3]);
  heads.head_dim = static_cast<int>(op.q.shape[2]);
  heads.eps = op.eps;

  const int64_t half = heads.head_dim / 2;
  const int64_t pieces = ceil_div(half, kVec);
  heads.group = 1;
  while (heads.group < pieces && heads.group < kWarp) heads.group *= 2;
  const int64_t num_heads = op.q.shape[1] + 2 * op.k.shape[1];
  const bool whole = is_aligned(op.q, half, kVec) && is_aligned(op.k, half, kVec) &&
                     is_aligned(op.v, half, kVec) && is_aligned(cache, half, kVec);
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(op.q.shape[0]), threads_for(num_heads * heads.group, kThreads), 0,
             stream>>>(heads);
  };
  constexpr int kMaxSteps = kMaxHalf / kVec > kWarp ? 2 : 1;
  static_assert(kMaxHalf <= kMaxSteps * kWarp * kVec);
  if (pieces <= kWarp) {
    whole ? launch(rope_kv_write_kernel<A, C, 1, true>) : launch(rope_kv_write_kernel<A, C, 1, false>);
  } else {
    whole ? launch(rope_kv_write_kernel<A, C, kMaxSteps, true>)
          : launch(rope_kv_write_kernel<A, C, kMaxSteps, false>);
  }
}

void rope_kv_write(const RopeKvWrite& op, const OpContext& context) {
  const int64_t dim = op.q.shape[2];
  FS_CHECK(dim % 2 == 0 && dim <= kMaxHeadDim,
           "rope_kv_write: D is " << dim << "; the cuda kernel takes even head sizes up to " << kMaxHeadDim);
  if (op.q.shape[0] == 0 || dim == 0) return;
  FS_CHECK(op.q.shape[0] <= kMaxGridX, "rope_kv_write: " << op.q.shape[0] << " tokens are too many");
  const cudaStream_t stream = stream_of(context);
  if (op.q.dtype == DType::f32 && op.kv_cache.dtype == DType::f32) {
    launch_rope_kv_write<float, float>(op, stream);
  } else if (op.q.dtype == DType::f32 && op.kv_cache.dtype == DType::bf16) {
    launch_rope_kv_write<float, bf16>(op, stream);
  } else {
    FS_CHECK(op.kv_cache.dtype == op.q.dtype,
             "rope_kv_write: kv_cache is "
                 << name_of(op.kv_cache.dtype) << " and q " << name_of(op.q.dtype)
                 << "; the cuda kernel takes equal dtypes, or float32 and bfloat16");
    if (op.q.dtype == DType::f16) {
      launch_rope_kv_write<f16, f16>(op, stream);
    } else {
      launch_rope_kv_write<bf16, bf16>(op, stream);
    }
  }
  check_launch("rope_kv_write");
}

}  // namespace

FS_REGISTER_CUDA(RopeKvWrite, rope_kv_write, kActivations)

}  // namespace fs::cuda
