// SPDX-License-Identifier: Apache-2.0
//
// silu(gate) * up with silu(x) = x / (1 + exp(-x)): `silu_mul` and the ops that end with it have the same
// bits.
#pragma once

#include "core/simd.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

inline vf gated(vf gate, vf up) {
  return gate / (set1(1.0f) + exp(zero() - gate)) * up;
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
