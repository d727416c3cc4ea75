// SPDX-License-Identifier: Apache-2.0
//
// The gated activation of Llama-like MLPs (gate.h).
#include "cpu/gate.h"
#include "cpu/parallel.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

constexpr int64_t kRowsPerChunk = 4;

void silu_mul(const SiluMul& op, const OpContext&) {
  const int64_t num_tokens = op.out.shape[0];
  const int64_t width = op.out.shape[1];
  parallel_rows(num_tokens, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const float* gate = op.gate_up.ptr<const float>() + t * op.gate_up.stride[0];
      const float* up = gate + width;
      float* out = op.out.ptr<float>() + t * width;
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) store(out + i, gated(load(gate + i), load(up + i)));
      if (const int rest = static_cast<int>(width - i); rest > 0) {
        store_first(out + i, gated(load_first(gate + i, rest), load_first(up + i, rest)), rest);
      }
    }
  });
}

}  // namespace

FS_REGISTER_CPU(SiluMul, silu_mul, DType::f32)

}  // namespace fs::FS_ISA
