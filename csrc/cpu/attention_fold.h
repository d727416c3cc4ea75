// SPDX-License-Identifier: Apache-2.0
//
// Partial results of attention over disjoint ranges of KV tokens, and how two become one.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/simd.h"

namespace fs::FS_ISA {

// softmax(scores) V of one row over some tokens, unnormalised. sum is 0 if it saw none.
struct Partial {
  float* out;
  float* max;
  float* sum;
};

// a = a + b, where b's tokens come after a's.
inline void fold(const Partial& a, const Partial& b, int64_t dim) {
  if (*b.sum == 0.0f) return;
  if (*a.sum == 0.0f) {
    std::memcpy(a.out, b.out, static_cast<size_t>(dim) * sizeof(float));
    *a.max = *b.max;
    *a.sum = *b.sum;
    return;
  }
  const float highest = *a.max > *b.max ? *a.max : *b.max;
  float factor_a[kLanes];
  float factor_b[kLanes];
  store(factor_a, exp2(set1(*a.max - highest)));
  store(factor_b, exp2(set1(*b.max - highest)));
  const vf of_a = set1(factor_a[0]);
  const vf of_b = set1(factor_b[0]);
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(a.out + d, fma(load(b.out + d), of_b, load(a.out + d) * of_a));
  if (const int rest = static_cast<int>(dim - d); rest > 0) {
    store_first(a.out + d, fma(load_first(b.out + d, rest), of_b, load_first(a.out + d, rest) * of_a), rest);
  }
  *a.max = highest;
  *a.sum = *a.sum * factor_a[0] + *b.sum * factor_b[0];
}

inline void write_output(float* out, const Partial& from, int64_t dim) {
  const float scale = *from.sum == 0.0f ? 0.0f : 1.0f / *from.sum;
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(from.out + d) * set1(scale));
  for (; d < dim; ++d) out[d] = from.out[d] * scale;
}

}  // namespace fs::FS_ISA
