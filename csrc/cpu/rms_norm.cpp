// SPDX-License-Identifier: Apache-2.0
//
// RMSNorm with an optional residual add in front (Zhang and Sennrich 2019). One pass reads x and the
// residual, writes the sum and gathers squares; a second pass over the row, still in L1, scales it.
#include <cmath>
#include <type_traits>

#include "cpu/each.h"
#include "cpu/parallel.h"
#include "cpu/round.h"
#include "cpu/weights.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

constexpr int64_t kRowsPerChunk = 32;
constexpr int kRowsTogether = 4;

// `kRows` rows to normalise: x itself, or residual + x, which is also stored to `sum`.
template <int kRows, class W, class Out>
void norm_rows(Out* out, int64_t out_stride, const float* x, int64_t x_stride, float* sum, const W* weight,
               int64_t hidden, float eps) {
  const int64_t whole = hidden - hidden % kLanes;
  const float* rows = sum != nullptr ? sum : x;
  const int64_t stride = sum != nullptr ? hidden : x_stride;
  vf squares[kRows];
  each<kRows>([&](auto r) FS_INLINE { squares[r.value] = zero(); });
  if (sum != nullptr) {
    for (int64_t h = 0; h < whole; h += kLanes) {
      each<kRows>([&](auto r) FS_INLINE {
        const vf value = load(sum + r.value * hidden + h) + load(x + r.value * x_stride + h);
        store(sum + r.value * hidden + h, value);
        squares[r.value] = fma(value, value, squares[r.value]);
      });
    }
  } else {
    for (int64_t h = 0; h < whole; h += kLanes) {
      each<kRows>([&](auto r) FS_INLINE {
        const vf value = load(x + r.value * x_stride + h);
        squares[r.value] = fma(value, value, squares[r.value]);
      });
    }
  }
  vf scales[kRows];
  float scale[kRows];
  each<kRows>([&](auto r) FS_INLINE {
    float total = reduce_add(squares[r.value]);
    for (int64_t h = whole; h < hidden; ++h) {
      if (sum != nullptr) sum[r.value * hidden + h] += x[r.value * x_stride + h];
      total += rows[r.value * stride + h] * rows[r.value * stride + h];
    }
    scale[r.value] = 1.0f / std::sqrt(total / static_cast<float>(hidden) + eps);
    scales[r.value] = set1(scale[r.value]);
  });
  for (int64_t h = 0; h < whole; h += kLanes) {
    const vf w = load(weight + h);
    each<kRows>([&](auto r) FS_INLINE {
      store(out + r.value * out_stride + h, load(rows + r.value * stride + h) * scales[r.value] * w);
    });
  }
  for (int64_t h = whole; h < hidden; ++h) {
    each<kRows>([&](auto r) FS_INLINE {
      store_one(out + r.value * out_stride + h,
                rows[r.value * stride + h] * scale[r.value] * to_float(weight[h]));
    });
  }
}

void rms_norm(const RmsNorm& op, const OpContext&) {
  const int64_t num_tokens = op.out.shape[0];
  const int64_t hidden = op.out.shape[1];
  visit_weights(op.weight.dtype, [&](auto* tag) {
    const auto* weight = op.weight.ptr<std::remove_pointer_t<decltype(tag)>>();
    const auto run = [&](auto* out) {
      parallel_rows(num_tokens, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
        const auto rows = [&](auto count, int64_t t) {
          float* sum = op.residual.defined() ? op.residual.ptr<float>() + t * hidden : nullptr;
          const float* x = op.x.ptr<const float>() + t * op.x.stride[0];
          norm_rows<count.value>(out + t * op.out.stride[0], op.out.stride[0], x, op.x.stride[0], sum, weight,
                                 hidden, op.eps);
        };
        int64_t t = begin;
        for (; t + kRowsTogether <= end; t += kRowsTogether) rows(Index<kRowsTogether>{}, t);
        for (; t < end; ++t) rows(Index<1>{}, t);
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
