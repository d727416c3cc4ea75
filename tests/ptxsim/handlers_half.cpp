// SPDX-License-Identifier: Apache-2.0
// Arithmetic on f16, bf16 and their pairs, correctly rounded.
//
// Sums of 16-bit values are rounded right by f32 arithmetic followed by one conversion; products are exact in
// f32 (f16) or in double (bf16). Only fused multiply-add needs the detour over rounding to odd (half.h).
#include <cmath>

#include "half.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

// N = 32 for scalars, 64 for pairs: a register of pairs is 64 values side by side.
template <int N>
PTXSIM_INLINE void blend_half(Warp& w, uint16_t r, const uint16_t* t) {
  if constexpr (N == 32) {
    blend(reg<uint16_t>(w, r), t, w.mask);
  } else {
    alignas(64) uint32_t pairs[kLanes];
    __builtin_memcpy(pairs, t, sizeof(pairs));
    blend(reg<uint32_t>(w, r), pairs, w.mask);
  }
}

template <bool kFtz, class F>
PTXSIM_INLINE float flush_half(float x) {  // below the smallest normal number of the format
  constexpr float smallest = F::kOne == 0x3c00 ? 6.103515625e-05f : 1.17549435e-38f;
  return kFtz && __builtin_fabsf(x) < smallest ? __builtin_copysignf(0.0f, x) : x;
}
template <bool kSat>
PTXSIM_INLINE float saturate(float x) {
  return kSat ? (x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f) : x;
}

template <class F, int N, bool kFtz, bool kSat, class Op>
PTXSIM_INLINE void half_binary(Warp& w, const Inst& i, Op op) {
  alignas(64) float a[N], b[N];
  alignas(64) uint16_t t[N];
  F::template load<N>(reg<uint16_t>(w, i.r[1]), a);
  F::template load<N>(reg<uint16_t>(w, i.r[2]), b);
#pragma GCC ivdep
  for (int k = 0; k < N; ++k) a[k] = saturate<kSat>(op(flush_half<kFtz, F>(a[k]), flush_half<kFtz, F>(b[k])));
  F::template store<N>(a, t);
  if (kFtz)
    for (int k = 0; k < N; ++k) t[k] = (t[k] & F::kInfinity) == 0 ? t[k] & 0x8000u : t[k];
  blend_half<N>(w, i.r[0], t);
}
template <class F, int N, bool kFtz, bool kSat>
void add(Warp& w, const Inst& i) {
  half_binary<F, N, kFtz, kSat>(w, i, [](float a, float b) __attribute__((always_inline)) { return a + b; });
}
template <class F, int N, bool kFtz, bool kSat>
void sub(Warp& w, const Inst& i) {
  half_binary<F, N, kFtz, kSat>(w, i, [](float a, float b) __attribute__((always_inline)) { return a - b; });
}
template <class F, int N, bool kFtz, bool kSat>
void mul(Warp& w, const Inst& i) {
  half_binary<F, N, kFtz, kSat>(w, i, [](float a, float b) __attribute__((always_inline)) {
    if constexpr (F::kOne == Bf16::kOne)
      return narrow_to_odd(static_cast<double>(a) * static_cast<double>(b));  // f32 could underflow
    else
      return a * b;
  });
}

template <class F, int N, bool kFtz, bool kSat, bool kRelu>
void fma(Warp& w, const Inst& i) {
  alignas(64) float a[N], b[N], c[N];
  alignas(64) uint16_t t[N];
  F::template load<N>(reg<uint16_t>(w, i.r[1]), a);
  F::template load<N>(reg<uint16_t>(w, i.r[2]), b);
  F::template load<N>(reg<uint16_t>(w, i.r[3]), c);
#pragma GCC ivdep
  for (int k = 0; k < N; ++k) {
    const float x = flush_half<kFtz, F>(a[k]), y = flush_half<kFtz, F>(b[k]), z = flush_half<kFtz, F>(c[k]);
    float r;
    if constexpr (F::kOne == Bf16::kOne) {
      r = narrow_to_odd(add_to_odd(static_cast<double>(x) * static_cast<double>(y), static_cast<double>(z)));
    } else {
      r = add_to_odd(x * y, z);
    }
    if (kRelu) r = r > 0.0f ? r : r != r ? r : 0.0f;
    a[k] = saturate<kSat>(r);
  }
  F::template store<N>(a, t);
  if (kFtz)
    for (int k = 0; k < N; ++k) t[k] = (t[k] & F::kInfinity) == 0 ? t[k] & 0x8000u : t[k];
  blend_half<N>(w, i.r[0], t);
}

