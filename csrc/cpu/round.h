// SPDX-License-Identifier: Apache-2.0
//
// Floats to memory as bfloat16, rounded as to_bf16 does.
#pragma once

#include "core/simd.h"

namespace fs::FS_ISA {

inline void store(bf16* p, vf x) {
#if defined(FS_SIMD_AVX512) && !defined(FS_SIMD_EMULATED)
#if defined(FS_SIMD_BF16)
  // The instruction takes subnormal numbers for zero: those that may be one go the long way.
  const __mmask16 normal = _mm512_test_epi32_mask(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7f800000));
  if (__builtin_expect(normal == 0xffff, 1)) {
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x.v));
  }
#endif
  const __m512i bits = _mm512_castps_si512(x.v), upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i rounded =
      _mm512_mask_or_epi32(_mm512_srli_epi32(sum, 16), nan, upper, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
#else
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(lanes[i]);
#endif
}

inline void store_one(bf16* p, float x) {
  *p = to_bf16(x);
}
inline void store_one(float* p, float x) {
  *p = x;
}

}  // namespace fs::FS_ISA
