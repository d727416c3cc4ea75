// SPDX-License-Identifier: Apache-2.0
//
// Rotary position embedding (Su et al. 2021; halves rotated as in GPT-NeoX), with an RMS norm of every query
// and key head in front where the model has one (Qwen3), and the write of keys and values to the paged cache.
// Bound: memory; each of q, k, v is read once.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kv_layout.h"
#include "cpu/parallel.h"
#include "cpu/weights.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

constexpr int64_t kTokensPerChunk = 16;

// out = x / sqrt(mean(x^2) + eps) * weight
void norm_head(float* out, const float* x, const float* weight, int64_t dim, float eps) {
  const int64_t whole = dim - dim % kLanes;
  vf squares = zero();
  for (int64_t d = 0; d < whole; d += kLanes) squares = fma(load(x + d), load(x + d), squares);
  float total = reduce_add(squares);
  for (int64_t d = whole; d < dim; ++d) total += x[d] * x[d];
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(dim) + eps);
  for (int64_t d = 0; d < whole; d += kLanes) store(out + d, load(x + d) * set1(scale) * load(weight + d));
  for (int64_t d = whole; d < dim; ++d) out[d] = x[d] * scale * weight[d];
}

// (a, b) -> (a cos - b sin, b cos + a sin) with a and b the halves of x. out may be x.
void rotate_head(float* out, const float* x, const float* cos_sin, int64_t dim) {
  const int64_t half = dim / 2;
  const float* cos = cos_sin;
  const float* sin = cos_sin + half;
  int64_t d = 0;
  for (; d + kLanes <= half; d += kLanes) {
    const vf a = load(x + d);
    const vf b = load(x + half + d);
    store(out + d, a * load(cos + d) - b * load(sin + d));
    store(out + half + d, b * load(cos + d) + a * load(sin + d));
  }
  for (; d < half; ++d) {
    const float a = x[d];
    const float b = x[half + d];
    out[d] = a * cos[d] - b * sin[d];
    out[half + d] = b * cos[d] + a * sin[d];
  }
}

// Keys and values of one KV head for `count` tokens, the first one `offset` tokens into its block: keys in
// rows of kMaxHeadDim, values in rows of `stride`. What lies in one line of memory is written together: a
// line of keys has several tokens. Only the bytes of these tokens are written: another thread may write the
// other token of a pair.
void write_head(const KvCache<float>& cache, int64_t block, int64_t offset, int64_t head, int64_t count,
                const float* keys, const float* values, int64_t stride) {
  const int64_t dim = cache.head_dim;
  float* to = cache.keys(block, head) + key_index<float>(offset, 0, cache.block_size);
  for (int64_t d = 0; d < dim; ++d, to += cache.block_size) {
    for (int64_t i = 0; i < count; ++i) to[i] = keys[i * kMaxHeadDim + d];
  }
  to = cache.values(block, head) + value_index<float>(offset, 0, dim);
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * dim, values + i * stride, static_cast<size_t>(dim) * sizeof(float));
  }
}
void write_head(const KvCache<bf16>& cache, int64_t block, int64_t offset, int64_t head, int64_t count,
                const float* keys, const float* values, int64_t stride) {
  const int64_t dim = cache.head_dim;
  alignas(64) bf16 rounded[kTokensPerChunk * kMaxHeadDim];
  for (int64_t i = 0; i < count * kMaxHeadDim; i += kMaxHeadDim) {
    for (int64_t d = 0; d < dim; ++d) rounded[i + d] = to_bf16(keys[i + d]);
  }
  bf16* to = cache.keys(block, head) + key_index<bf16>(offset, 0, cache.block_size);
  const int64_t line = key_index<bf16>(0, 2, cache.block_size);
  for (int64_t d = 0; d < dim; d += 2, to += line) {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(to + 2 * i, rounded + i * kMaxHeadDim + d, 2 * sizeof(bf16));
    }
  }
  for (int64_t i = 0; i < count;) {
    to = cache.values(block, head) + value_index<bf16>(offset + i, 0, dim);
    const float* from = values + i * stride;
    if ((offset + i) % 2 == 0 && i + 1 < count) {
      for (int64_t d = 0; d < dim; ++d) {
        to[2 * d] = to_bf16(from[d]);
        to[2 * d + 1] = to_bf16(from[stride + d]);
      }
      i += 2;
    } else {
      for (int64_t d = 0; d < dim; ++d) to[2 * d] = to_bf16(from[d]);
      i += 1;
    }
  }
}