// Minimum and maximum on the bits: sign-magnitude order as integers.
template <class F, int N, bool kMax, bool kNan>
void extreme(Warp& w, const Inst& i) {
  const uint16_t *a = reg<uint16_t>(w, i.r[1]), *b = reg<uint16_t>(w, i.r[2]);
  alignas(64) uint16_t t[N];
#pragma GCC ivdep
  for (int k = 0; k < N; ++k) {
    const int16_t x = static_cast<int16_t>(a[k]), y = static_cast<int16_t>(b[k]);
    const int16_t ox = static_cast<int16_t>(x < 0 ? x ^ 0x7fff : x),
                  oy = static_cast<int16_t>(y < 0 ? y ^ 0x7fff : y);
    const uint16_t r = (ox < oy) != kMax ? a[k] : b[k];
    const bool x_nan = (a[k] & 0x7fff) > F::kInfinity, y_nan = (b[k] & 0x7fff) > F::kInfinity;
    const uint16_t number = x_nan ? (y_nan ? uint16_t(0x7fff) : b[k]) : y_nan ? a[k] : r;
    t[k] = kNan && (x_nan || y_nan) ? uint16_t(0x7fff) : number;
  }
  blend_half<N>(w, i.r[0], t);
}
template <class F, int N, int kOp>  // 0 abs, 1 neg
void sign(Warp& w, const Inst& i) {
  const uint16_t* a = reg<uint16_t>(w, i.r[1]);
  alignas(64) uint16_t t[N];
  for (int k = 0; k < N; ++k) t[k] = static_cast<uint16_t>(kOp == 0 ? a[k] & 0x7fffu : a[k] ^ 0x8000u);
  blend_half<N>(w, i.r[0], t);
}
template <class F, int N, int kOp>  // 0 ex2, 1 tanh
void approximate(Warp& w, const Inst& i) {
  alignas(64) float a[N];
  alignas(64) uint16_t t[N];
  F::template load<N>(reg<uint16_t>(w, i.r[1]), a);
  for (int k = 0; k < N; ++k) a[k] = kOp == 0 ? ::exp2f(a[k]) : ::tanhf(a[k]);
  F::template store<N>(a, t);
  blend_half<N>(w, i.r[0], t);
}

template <class F, int N, class Op>
PTXSIM_INLINE void compare(Warp& w, const Inst& i, Op op) {
  alignas(64) float a[N], b[N];
  F::template load<N>(reg<uint16_t>(w, i.r[1]), a);
  F::template load<N>(reg<uint16_t>(w, i.r[2]), b);
  uint32_t low = 0, high = 0;
  for (int l = 0; l < kLanes; ++l) {
    constexpr int step = N / 32;
    low |= static_cast<uint32_t>(op(a[l * step], b[l * step])) << l;
    if (N == 64) high |= static_cast<uint32_t>(op(a[l * step + step - 1], b[l * step + step - 1])) << l;
  }
  uint32_t p = low, q = N == 64 ? high : ~low;
  if ((i.aux & 255) != 0) {
    const uint32_t c = w.pred[i.r[4]] ^ (i.aux & 256 ? kAllLanes : 0u);
    switch (i.aux & 255) {
      case 1:
        p &= c, q &= c;
        break;
      case 2:
        p |= c, q |= c;
        break;
      default:
        p ^= c, q ^= c;
        break;
    }
  }
  write_predicate(w, i.r[0], p);
  if (i.r[3] != 0xffff) write_predicate(w, i.r[3], q);
}
#define COMPARE(name, expr)                                                                    \
  template <class F, int N>                                                                    \
  void setp_##name(Warp& w, const Inst& i) {                                                   \
    compare<F, N>(w, i, [](float a, float b) __attribute__((always_inline)) { return expr; }); \
  }
