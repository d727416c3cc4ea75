// SPDX-License-Identifier: Apache-2.0
//
// silu(gate) * up with silu(x) = x / (1 + exp(-x)): `silu_mul` and the ops that end with it have the same
// bits.
#pragma once

#include "core/simd.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

inline vf gated(vf gate, vf up) {
#if defined(FS_SIMD_AVX512) && !defined(FS_SIMD_EMULATED)
  // The same in half of the time: no division, and 2^t in fewer instructions than exp2. Infinity would make
  // the reciprocal NaN. Of two operands, one of them NaN, min returns the second.
  const vf t = min(set1(126.0f), gate * set1(-1.44269504f));
  const vf f = {_mm512_reduce_ps(t.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};  // [-0.5, 0.5]
  const vf divisor = set1(1.0f) + vf{_mm512_scalef_ps(exp2_fraction(f).v, (t - f).v)};
  const vf near = {_mm512_rcp14_ps(divisor.v)};
  const vf rest = {_mm512_fnmadd_ps(divisor.v, near.v, set1(1.0f).v)};
  return gate * fma(near, rest, near) * up;
#else
  return gate / (set1(1.0f) + exp(zero() - gate)) * up;
#endif
}

// A panel of a gated weight has 16 rows of the gate and the same 16 of up (ops.h). From its results of
// `count` tokens, rows of 32, to rows of 16 at `out`.
inline void gate_rows(float* out, int64_t out_stride, const float* results, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    const float* row = results + t * 2 * kGatedRows;
    for (int64_t i = 0; i < kGatedRows; i += kLanes) {
      store(out + t * out_stride + i, gated(load(row + i), load(row + kGatedRows + i)));
    }
  }
}

}  // namespace fs::FS_ISA
