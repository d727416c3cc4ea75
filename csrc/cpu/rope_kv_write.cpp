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
#include "cpu/round.h"
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
template <class Out>
void rotate_head(Out* out, const float* x, const float* cos_sin, int64_t dim) {
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
    store_one(out + d, a * cos[d] - b * sin[d]);
    store_one(out + half + d, b * cos[d] + a * sin[d]);
  }
}

// Tokens [begin, end) that go to one block, one behind the other, or one that is kept nowhere: `block` is -1.
struct Run {
  int64_t begin, end, block, offset;

  int64_t count() const { return end - begin; }
};

// The run that begins with token `begin`, below `end`.
Run run_from(const int32_t* slots, int64_t begin, int64_t end, int64_t block_size) {
  if (slots[begin] < 0) return {begin, begin + 1, -1, 0};  // padding
  Run run{begin, begin + 1, slots[begin] / block_size, slots[begin] % block_size};
  while (run.end < end && slots[run.end] == slots[begin] + run.count() && slots[run.end] % block_size != 0) {
    run.end += 1;
  }
  return run;
}

// The next functions write keys or values of one KV head: keys from rows of kMaxHeadDim, values from rows of
// `stride`. What lies in one line of memory is written together: a line of keys has several tokens. Only the
// bytes of these tokens are written: another thread may write the other token of a pair.

void write_keys(const KvCache<float>& cache, const Run& run, int64_t head, const float* keys) {
  float* to = cache.keys(run.block, head) + key_index<float>(run.offset, 0, cache.block_size);
  for (int64_t d = 0; d < cache.head_dim; ++d, to += cache.block_size) {
    for (int64_t i = 0; i < run.count(); ++i) to[i] = keys[i * kMaxHeadDim + d];
  }
}
void write_values(const KvCache<float>& cache, const Run& run, int64_t head, const float* values,
                  int64_t stride) {
  const int64_t dim = cache.head_dim;
  float* to = cache.values(run.block, head) + value_index<float>(run.offset, 0, dim);
  for (int64_t i = 0; i < run.count(); ++i) {
    std::memcpy(to + i * dim, values + i * stride, static_cast<size_t>(dim) * sizeof(float));
  }
}

void write_keys(const KvCache<bf16>& cache, const Run& run, int64_t head, const bf16* keys) {
  bf16* to = cache.keys(run.block, head) + key_index<bf16>(run.offset, 0, cache.block_size);
  const int64_t line = key_index<bf16>(0, 2, cache.block_size);
  for (int64_t d = 0; d < cache.head_dim; d += 2, to += line) {
    for (int64_t i = 0; i < run.count(); ++i) {
      std::memcpy(to + 2 * i, keys + i * kMaxHeadDim + d, 2 * sizeof(bf16));
    }
  }
}

void round_row(bf16* to, const float* from, int64_t dim) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d));
  for (; d < dim; ++d) to[d] = to_bf16(from[d]);
}

// The values of one token: the first or the second places of pairs, `second` is 0 or 1.
void write_half_pairs(bf16* pairs, int second, const bf16* values, int64_t dim) {
  int64_t d = 0;
#if defined(FS_SIMD_AVX512) && !defined(FS_SIMD_EMULATED)
  for (; d + 16 <= dim; d += 16) {
    const __m512i words =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + d)));
    if (second == 0) {
      _mm512_mask_storeu_epi16(pairs + 2 * d, 0x55555555u, words);
    } else {
      _mm512_mask_storeu_epi16(pairs + 2 * d, 0xaaaaaaaau, _mm512_slli_epi32(words, 16));
    }
  }
#endif
  for (; d < dim; ++d) pairs[2 * d + second] = values[d];
}

void write_values(const KvCache<bf16>& cache, const Run& run, int64_t head, const float* values,
                  int64_t stride) {
  const int64_t dim = cache.head_dim;
  alignas(64) bf16 rounded[2][kMaxHeadDim];
  for (int64_t i = 0; i < run.count();) {
    const int64_t second = (run.offset + i) % 2;
    bf16* pairs = cache.values(run.block, head) + value_index<bf16>(run.offset + i - second, 0, dim);
    round_row(rounded[0], values + i * stride, dim);
    if (second == 1 || i + 1 == run.count()) {
      write_half_pairs(pairs, static_cast<int>(second), rounded[0], dim);
      i += 1;
    } else {
      round_row(rounded[1], values + (i + 1) * stride, dim);
      for (int64_t d = 0; d < dim; ++d) {
        pairs[2 * d] = rounded[0][d];
        pairs[2 * d + 1] = rounded[1][d];
      }
      i += 2;
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

// Lines of the cache that a run is written to: each of a decode's lies apart from the others and far from any
// that was used of late.
template <class KV>
__attribute__((always_inline)) inline void ask_for_lines(const KvCache<KV>& cache, const Run& run) {
  if (run.block < 0) return;
  constexpr int64_t kDims = 4 / sizeof(KV), kTokensInLine = 16, kInLine = 64 / sizeof(KV);
  const int64_t dim = cache.head_dim, last = run.offset + run.count() - 1;
  for (int64_t head = 0; head < cache.num_heads; ++head) {
    const KV* keys = cache.keys(run.block, head);
    for (int64_t token = run.offset - run.offset % kTokensInLine; token <= last; token += kTokensInLine) {
      for (int64_t d = 0; d < dim; d += kDims) prefetch(keys + key_index<KV>(token, d, cache.block_size));
    }
    const KV* values = cache.values(run.block, head);
    const KV* end = values + value_index<KV>(last, dim - 1, dim) + 1;
    for (const KV* at = values + value_index<KV>(run.offset, 0, dim); at < end; at += kInLine) prefetch(at);
  }
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
    alignas(64) KV keys[kTokensPerChunk * kMaxHeadDim];
    alignas(64) float normed[kMaxHeadDim];
    for (Run run{begin, begin, -1, 0}; run.end < end;) {
      run = run_from(slots, run.end, end, cache.block_size);
      ask_for_lines(cache, run);
      for (int64_t t = run.begin; t < run.end; ++t) {
        for (int64_t head = 0; head < op.q.shape[1]; ++head) {
          float* q = op.q.ptr<float>() + t * op.q.stride[0] + head * dim;
          if (q_norm != nullptr) norm_head(q, q, q_norm, dim, op.eps);
          rotate_head(q, q, cos_sin(t), dim);
        }
      }
      if (run.block < 0) continue;
      for (int64_t head = 0; head < cache.num_heads; ++head) {
        for (int64_t t = run.begin; t < run.end; ++t) {
          const float* k = op.k.ptr<const float>() + t * op.k.stride[0] + head * dim;
          if (k_norm != nullptr) norm_head(normed, k, k_norm, dim, op.eps);
          rotate_head(keys + (t - run.begin) * kMaxHeadDim, k_norm != nullptr ? normed : k, cos_sin(t), dim);
        }
        write_keys(cache, run, head, keys);
        const float* values = op.v.ptr<const float>() + run.begin * op.v.stride[0] + head * dim;
        write_values(cache, run, head, values, op.v.stride[0]);
      }
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