COMPARE(eq, a == b)
COMPARE(ne, (a < b) || (a > b))
COMPARE(lt, a < b)
COMPARE(le, a <= b)
COMPARE(gt, a > b)
COMPARE(ge, a >= b)
COMPARE(equ, !((a < b) || (a > b)))
COMPARE(neu, !(a == b))
COMPARE(ltu, !(a >= b))
COMPARE(leu, !(a > b))
COMPARE(gtu, !(a <= b))
COMPARE(geu, !(a < b))
COMPARE(num, a == a && b == b)
COMPARE(nan, !(a == a && b == b))

#define ARITHMETIC(op, fn, type, F, N)                                             \
  {op "." type, fn<F, N, false, false>}, {op ".ftz." type, fn<F, N, true, false>}, \
      {op ".sat." type, fn<F, N, false, true>}, {op ".ftz.sat." type, fn<F, N, true, true>},
#define ALL_COMPARE(type, F, N)                                                                             \
  {"setp.eq." type, setp_eq<F, N>}, {"setp.ne." type, setp_ne<F, N>}, {"setp.lt." type, setp_lt<F, N>},     \
      {"setp.le." type, setp_le<F, N>}, {"setp.gt." type, setp_gt<F, N>}, {"setp.ge." type, setp_ge<F, N>}, \
      {"setp.equ." type, setp_equ<F, N>}, {"setp.neu." type, setp_neu<F, N>},                               \
      {"setp.ltu." type, setp_ltu<F, N>}, {"setp.leu." type, setp_leu<F, N>},                               \
      {"setp.gtu." type, setp_gtu<F, N>}, {"setp.geu." type, setp_geu<F, N>},                               \
      {"setp.num." type, setp_num<F, N>}, {"setp.nan." type, setp_nan<F, N>},
#define FORMAT_ENTRIES(type, F, N)                                                                        \
  ARITHMETIC("add", add, type, F, N)                                                                      \
  ARITHMETIC("sub", sub, type, F, N)                                                                      \
  ARITHMETIC("mul", mul, type, F, N){"fma." type, fma<F, N, false, false, false>},                        \
      {"fma.ftz." type, fma<F, N, true, false, false>}, {"fma.sat." type, fma<F, N, false, true, false>}, \
      {"fma.ftz.sat." type, fma<F, N, true, true, false>},                                                \
      {"fma.relu." type, fma<F, N, false, false, true>},                                                  \
      {"fma.ftz.relu." type, fma<F, N, true, false, true>}, {"min." type, extreme<F, N, false, false>},   \
      {"max." type, extreme<F, N, true, false>}, {"min.NaN." type, extreme<F, N, false, true>},           \
      {"max.NaN." type, extreme<F, N, true, true>}, {"abs." type, sign<F, N, 0>},                         \
      {"neg." type, sign<F, N, 1>}, {"ex2.approx." type, approximate<F, N, 0>},                           \
      {"tanh.approx." type, approximate<F, N, 1>}, ALL_COMPARE(type, F, N)

const HandlerEntry kEntries[] = {
    FORMAT_ENTRIES("f16", F16, 32) FORMAT_ENTRIES("f16x2", F16, 64) FORMAT_ENTRIES("bf16", Bf16, 32)
        FORMAT_ENTRIES("bf16x2", Bf16, 64){"ex2.approx.ftz.bf16", approximate<Bf16, 32, 0>},
    {"ex2.approx.ftz.bf16x2", approximate<Bf16, 64, 0>}};

}  // namespace

extern const HandlerTable half_handlers;
const HandlerTable half_handlers = {kEntries, sizeof(kEntries) / sizeof(kEntries[0])};

}  // namespace ptxsim::PTXSIM_ISA
