// SPDX-License-Identifier: Apache-2.0
//
// RMSNorm with an optional residual add in front (Zhang and Sennrich 2019). One pass reads x and the
// residual, writes the sum and gathers squares; a second pass over the row, still in L1, scales it.
#include <cmath>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/round.h"
#include "cpu/weights.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

constexpr int64_t kRowsPerChunk = 8;

// `row` is the row to normalise: x itself, or residual + x, which is also stored to `sum`.
template <class W, class Out>
void norm_row(Out* out, const float* x, float* sum, const W* weight, int64_t hidden, float eps) {
  const int64_t whole = hidden - hidden % kLanes;
  const float* row = sum != nullptr ? sum : x;
  vf squares = zero();
  for (int64_t h = 0; h < whole; h += kLanes) {
    vf value = load(x + h);
    if (sum != nullptr) {
      value = load(sum + h) + value;
      store(sum + h, value);
    }
    squares = fma(value, value, squares);
  }
  float total = reduce_add(squares);
  for (int64_t h = whole; h < hidden; ++h) {
    if (sum != nullptr) sum[h] += x[h];
    total += row[h] * row[h];
  }
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(hidden) + eps);
  const vf scales = set1(scale);
  for (int64_t h = 0; h < whole; h += kLanes) store(out + h, load(row + h) * scales * load(weight + h));
  for (int64_t h = whole; h < hidden; ++h) store_one(out + h, row[h] * scale * to_float(weight[h]));
}

void rms_norm(const RmsNorm& op, const OpContext&) {
  const int64_t num_tokens = op.out.shape[0];
  const int64_t hidden = op.out.shape[1];
  visit_weights(op.weight.dtype, [&](auto* tag) {
    const auto* weight = op.weight.ptr<std::remove_pointer_t<decltype(tag)>>();
    const auto run = [&](auto* out) {
      parallel_rows(num_tokens, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
          float* sum = op.residual.defined() ? op.residual.ptr<float>() + t * hidden : nullptr;
          const float* x = op.x.ptr<const float>() + t * op.x.stride[0];
          norm_row(out + t * op.out.stride[0], x, sum, weight, hidden, op.eps);
        }
      });
    };
    if (op.out.dtype == DType::bf16) {
      run(op.out.ptr<bf16>());
    } else {
      run(op.out.ptr<float>());
    }
  });
}

}  // namespace

FS_REGISTER_CPU(RmsNorm, rms_norm, DType::f32)

}  // namespace fs::FS_ISA
