// SPDX-License-Identifier: Apache-2.0
//
// Partial results of attention over disjoint ranges of KV tokens, and how two become one.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/simd.h"
#include "cpu/round.h"

namespace fs::FS_ISA {

// softmax(scores) V of one row over some tokens, unnormalised. sum is 0 if it saw none.
struct Partial {
  float* out;
  float* max;
  float* sum;
};

// The partials of consecutive packed rows. A kernel may also write up to 16 rows of `out` beyond the last.
struct Partials {
  float* out;
  int64_t stride;
  float* max;
  float* sum;

  Partial row(int64_t r) const { return {out + r * stride, max + r, sum + r}; }
  Partials from(int64_t r) const { return {out + r * stride, stride, max + r, sum + r}; }
};

// a = a * of_a + b * of_b, with b's tokens after a's.
inline void fold(const Partial& a, const Partial& b, float of_a, float of_b, int64_t dim) {
  const vf factor_a = set1(of_a);
  const vf factor_b = set1(of_b);
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    store(a.out + d, fma(load(b.out + d), factor_b, load(a.out + d) * factor_a));
  }
  if (const int rest = static_cast<int>(dim - d); rest > 0) {
    store_first(a.out + d, fma(load_first(b.out + d, rest), factor_b, load_first(a.out + d, rest) * factor_a),
                rest);
  }
  *a.sum = *a.sum * of_a + *b.sum * of_b;
}

// to(r) = to(r) + from(r) of n rows, where from's tokens come after to's.
template <class To, class From>
void fold_rows(int64_t n, const To& to, const From& from, int64_t dim) {
  for (int64_t r = 0; r < n; r += kLanes) {
    const int count = static_cast<int>(n - r < kLanes ? n - r : kLanes);
    float highest[kLanes];
    float of_a[kLanes] = {};
    float of_b[kLanes] = {};
    for (int i = 0; i < count; ++i) {
      const float max_a = *to(r + i).max;
      const float max_b = *from(r + i).max;
      highest[i] = max_a > max_b ? max_a : max_b;
      of_a[i] = max_a - highest[i];
      of_b[i] = max_b - highest[i];
    }
    store(of_a, exp2(load(of_a)));
    store(of_b, exp2(load(of_b)));
    for (int i = 0; i < count; ++i) {
      const Partial a = to(r + i);
      const Partial b = from(r + i);
      if (*b.sum == 0.0f) continue;
      if (*a.sum == 0.0f) {
        std::memcpy(a.out, b.out, static_cast<size_t>(dim) * sizeof(float));
        *a.max = *b.max;
        *a.sum = *b.sum;
        continue;
      }
      fold(a, b, of_a[i], of_b[i], dim);
      *a.max = highest[i];
    }
  }
}

template <class To>
void fold_rows(int64_t n, const To& to, const Partials& from, int64_t dim) {
  fold_rows(n, to, [&](int64_t r) { return from.row(r); }, dim);
}

// One row and head of the output, float or bf16.
template <class Out>
void write_output(Out* out, const Partial& from, int64_t dim) {
  const float scale = *from.sum == 0.0f ? 0.0f : 1.0f / *from.sum;
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(from.out + d) * set1(scale));
  for (; d < dim; ++d) store_one(out + d, from.out[d] * scale);
}

}  // namespace fs::FS_ISA
