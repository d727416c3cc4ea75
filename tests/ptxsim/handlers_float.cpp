// SPDX-License-Identifier: Apache-2.0
// f32 and f64 arithmetic. Everything PTX defines as correctly rounded is; the .approx functions have at least
// the accuracy PTX asks for, but not the bits of any hardware.
#include <cmath>

#include <xmmintrin.h>

#include "lanes.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

PTXSIM_INLINE float flush(float x) {  // subnormals become zero of the same sign
  const uint32_t b = bits_as<uint32_t>(x);
  return bits_as<float>((b & 0x7f800000u) == 0 ? b & 0x80000000u : b);
}
template <bool kFtz>
PTXSIM_INLINE float in(float x) {
  return kFtz ? flush(x) : x;
}
template <bool kFtz, bool kSat>
PTXSIM_INLINE float out(float x) {
  if (kSat) x = x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;  // NaN becomes +0
  return kFtz ? flush(x) : x;
}

// ---- round to nearest, vectorised
#define F2(name, expr)                                                                      \
  template <bool kFtz, bool kSat>                                                           \
  void name(Warp& w, const Inst& i) {                                                       \
    binary<float, float, float>(w, i, [](float a, float b) __attribute__((always_inline)) { \
      a = in<kFtz>(a), b = in<kFtz>(b);                                                     \
      return out<kFtz, kSat>(expr);                                                         \
    });                                                                                     \
  }
F2(add, a + b)
F2(sub, a - b)
F2(mul, a* b)
F2(div, a / b)
template <bool kFtz, bool kSat>
void fma(Warp& w, const Inst& i) {
  ternary<float, float, float, float>(w, i, [](float a, float b, float c) __attribute__((always_inline)) {
    return out<kFtz, kSat>(__builtin_fmaf(in<kFtz>(a), in<kFtz>(b), in<kFtz>(c)));
  });
}
#define D2(name, expr)                                                             \
  void name(Warp& w, const Inst& i) {                                              \
    binary<double, double, double>(w, i, [](double a, double b) { return expr; }); \
  }
D2(add_f64, a + b)
D2(sub_f64, a - b)
D2(mul_f64, a* b)
D2(div_f64, a / b)
void fma_f64(Warp& w, const Inst& i) {
  ternary<double, double, double, double>(
      w, i, [](double a, double b, double c) { return __builtin_fma(a, b, c); });
}

// ---- the other rounding directions, one lane at a time with the rounding mode of the CPU changed
enum Rounding : unsigned { kNearest = 0, kDown = 0x2000, kUp = 0x4000, kZero = 0x6000 };

template <class T, unsigned kMode, int kSources, class F>
PTXSIM_INLINE void directed(Warp& w, const Inst& i, F f) {
  alignas(64) T t[kLanes];
  const T *a = reg<T>(w, i.r[1]), *b = reg<T>(w, kSources > 1 ? i.r[2] : i.r[1]),
          *c = reg<T>(w, kSources > 2 ? i.r[3] : i.r[1]);
  const unsigned saved = _mm_getcsr();
  _mm_setcsr((saved & ~0x6000u) | kMode);
  for (int l = 0; l < kLanes; ++l) {
    T x = a[l], y = b[l], z = c[l];
    asm volatile(""
                 : "+x"(x), "+x"(y),
                   "+x"(z));  // neither moved out of the changed mode nor evaluated at compile time
    T r = f(x, y, z);
    asm volatile("" : "+x"(r));
    t[l] = r;
  }
  _mm_setcsr(saved);
  blend(reg<T>(w, i.r[0]), t, w.mask);
}
#define DIRECTED(name, kSources, expr)                                                             \
  template <class T, unsigned kMode, bool kFtz, bool kSat>                                         \
  void name(Warp& w, const Inst& i) {                                                              \
    directed<T, kMode, kSources>(                                                                  \
        w, i, [](T a, [[maybe_unused]] T b, [[maybe_unused]] T c) __attribute__((always_inline)) { \
          if constexpr (sizeof(T) == 4) {                                                          \
            a = in<kFtz>(a), b = in<kFtz>(b), c = in<kFtz>(c);                                     \
            return out<kFtz, kSat>(expr);                                                          \
          } else {                                                                                 \
            return static_cast<T>(expr);                                                           \
          }                                                                                        \
        });                                                                                        \
  }
