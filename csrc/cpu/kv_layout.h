// SPDX-License-Identifier: Apache-2.0
//
// How the CPU arranges keys and values inside a KV block. Only rope_kv_write and attention know.
//
// A block of one KV head is S tokens x D dims, twice (K, V). Keys lie with tokens along the vector, so that
// scores need no horizontal sums; values with dims along the vector.
//   float32    K [D][S]         V [S][D]
//   bfloat16   K [D/2][S][2]    V [S/2][D][2]
// bfloat16 pairs neighbours of the summed dimension in one 32-bit word: what a bf16 dot product takes, and
// two float vectors (even, odd) by a shift and a mask.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/error.h"
#include "core/simd.h"
#include "core/tensor.h"

namespace fs::FS_ISA {

inline constexpr int64_t kMaxHeadDim = 256;
inline constexpr int64_t kMaxBlockSize = 256;

struct TokenRange {
  int64_t begin, end;
};
inline TokenRange overlap(TokenRange a, TokenRange b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

template <class KV>
int64_t key_index(int64_t token, int64_t dim, int64_t block_size) {
  if constexpr (std::is_same_v<KV, float>) return dim * block_size + token;
  return (dim / 2 * block_size + token) * 2 + dim % 2;
}

template <class KV>
int64_t value_index(int64_t token, int64_t dim, int64_t head_dim) {
  if constexpr (std::is_same_v<KV, float>) return token * head_dim + dim;
  return (token / 2 * head_dim + dim) * 2 + token % 2;
}

// The cache tensor [NB, 2, Nkv, S, D].
template <class KV>
struct KvCache {
  KV* data;
  int64_t num_blocks;
  int64_t num_heads;
  int64_t block_size;
  int64_t head_dim;

  explicit KvCache(const Tensor& cache)
      : data(cache.ptr<KV>()),
        num_blocks(cache.shape[0]),
        num_heads(cache.shape[2]),
        block_size(cache.shape[3]),
        head_dim(cache.shape[4]) {}

  KV* keys(int64_t block, int64_t head) const {
    return data + (block * 2 * num_heads + head) * block_size * head_dim;
  }
  KV* values(int64_t block, int64_t head) const {
    return data + ((block * 2 + 1) * num_heads + head) * block_size * head_dim;
  }
};

inline void check_kv_cache(const Tensor& cache, const char* op_name) {
  const int64_t block_size = cache.shape[3];
  const int64_t head_dim = cache.shape[4];
  FS_CHECK(block_size >= 16 && block_size % 16 == 0 && block_size <= kMaxBlockSize,
           op_name << ": kv_cache has blocks of " << block_size
                   << " tokens; the CPU takes multiples of 16 up to " << kMaxBlockSize);
  FS_CHECK(head_dim >= 2 && head_dim % 2 == 0 && head_dim <= kMaxHeadDim,
           op_name << ": head_dim is " << head_dim << "; the CPU takes even numbers up to " << kMaxHeadDim);
}

// The first and the second elements of kLanes pairs.
inline vf load_even(const bf16* p) {
#if defined(FS_SIMD_AVX512)
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
#elif defined(FS_SIMD_AVX2)
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16))};
#else
  v4i pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  return {__builtin_bit_cast(v4f, pairs << 16)};
#endif
}
inline vf load_odd(const bf16* p) {
  constexpr auto kUpper = static_cast<int>(0xffff0000u);
#if defined(FS_SIMD_AVX512)
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(kUpper)))};
#elif defined(FS_SIMD_AVX2)
  return {_mm256_castsi256_ps(
      _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi32(kUpper)))};
#else
  v4i pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  return {__builtin_bit_cast(v4f, pairs & kUpper)};
#endif
}

}  // namespace fs::FS_ISA
