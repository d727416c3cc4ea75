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

// f(0), f(1), ... f(N - 1), written out where that makes kernels faster. Not where instructions are emulated,
// each in tens of others: compilers take minutes over that.
template <int N, class F>
[[gnu::always_inline]] inline void repeat(const F& f) {
#if defined(FS_SIMD_EMULATED)
#pragma GCC unroll 1
  for (int i = 0; i < N; ++i) f(i);
#else
  each<N>([&](auto i) FS_INLINE { f(i.value); });
#endif
}

}  // namespace fs::FS_ISA