PTXSIM_INLINE float fused(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
PTXSIM_INLINE double fused(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}
PTXSIM_INLINE float root(float a) {
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(a)));
}
PTXSIM_INLINE double root(double a) {
  return _mm_cvtsd_f64(_mm_sqrt_sd(_mm_set_sd(a), _mm_set_sd(a)));
}
DIRECTED(add_r, 2, a + b)
DIRECTED(sub_r, 2, a - b)
DIRECTED(mul_r, 2, a* b)
DIRECTED(div_r, 2, a / b)
DIRECTED(fma_r, 3, fused(a, b, c))
DIRECTED(sqrt_r, 1, root(a))
DIRECTED(rcp_r, 1, T(1) / a)

// ---- minimum and maximum: the operand that is a number, or with .NaN a NaN if there is one; -0 is below +0
template <class T, bool kMax, bool kNan, bool kFtz>
void extreme(Warp& w, const Inst& i) {
  binary<T, T, T>(w, i, [](T a, T b) __attribute__((always_inline)) {
    if constexpr (sizeof(T) == 4) a = in<kFtz>(a), b = in<kFtz>(b);
    using U = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    const U ab = bits_as<U>(a), bb = bits_as<U>(b);
    const T equal = bits_as<T>(kMax ? ab & bb : ab | bb);  // for a == b only the sign of zero can differ
    T r = a < b ? (kMax ? b : a) : b < a ? (kMax ? a : b) : equal;
    constexpr U quiet = sizeof(T) == 4 ? static_cast<U>(0x7fffffffu) : static_cast<U>(0x7fffffffffffffffull);
    const bool a_nan = a != a, b_nan = b != b;
    if (kNan)
      r = a_nan || b_nan ? bits_as<T>(quiet) : r;
    else
      r = a_nan ? (b_nan ? bits_as<T>(quiet) : b) : b_nan ? a : r;
    return r;
  });
}
template <class T, bool kFtz>
void absolute(Warp& w, const Inst& i) {
  unary<T, T>(w, i, [](T a) __attribute__((always_inline)) {
    if constexpr (sizeof(T) == 4) a = in<kFtz>(a);
    return sizeof(T) == 4 ? static_cast<T>(__builtin_fabsf(static_cast<float>(a)))
                          : static_cast<T>(__builtin_fabs(static_cast<double>(a)));
  });
}
template <class T, bool kFtz>
void negate(Warp& w, const Inst& i) {
  unary<T, T>(w, i, [](T a) __attribute__((always_inline)) {
    if constexpr (sizeof(T) == 4) a = in<kFtz>(a);
    return -a;
  });
}
template <class T>
void copysign(Warp& w, const Inst& i) {  // copysign d, a, b: sign of a, magnitude of b
  using U = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr U sign = static_cast<U>(1) << (8 * sizeof(T) - 1);
  binary<U, U, U>(w, i, [](U a, U b) __attribute__((always_inline)) { return (a & sign) | (b & ~sign); });
}

