// SPDX-License-Identifier: Apache-2.0
//
// Loops over registers, written out.
#pragma once

#include <utility>

#include "core/simd.h"

namespace fs::FS_ISA {

// f(Index<0>), f(Index<1>), ... f(Index<N - 1>), written out: accumulators indexed by constants become
// registers, those indexed by a loop variable stay in memory for too long.
template <int I>
struct Index {
  static constexpr int value = I;
};
template <int... I, class F>
[[gnu::always_inline]] inline void each_of(std::integer_sequence<int, I...>, const F& f) {
  (f(Index<I>{}), ...);
}
template <int N, class F>
[[gnu::always_inline]] inline void each(const F& f) {
  each_of(std::make_integer_sequence<int, N>{}, f);
}
#define FS_INLINE __attribute__((always_inline))

}  // namespace fs::FS_ISA