void check(const RopeKvWrite& op) {
  check_kv_cache(op.kv_cache, "rope_kv_write");
  const int64_t max_position = op.cos_sin.shape[0];
  const int64_t num_slots = op.kv_cache.shape[0] * op.kv_cache.shape[3];
  const auto* positions = op.positions.ptr<const int32_t>();
  const auto* slots = op.slot_mapping.ptr<const int32_t>();
  for (int64_t t = 0; t < op.q.shape[0]; ++t) {
    FS_CHECK(positions[t] >= 0 && positions[t] < max_position,
             "rope_kv_write: positions[" << t << "] is " << positions[t] << "; cos_sin has " << max_position
                                         << " positions");
    FS_CHECK(slots[t] < num_slots, "rope_kv_write: slot_mapping[" << t << "] is " << slots[t]
                                                                  << "; the cache has " << num_slots
                                                                  << " slots");
  }
}

// The norm weights as floats, or nullptr.
const float* norm_weight(const Tensor& weight, float* buffer) {
  if (!weight.defined()) return nullptr;
  visit_weights(weight.dtype, [&](auto* tag) {
    const auto* from = weight.ptr<std::remove_pointer_t<decltype(tag)>>();
    for (int64_t d = 0; d < weight.shape[0]; ++d) buffer[d] = to_float(from[d]);
  });
  return buffer;
}

// How many of the next tokens, up to `most`, go to one block, one behind the other.
int64_t tokens_in_line(const int32_t* slots, int64_t most, int64_t block_size) {
  int64_t count = 1;
  while (count < most && slots[count] == slots[0] + count && slots[count] % block_size != 0) ++count;
  return count;
}

template <class KV>
void rotate_and_write(const RopeKvWrite& op, const float* q_norm, const float* k_norm) {
  const int64_t dim = op.q.shape[2];
  const KvCache<KV> cache(op.kv_cache);
  const auto* slots = op.slot_mapping.ptr<const int32_t>();
  const auto cos_sin = [&](int64_t token) {
    return op.cos_sin.ptr<const float>() + op.positions.ptr<const int32_t>()[token] * dim;
  };
  parallel_rows(op.q.shape[0], kTokensPerChunk, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t head = 0; head < op.q.shape[1]; ++head) {
        float* q = op.q.ptr<float>() + t * op.q.stride[0] + head * dim;
        if (q_norm != nullptr) norm_head(q, q, q_norm, dim, op.eps);
        rotate_head(q, q, cos_sin(t), dim);
      }
    }
    alignas(64) float keys[kTokensPerChunk * kMaxHeadDim];
    for (int64_t t = begin; t < end;) {
      if (slots[t] < 0) {  // padding: nothing to keep
        t += 1;
        continue;
      }
      const int64_t block = slots[t] / cache.block_size;
      const int64_t offset = slots[t] % cache.block_size;
      const int64_t count = tokens_in_line(slots + t, end - t, cache.block_size);
      for (int64_t head = 0; head < cache.num_heads; ++head) {
        for (int64_t i = 0; i < count; ++i) {
          const float* k = op.k.ptr<const float>() + (t + i) * op.k.stride[0] + head * dim;
          float* key = keys + i * kMaxHeadDim;
          if (k_norm != nullptr) norm_head(key, k, k_norm, dim, op.eps);
          rotate_head(key, k_norm != nullptr ? key : k, cos_sin(t + i), dim);
        }
        const float* values = op.v.ptr<const float>() + t * op.v.stride[0] + head * dim;
        write_head(cache, block, offset, head, count, keys, values, op.v.stride[0]);
      }
      t += count;
    }
  });
}

void rope_kv_write(const RopeKvWrite& op, const OpContext&) {
  check(op);
  float q_buffer[kMaxHeadDim];
  float k_buffer[kMaxHeadDim];
  const float* q_norm = norm_weight(op.q_norm, q_buffer);
  const float* k_norm = norm_weight(op.k_norm, k_buffer);
  if (op.kv_cache.dtype == DType::f32) {
    rotate_and_write<float>(op, q_norm, k_norm);
  } else {
    rotate_and_write<bf16>(op, q_norm, k_norm);
  }
}

}  // namespace

FS_REGISTER_CPU(RopeKvWrite, rope_kv_write, DType::f32 | DType::bf16)

}  // namespace fs::FS_ISA