// ---- approximations
// 2^x = 2^n * 2^f with |f| <= 1/2; the polynomial is a Taylor series in f ln 2 (relative error 2e-8 before
// rounding). The scale is applied in two halves so that subnormal results come out right.
PTXSIM_INLINE float exp2_lane(float x) {
  float c = x < 129.0f ? x : 129.0f;
  c = c > -152.0f ? c : -152.0f;  // a NaN goes on as -152 and is put back below
  const float rounded = c + 12582912.0f;
  const int n = bits_as<int32_t>(rounded) - 0x4b400000;
  const float f = c - (rounded - 12582912.0f);
  float p = 1.5252733804e-5f;
  p = __builtin_fmaf(p, f, 1.5403530394e-4f);
  p = __builtin_fmaf(p, f, 1.3333558147e-3f);
  p = __builtin_fmaf(p, f, 9.6181291076e-3f);
  p = __builtin_fmaf(p, f, 5.5504108665e-2f);
  p = __builtin_fmaf(p, f, 2.4022650696e-1f);
  p = __builtin_fmaf(p, f, 6.9314718056e-1f);
  p = __builtin_fmaf(p, f, 1.0f);
  const int half = n >> 1;
  const float s1 = bits_as<float>((half + 127) << 23), s2 = bits_as<float>((n - half + 127) << 23);
  const float r = p * s1 * s2;
  return x == x ? r : bits_as<float>(0x7fffffffu);
}
template <bool kFtz>
void ex2(Warp& w, const Inst& i) {
  unary<float, float>(
      w, i, [](float a) __attribute__((always_inline)) { return out<kFtz, false>(exp2_lane(in<kFtz>(a))); });
}
template <bool kFtz, class F>
PTXSIM_INLINE void by_library(Warp& w, const Inst& i, F f) {
  alignas(64) float t[kLanes];
  const float* a = reg<float>(w, i.r[1]);
  for (int l = 0; l < kLanes; ++l) t[l] = (w.mask >> l) & 1 ? out<kFtz, false>(f(in<kFtz>(a[l]))) : 0.0f;
  blend(reg<float>(w, i.r[0]), t, w.mask);
}
template <bool kFtz>
void lg2(Warp& w, const Inst& i) {
  by_library<kFtz>(w, i, [](float a) { return ::log2f(a); });
}
template <bool kFtz>
void sine(Warp& w, const Inst& i) {
  by_library<kFtz>(w, i, [](float a) { return ::sinf(a); });
}
template <bool kFtz>
void cosine(Warp& w, const Inst& i) {
  by_library<kFtz>(w, i, [](float a) { return ::cosf(a); });
}
template <bool kFtz>
void hyperbolic_tangent(Warp& w, const Inst& i) {
  by_library<kFtz>(w, i, [](float a) { return ::tanhf(a); });
}
template <bool kFtz>
void reciprocal(Warp& w, const Inst& i) {
  unary<float, float>(
      w, i, [](float a) __attribute__((always_inline)) { return out<kFtz, false>(1.0f / in<kFtz>(a)); });
}
template <bool kFtz>
void square_root(Warp& w, const Inst& i) {
  unary<float, float>(
      w, i, [](float a) __attribute__((always_inline)) { return out<kFtz, false>(root(in<kFtz>(a))); });
}
template <bool kFtz>
void reciprocal_root(Warp& w, const Inst& i) {  // in double, so that the result is within one unit
  unary<float, float>(w, i, [](float a) __attribute__((always_inline)) {
    const float x = in<kFtz>(a);
    return out<kFtz, false>(static_cast<float>(1.0 / root(static_cast<double>(x))));
  });
}
template <bool kFtz>
void divide_approx(Warp& w, const Inst& i) {  // for 2^126 < |b| < 2^128 PTX gives 0, or NaN for an infinite a
  binary<float, float, float>(w, i, [](float a, float b) __attribute__((always_inline)) {
    a = in<kFtz>(a), b = in<kFtz>(b);
    const bool huge = __builtin_fabsf(b) > 8.507059173023462e37f && __builtin_fabsf(b) < __builtin_inff();
    return out<kFtz, false>(huge ? a * 0.0f : a / b);
  });
}
void rcp_approx_f64(Warp& w, const Inst& i) {  // ftz; the hardware gives about 20 bits, here all of them
  unary<double, double>(w, i, [](double a) { return 1.0 / a; });
}
void rsqrt_approx_f64(Warp& w, const Inst& i) {
  unary<double, double>(w, i, [](double a) __attribute__((always_inline)) { return 1.0 / root(a); });
}

