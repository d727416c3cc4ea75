// SPDX-License-Identifier: Apache-2.0
//
// The noise of sixteen Philox blocks at once.
#pragma once

#include <cstdint>

#include "core/simd.h"
#include "layout/philox.h"

namespace fs::FS_ISA {

inline constexpr int kNoiseBlocks = 16;

// noise[4 * i + w] = word w of sampling_noise(token_blocks[i], position, seed)
inline void noise_of_blocks(const uint32_t* token_blocks, uint32_t position, uint64_t seed, uint32_t* noise) {
#if defined(FS_SIMD_AVX2) || defined(FS_SIMD_AVX512)
  // Each 32-bit word sits in a lane of 64 bits, as the multiplication wants it and leaves it. What is in the
  // upper halves is ignored by the next multiplication and dropped at the end.
  constexpr int kGroups = kNoiseBlocks / 4;
  const __m256i factor0 = _mm256_set1_epi64x(0xD2511F53u);
  const __m256i factor1 = _mm256_set1_epi64x(0xCD9E8D57u);
  __m256i word0[kGroups], word1[kGroups], word2[kGroups], word3[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    word0[g] = _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(token_blocks + 4 * g)));
    word1[g] = _mm256_set1_epi64x(position);
    word2[g] = _mm256_setzero_si256();
    word3[g] = _mm256_setzero_si256();
  }
  auto key0 = static_cast<uint32_t>(seed);
  auto key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m256i keys0 = _mm256_set1_epi64x(key0);
    const __m256i keys1 = _mm256_set1_epi64x(key1);
    for (int g = 0; g < kGroups; ++g) {
      const __m256i product0 = _mm256_mul_epu32(word0[g], factor0);
      const __m256i product1 = _mm256_mul_epu32(word2[g], factor1);
      word0[g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), word1[g]), keys0);
      word2[g] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), word3[g]), keys1);
      word1[g] = product1;
      word3[g] = product0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int g = 0; g < kGroups; ++g) {
    const __m256i words01 = _mm256_blend_epi32(word0[g], _mm256_slli_epi64(word1[g], 32), 0xAA);
    const __m256i words23 = _mm256_blend_epi32(word2[g], _mm256_slli_epi64(word3[g], 32), 0xAA);
    const __m256i blocks02 = _mm256_unpacklo_epi64(words01, words23);
    const __m256i blocks13 = _mm256_unpackhi_epi64(words01, words23);
    auto* out = reinterpret_cast<__m256i*>(noise + 16 * g);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(blocks02, blocks13, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(blocks02, blocks13, 0x31));
  }
#else
  for (int i = 0; i < kNoiseBlocks; ++i) {
    const Philox4x32 block = sampling_noise(token_blocks[i], position, seed);
    for (int w = 0; w < 4; ++w) noise[4 * i + w] = block.word[w];
  }
#endif
}

}  // namespace fs::FS_ISA
