// SPDX-License-Identifier: Apache-2.0
// Loops over the 32 lanes of a warp, for the handler files. Each of those is compiled once per instruction
// set with PTXSIM_ISA naming its namespace; everything here has internal linkage, so that the linker can
// never give a portable build code that was compiled for AVX-512.
#pragma once

#ifndef PTXSIM_ISA
#error "compile handler files with -DPTXSIM_ISA=portable, avx2 or avx512"
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "warp.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

template <class D>
PTXSIM_INLINE void blend(D* d, const D* t, uint32_t mask) {
#pragma GCC ivdep
  for (int l = 0; l < kLanes; ++l) d[l] = (mask >> l) & 1 ? t[l] : d[l];
}

// d[l] = f(l) for the active lanes. f is evaluated for every lane, so it must be harmless for any operand
// value.
template <class D, class F>
PTXSIM_INLINE void write_lanes(Warp& w, D* d, F f) {
  if (__builtin_expect(w.mask == kAllLanes, 1)) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = f(l);
  } else {
    alignas(64) D t[kLanes];
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) t[l] = f(l);
    blend(d, t, w.mask);
  }
}

template <class D, class A, class F>
PTXSIM_INLINE void unary(Warp& w, const Inst& i, F f) {
  const A* a = reg<A>(w, i.r[1]);
  write_lanes(w, reg<D>(w, i.r[0]),
              [&](int l) __attribute__((always_inline)) { return static_cast<D>(f(a[l])); });
}
template <class D, class A, class B, class F>
PTXSIM_INLINE void binary(Warp& w, const Inst& i, F f) {
  const A* a = reg<A>(w, i.r[1]);
  const B* b = reg<B>(w, i.r[2]);
  write_lanes(w, reg<D>(w, i.r[0]),
              [&](int l) __attribute__((always_inline)) { return static_cast<D>(f(a[l], b[l])); });
}
template <class D, class A, class B, class C, class F>
PTXSIM_INLINE void ternary(Warp& w, const Inst& i, F f) {
  const A* a = reg<A>(w, i.r[1]);
  const B* b = reg<B>(w, i.r[2]);
  const C* c = reg<C>(w, i.r[3]);
  write_lanes(w, reg<D>(w, i.r[0]),
              [&](int l) __attribute__((always_inline)) { return static_cast<D>(f(a[l], b[l], c[l])); });
}

// One bit per lane from 32 words of 0 or -1.
PTXSIM_INLINE uint32_t to_mask(const int32_t* v) {
#ifdef __AVX2__
  uint32_t m = 0;
  for (int q = 0; q < 4; ++q)
    m |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(v + 8 * q))))
         << (8 * q);
  return m;
#else
  uint32_t m = 0;
  for (int l = 0; l < kLanes; ++l) m |= (static_cast<uint32_t>(v[l]) & 1u) << l;
  return m;
#endif
}

PTXSIM_INLINE void write_predicate(Warp& w, uint16_t p, uint32_t value) {
  w.pred[p] = (w.pred[p] & ~w.mask) | (value & w.mask);
}

template <class T, class U>
PTXSIM_INLINE T bits_as(U u) {
  static_assert(sizeof(T) == sizeof(U));
  T t;
  __builtin_memcpy(&t, &u, sizeof(T));
  return t;
}

}  // namespace
}  // namespace ptxsim::PTXSIM_ISA