// ---- comparisons: the plain ones are false for NaN, those with u are true
template <class T, bool kFtz, class F>
PTXSIM_INLINE void compare(Warp& w, const Inst& i, F f) {
  const T *a = reg<T>(w, i.r[1]), *b = reg<T>(w, i.r[2]);
  alignas(64) int32_t t[kLanes];
#pragma GCC ivdep
  for (int l = 0; l < kLanes; ++l) {
    T x = a[l], y = b[l];
    if constexpr (sizeof(T) == 4) x = in<kFtz>(x), y = in<kFtz>(y);
    t[l] = f(x, y) ? -1 : 0;
  }
  uint32_t p = to_mask(t), q = ~p;
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
#define COMPARE(name, expr)                                                               \
  template <class T, bool kFtz>                                                           \
  void setp_##name(Warp& w, const Inst& i) {                                              \
    compare<T, kFtz>(w, i, [](T a, T b) __attribute__((always_inline)) { return expr; }); \
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

template <class T, class F>
PTXSIM_INLINE void test(Warp& w, const Inst& i, F f) {
  const T* a = reg<T>(w, i.r[1]);
  uint32_t m = 0;
  for (int l = 0; l < kLanes; ++l)
    m |= static_cast<uint32_t>(f(__builtin_fpclassify(0, 1, 2, 3, 4, a[l])))
         << l;  // nan inf normal subnormal zero
  write_predicate(w, i.r[0], m);
}
template <class T>
void testp_finite(Warp& w, const Inst& i) {
  test<T>(w, i, [](int c) { return c >= 2; });
}
template <class T>
void testp_infinite(Warp& w, const Inst& i) {
  test<T>(w, i, [](int c) { return c == 1; });
}
template <class T>
void testp_number(Warp& w, const Inst& i) {
  test<T>(w, i, [](int c) { return c != 0; });
}
template <class T>
void testp_notanumber(Warp& w, const Inst& i) {
  test<T>(w, i, [](int c) { return c == 0; });
}
template <class T>
void testp_normal(Warp& w, const Inst& i) {
  test<T>(w, i, [](int c) { return c == 2; });
}
template <class T>
void testp_subnormal(Warp& w, const Inst& i) {
  test<T>(w, i, [](int c) { return c == 3; });
}

#define NEAREST_ENTRIES(op, fn)                                                                      \
  {op ".f32", fn<false, false>}, {op ".ftz.f32", fn<true, false>}, {op ".sat.f32", fn<false, true>}, \
      {op ".ftz.sat.f32", fn<true, true>},
#define DIRECTED_ENTRIES(op, fn)                                                                             \
  {op ".rz.f32", fn<float, kZero, false, false>}, {op ".rm.f32", fn<float, kDown, false, false>},            \
      {op ".rp.f32", fn<float, kUp, false, false>}, {op ".rz.ftz.f32", fn<float, kZero, true, false>},       \
      {op ".rm.ftz.f32", fn<float, kDown, true, false>}, {op ".rp.ftz.f32", fn<float, kUp, true, false>},    \
      {op ".rz.sat.f32", fn<float, kZero, false, true>},                                                     \
      {op ".rz.ftz.sat.f32", fn<float, kZero, true, true>}, {op ".rz.f64", fn<double, kZero, false, false>}, \
      {op ".rm.f64", fn<double, kDown, false, false>}, {op ".rp.f64", fn<double, kUp, false, false>},
#define SQRT_ENTRIES(op, fn)                                                                         \
  {op ".f32", fn<float, kNearest, false, false>}, {op ".ftz.f32", fn<float, kNearest, true, false>}, \
      {op ".f64", fn<double, kNearest, false, false>},
#define EXTREME_ENTRIES(op, kMax)                                                                      \
  {op ".f32", extreme<float, kMax, false, false>}, {op ".ftz.f32", extreme<float, kMax, false, true>}, \
      {op ".NaN.f32", extreme<float, kMax, true, false>},                                              \
      {op ".ftz.NaN.f32", extreme<float, kMax, true, true>},                                           \
      {op ".f64", extreme<double, kMax, false, false>},
#define COMPARE_ENTRIES(name)                                                                              \
  {"setp." #name ".f32", setp_##name<float, false>}, {"setp." #name ".ftz.f32", setp_##name<float, true>}, \
      {"setp." #name ".f64", setp_##name<double, false>},
#define TEST_ENTRIES(name) \
  {"testp." #name ".f32", testp_##name<float>}, {"testp." #name ".f64", testp_##name<double>},
#define APPROX_ENTRIES(op, fn) {op ".approx.f32", fn<false>}, {op ".approx.ftz.f32", fn<true>},

const HandlerEntry kEntries[] = {
    NEAREST_ENTRIES("add", add) NEAREST_ENTRIES("sub", sub) NEAREST_ENTRIES("mul", mul)
        NEAREST_ENTRIES("fma", fma) NEAREST_ENTRIES("div", div) DIRECTED_ENTRIES("add", add_r)
            DIRECTED_ENTRIES("sub", sub_r) DIRECTED_ENTRIES("mul", mul_r) DIRECTED_ENTRIES("div", div_r)
                DIRECTED_ENTRIES("fma", fma_r) DIRECTED_ENTRIES("sqrt", sqrt_r) DIRECTED_ENTRIES("rcp", rcp_r)
                    SQRT_ENTRIES("sqrt", sqrt_r) SQRT_ENTRIES("rcp", rcp_r) EXTREME_ENTRIES("min", false)
                        EXTREME_ENTRIES("max", true){"add.f64", add_f64},
    {"sub.f64", sub_f64},
    {"mul.f64", mul_f64},
    {"div.f64", div_f64},
    {"fma.f64", fma_f64},
    {"abs.f32", absolute<float, false>},
    {"abs.ftz.f32", absolute<float, true>},
    {"abs.f64", absolute<double, false>},
    {"neg.f32", negate<float, false>},
    {"neg.ftz.f32", negate<float, true>},
    {"neg.f64", negate<double, false>},
    {"copysign.f32", copysign<float>},
    {"copysign.f64", copysign<double>},
    APPROX_ENTRIES("ex2", ex2) APPROX_ENTRIES("lg2", lg2) APPROX_ENTRIES("sin", sine)
        APPROX_ENTRIES("cos", cosine) APPROX_ENTRIES("tanh", hyperbolic_tangent)
            APPROX_ENTRIES("rcp", reciprocal) APPROX_ENTRIES("sqrt", square_root)
                APPROX_ENTRIES("rsqrt", reciprocal_root){"div.approx.f32", divide_approx<false>},
    {"div.approx.ftz.f32", divide_approx<true>},
    {"div.full.f32", div<false, false>},
    {"div.full.ftz.f32", div<true, false>},
    {"rcp.approx.ftz.f64", rcp_approx_f64},
    {"rsqrt.approx.f64", rsqrt_approx_f64},
    {"rsqrt.approx.ftz.f64", rsqrt_approx_f64},
    COMPARE_ENTRIES(eq) COMPARE_ENTRIES(ne) COMPARE_ENTRIES(lt) COMPARE_ENTRIES(le) COMPARE_ENTRIES(gt)
        COMPARE_ENTRIES(ge) COMPARE_ENTRIES(equ) COMPARE_ENTRIES(neu) COMPARE_ENTRIES(ltu)
            COMPARE_ENTRIES(leu) COMPARE_ENTRIES(gtu) COMPARE_ENTRIES(geu) COMPARE_ENTRIES(num)
                COMPARE_ENTRIES(nan) TEST_ENTRIES(finite) TEST_ENTRIES(infinite) TEST_ENTRIES(number)
                    TEST_ENTRIES(notanumber) TEST_ENTRIES(normal) TEST_ENTRIES(subnormal)};

}  // namespace

extern const HandlerTable float_handlers;
const HandlerTable float_handlers = {kEntries, sizeof(kEntries) / sizeof(kEntries[0])};

}  // namespace ptxsim::PTXSIM_ISA
