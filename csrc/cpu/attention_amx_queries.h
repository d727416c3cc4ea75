// SPDX-License-Identifier: Apache-2.0
//
// Queries as the left matrix of products on AMX tiles: rounded to bfloat16, with the sign of the scale, whose
// size is left to the scores. So the largest score has the largest weight.
#pragma once

#if defined(FS_SIMD_AMX)

#include <cstdint>

#include "cpu/attention_amx_weights.h"
#include "cpu/attention_unit.h"

namespace fs::FS_ISA {

class AmxQueries {
 public:
  explicit AmxQueries(const Attention& op) {
    const float scale = op.scale * 1.44269504f;  // 2^(q . k * scale) = exp(op.scale * q . k)
    is_negative_ = scale < 0;
    scale_ = is_negative_ ? -scale : scale;
  }

  float scale() const { return scale_; }  // of scores, not negative

  // Packed rows [first, first + count), head_dim elements apart; head_dim is a multiple of 32.
  void round(const PackedRows& rows, int64_t first, int64_t count, bf16* to) const {
    const int64_t dim = rows.shape.head_dim;
    const __m512i sign = _mm512_set1_epi16(static_cast<short>(is_negative_ ? 0x8000 : 0));
    rows.for_each(first, count, [&](int64_t r, int64_t token, int64_t head) {
      const float* from = rows.query(token, head);
      for (int64_t d = 0; d < dim; d += 2 * kLanes) {
        const __m512i q = round_to_bf16(load(from + d), load(from + d + kLanes));
        _mm512_storeu_si512(to + r * dim + d, _mm512_xor_si512(q, sign));
      }
    });
  }

 private:
  float scale_;
  bool is_negative_;
};

}  // namespace fs::FS_ISA

#endif
