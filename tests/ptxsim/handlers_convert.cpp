// SPDX-License-Identifier: Apache-2.0
// Conversions that involve floating point. aux: 0-3 rounding (nearest, zero, down, up), 4 flush subnormals, 8
// saturate, 16 relu, 32 round to an integral value, 64 satfinite, 128 nearest with ties away from zero
// (tf32).
#include <cmath>

#include "half.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

template <class F>
PTXSIM_INLINE void rounded(uint32_t aux, F f) {  // f() with the CPU's rounding mode set from aux
  static constexpr unsigned modes[4] = {0, 0x6000, 0x2000, 0x4000};
  const unsigned saved = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr((saved & ~0x6000u) | modes[aux & 3]);
  f();
  __builtin_ia32_ldmxcsr(saved);
}
template <class T>
PTXSIM_INLINE T pinned(T x) {  // not moved across changes of the rounding mode
  asm volatile("" : "+x"(x));
  return x;
}
PTXSIM_INLINE float flush(float x, uint32_t aux) {
  return (aux & 4) && __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.0f, x) : x;
}
PTXSIM_INLINE float finish(float x, uint32_t aux) {
  if (aux & 8) x = x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
  if (aux & 16) x = x > 0.0f ? x : x != x ? x : 0.0f;
  return x;
}

template <class F>
void f32_from_half(Warp& w, const Inst& i) {
  alignas(64) float t[kLanes];
  F::template load<kLanes>(reg<uint16_t>(w, i.r[1]), t);
  if (i.aux != 0)
    for (float& x : t) x = finish(x, i.aux);
  if (w.mask == kAllLanes)
    __builtin_memcpy(reg<float>(w, i.r[0]), t, sizeof(t));
  else
    blend(reg<float>(w, i.r[0]), t, w.mask);
}

// Rounding toward zero from the value rounded to nearest: one step back if that went too far.
template <class F>
PTXSIM_INLINE uint16_t toward_zero(float x, uint16_t nearest) {
  float back;
  alignas(32) uint16_t in[8] = {nearest};
  alignas(32) float out[8];
  F::template load<8>(in, out);
  back = out[0];
  return __builtin_fabsf(back) > __builtin_fabsf(x) ? static_cast<uint16_t>(nearest - 1) : nearest;
}
template <class F>
PTXSIM_INLINE void to_half(const float* in, uint16_t* out, uint32_t aux) {  // 32 values
  alignas(64) float t[kLanes];
  if ((aux & ~3u) != 0) {
    for (int l = 0; l < kLanes; ++l) t[l] = finish(flush(in[l], aux), aux);
    in = t;
  }
  F::template store<kLanes>(in, out);
  if ((aux & 3) == 1)
    for (int l = 0; l < kLanes; ++l) out[l] = toward_zero<F>(in[l], out[l]);
  if (aux & 64)
    for (int l = 0; l < kLanes; ++l)
      if ((out[l] & 0x7fff) == F::kInfinity) out[l] = static_cast<uint16_t>(out[l] - 1);
}
template <class F>
void half_from_f32(Warp& w, const Inst& i) {
  alignas(64) uint16_t t[kLanes];
  to_half<F>(reg<float>(w, i.r[1]), t, i.aux);
  blend(reg<uint16_t>(w, i.r[0]), t, w.mask);
}
template <class F>
void pair_from_f32(Warp& w, const Inst& i) {  // the first source becomes the upper half
  alignas(64) uint16_t high[kLanes], low[kLanes];
  to_half<F>(reg<float>(w, i.r[1]), high, i.aux);
  to_half<F>(reg<float>(w, i.r[2]), low, i.aux);
  write_lanes(w, reg<uint32_t>(w, i.r[0]), [&](int l) __attribute__((always_inline)) {
    return static_cast<uint32_t>(low[l]) | static_cast<uint32_t>(high[l]) << 16;
  });
}

void tf32_from_f32(Warp& w, const Inst& i) {  // 10 mantissa bits
  const uint32_t mode = i.aux;
  unary<uint32_t, uint32_t>(w, i, [=](uint32_t b) __attribute__((always_inline)) {
    const uint32_t away = (b + 0x1000u) & ~0x1fffu, even = (b + 0xfffu + ((b >> 13) & 1u)) & ~0x1fffu,
                   zero = b & ~0x1fffu;
    const uint32_t r = mode & 128 ? away : (mode & 3) == 1 ? zero : even;
    const bool special = (b & 0x7f800000u) == 0x7f800000u;
    return special ? ((b & 0x7fffffu) ? 0x7fffffffu : b) : r;
  });
}

// ---- the general forms: any source as a double, or an exact 64-bit integer, then to the result
template <class T>
PTXSIM_INLINE double as_double(const uint8_t* at, int lane) {
  if constexpr (std::is_same_v<T, F16>)
    return static_cast<double>(from_f16(reinterpret_cast<const uint16_t*>(at)[lane]));
  else if constexpr (std::is_same_v<T, Bf16>)
    return static_cast<double>(from_bf16(reinterpret_cast<const uint16_t*>(at)[lane]));
  else
    return static_cast<double>(reinterpret_cast<const T*>(at)[lane]);
}

PTXSIM_INLINE double integral(double x, uint32_t aux) {
  switch (aux & 3) {
    case 0:
      return ::nearbyint(x);
    case 1:
      return ::trunc(x);
    case 2:
      return ::floor(x);
    default:
      return ::ceil(x);
  }
}
template <class To, class From>
void integer_from_float(Warp& w, const Inst& i) {  // saturating; NaN gives 0
  const uint8_t* a = reg<uint8_t>(w, i.r[1]);
  using Register = std::conditional_t<sizeof(To) == 1, uint16_t, To>;
  alignas(64) Register t[kLanes];
  constexpr bool is_signed = std::is_signed_v<To>;
  constexpr double high = sizeof(To) == 8 ? (is_signed ? 9223372036854775808.0 : 18446744073709551616.0)
                                          : static_cast<double>(is_signed ? (1ull << (8 * sizeof(To) - 1))
                                                                          : (1ull << (8 * (sizeof(To) & 7))));
  constexpr double low = is_signed ? -high : 0.0;
  for (int l = 0; l < kLanes; ++l) {
    double x = as_double<From>(a, l);
    if ((i.aux & 4) && __builtin_fabs(x) < 1.1754943508222875e-38) x = 0.0;
    x = integral(x, i.aux);
    To v;
    if (x != x)
      v = 0;
    else if (x >= high)
      v = static_cast<To>(
          is_signed ? static_cast<To>(~static_cast<To>(static_cast<uint64_t>(1) << (8 * sizeof(To) - 1)))
                    : static_cast<To>(~0ull));
    else if (x < low)
      v = static_cast<To>(is_signed ? static_cast<uint64_t>(1) << (8 * sizeof(To) - 1) : 0);
    else
      v = static_cast<To>(x);
    t[l] = static_cast<Register>(v);
  }
  blend(reg<Register>(w, i.r[0]), t, w.mask);
}
void s32_from_f32(Warp& w, const Inst& i) {
  if ((i.aux & 3) != 1) return integer_from_float<int32_t, float>(w, i);
  unary<int32_t, float>(w, i, [](float x) __attribute__((always_inline)) {
    const float c = x < 2147483648.0f ? x : 0.0f;  // in range, so that the conversion is defined
    const int32_t v = static_cast<int32_t>(c >= -2147483648.0f ? c : 0.0f);
    return x >= 2147483648.0f ? INT32_MAX : x < -2147483648.0f ? INT32_MIN : v;
  });
}

template <class To>
PTXSIM_INLINE uint16_t from_double_odd(double x, uint32_t aux) {  // x exact, or rounded to odd
  const float f = finish(narrow_to_odd(x), aux);
  const uint16_t h = std::is_same_v<To, F16> ? to_f16(f) : to_bf16(f);
  return (aux & 3) == 1 ? toward_zero<To>(f, h) : h;
}
// A 64-bit integer as a double rounded to odd.
template <class From>
PTXSIM_INLINE double odd_double(From v) {
  const bool negative = v < 0;
  const uint64_t m = negative ? 0 - static_cast<uint64_t>(v) : static_cast<uint64_t>(v);
  const double d = m < (1ull << 53) ? static_cast<double>(m)
                                    : static_cast<double>((m >> 11) | ((m & 0x7ff) != 0)) * 2048.0;
  return negative ? -d : d;
}
template <class To, class From>
void half_from_integer(Warp& w, const Inst& i) {
  const From* a = reg<From>(w, i.r[1]);
  alignas(64) uint16_t t[kLanes];
  for (int l = 0; l < kLanes; ++l) t[l] = from_double_odd<To>(odd_double(a[l]), i.aux);
  blend(reg<uint16_t>(w, i.r[0]), t, w.mask);
}
template <class To>
void half_from_f64(Warp& w, const Inst& i) {
  const double* a = reg<double>(w, i.r[1]);
  alignas(64) uint16_t t[kLanes];
  for (int l = 0; l < kLanes; ++l) t[l] = from_double_odd<To>(a[l], i.aux);
  blend(reg<uint16_t>(w, i.r[0]), t, w.mask);
}
template <class To, class From>
void float_from_integer(Warp& w, const Inst& i) {
  if ((i.aux & 3) == 0 && (i.aux & 8) == 0)
    return unary<To, From>(w, i, [](From a) __attribute__((always_inline)) { return static_cast<To>(a); });
  const From* a = reg<From>(w, i.r[1]);
  alignas(64) To t[kLanes];
  rounded(i.aux, [&] {
    for (int l = 0; l < kLanes; ++l) {
      From v = a[l];
      asm volatile("" : "+r"(v));
      t[l] = pinned(static_cast<To>(v));
    }
  });
  if (i.aux & 8)
    for (To& x : t) x = x > 0 ? (x < 1 ? x : 1) : 0;
  blend(reg<To>(w, i.r[0]), t, w.mask);
}
template <class From>
void f64_from(Warp& w, const Inst& i) {
  const uint8_t* a = reg<uint8_t>(w, i.r[1]);
  alignas(64) double t[kLanes];
  for (int l = 0; l < kLanes; ++l) t[l] = as_double<From>(a, l);
  if (i.aux & 8)
    for (double& x : t) x = x > 0 ? (x < 1 ? x : 1) : 0;
  blend(reg<double>(w, i.r[0]), t, w.mask);
}
void f32_from_f64(Warp& w, const Inst& i) {
  const double* a = reg<double>(w, i.r[1]);
  alignas(64) float t[kLanes];
  rounded(i.aux, [&] {
    for (int l = 0; l < kLanes; ++l) t[l] = pinned(static_cast<float>(pinned(a[l])));
  });
  for (float& x : t) x = flush(finish(x, i.aux), i.aux);
  blend(reg<float>(w, i.r[0]), t, w.mask);
}
template <class T>
void same(Warp& w, const Inst& i) {  // rounding to an integral value, saturation
  unary<T, T>(w, i, [&](T x) {
    if constexpr (sizeof(T) == 4) x = flush(x, i.aux);
    if (i.aux & 32) x = static_cast<T>(integral(static_cast<double>(x), i.aux));
    if (i.aux & 8) x = x > 0 ? (x < 1 ? x : 1) : 0;
    return x;
  });
}
template <class F>
void same_half(Warp& w, const Inst& i) {
  const uint8_t* a = reg<uint8_t>(w, i.r[1]);
  alignas(64) uint16_t t[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    double x = as_double<F>(a, l);
    if (i.aux & 32) x = integral(x, i.aux);
    t[l] = from_double_odd<F>(x, i.aux & ~3u);
  }
  blend(reg<uint16_t>(w, i.r[0]), t, w.mask);
}
template <class To, class From>
void half_to_half(Warp& w, const Inst& i) {
  const uint8_t* a = reg<uint8_t>(w, i.r[1]);
  alignas(64) uint16_t t[kLanes];
  for (int l = 0; l < kLanes; ++l) t[l] = from_double_odd<To>(as_double<From>(a, l), i.aux);
  blend(reg<uint16_t>(w, i.r[0]), t, w.mask);
}

// ---- fp8. e4m3 has no infinity (largest 448), e5m2 is the upper byte of an f16.
PTXSIM_INLINE uint8_t to_fp8(float x, int mantissa_bits) {  // satfinite, to nearest even
  const int bias = mantissa_bits == 3 ? 7 : 15;
  const float largest = mantissa_bits == 3 ? 448.0f : 57344.0f;
  const uint8_t sign = static_cast<uint8_t>((bits_as<uint32_t>(x) >> 24) & 0x80u);
  if (x != x) return 0x7f;
  const float m = __builtin_fabsf(x);
  if (m >= largest) return static_cast<uint8_t>(sign | (mantissa_bits == 3 ? 0x7e : 0x7b));
  int exponent = static_cast<int>(bits_as<uint32_t>(m) >> 23) - 127;
  if (exponent < 1 - bias) exponent = 1 - bias;
  const double quantum = ::ldexp(1.0, exponent - mantissa_bits);
  const int code = static_cast<int>(
      ::nearbyint(static_cast<double>(m) / quantum));  // may carry into the exponent, as it should
  const int base = (exponent - (1 - bias)) << mantissa_bits;
  return static_cast<uint8_t>(sign | (base + code));
}
PTXSIM_INLINE float from_fp8(uint8_t b, int mantissa_bits) {
  const int bias = mantissa_bits == 3 ? 7 : 15, m = b & ((1 << mantissa_bits) - 1),
            e = (b & 0x7f) >> mantissa_bits;
  if (mantissa_bits == 3 ? (b & 0x7f) == 0x7f : e == 31 && m != 0) return bits_as<float>(0x7fffffffu);
  float v;
  if (mantissa_bits == 2 && e == 31)
    v = __builtin_inff();
  else if (e == 0)
    v = static_cast<float>(::ldexp(m, 1 - bias - mantissa_bits));
  else
    v = static_cast<float>(::ldexp(m + (1 << mantissa_bits), e - bias - mantissa_bits));
  return b & 0x80 ? -v : v;
}
template <int kMantissa>
void fp8_pair_from_f32(Warp& w, const Inst& i) {
  binary<uint16_t, float, float>(w, i, [&](float a, float b) {
    return static_cast<uint16_t>(to_fp8(finish(a, i.aux), kMantissa) << 8 |
                                 to_fp8(finish(b, i.aux), kMantissa));
  });
}
template <int kMantissa>
void fp8_pair_from_f16x2(Warp& w, const Inst& i) {
  unary<uint16_t, uint32_t>(w, i, [&](uint32_t a) {
    const float low = from_f16(static_cast<uint16_t>(a)), high = from_f16(static_cast<uint16_t>(a >> 16));
    return static_cast<uint16_t>(to_fp8(finish(high, i.aux), kMantissa) << 8 |
                                 to_fp8(finish(low, i.aux), kMantissa));
  });
}
template <int kMantissa>
void f16x2_from_fp8(Warp& w, const Inst& i) {
  unary<uint32_t, uint16_t>(w, i, [&](uint16_t a) {
    return static_cast<uint32_t>(to_f16(finish(from_fp8(static_cast<uint8_t>(a), kMantissa), i.aux))) |
           static_cast<uint32_t>(to_f16(finish(from_fp8(static_cast<uint8_t>(a >> 8), kMantissa), i.aux)))
               << 16;
  });
}

#define TO_INTEGER(name, To)                                                                              \
  {"cvt." name ".f16", integer_from_float<To, F16>}, {"cvt." name ".bf16", integer_from_float<To, Bf16>}, \
      {"cvt." name ".f64", integer_from_float<To, double>},
#define FROM_INTEGER(name, From)                                                                      \
  {"cvt.f16." name, half_from_integer<F16, From>}, {"cvt.bf16." name, half_from_integer<Bf16, From>}, \
      {"cvt.f32." name, float_from_integer<float, From>},                                             \
      {"cvt.f64." name, float_from_integer<double, From>},
#define TO_INTEGER_F32(name, To) {"cvt." name ".f32", integer_from_float<To, float>},

const HandlerEntry kEntries[] = {
    {"cvt.f32.f16", f32_from_half<F16>},
    {"cvt.f32.bf16", f32_from_half<Bf16>},
    {"cvt.f16.f32", half_from_f32<F16>},
    {"cvt.bf16.f32", half_from_f32<Bf16>},
    {"cvt.pair.f16x2", pair_from_f32<F16>},
    {"cvt.pair.bf16x2", pair_from_f32<Bf16>},
    {"cvt.tf32.f32", tf32_from_f32},
    {"cvt.s32.f32", s32_from_f32},
    {"cvt.f64.f32", f64_from<float>},
    {"cvt.f64.f16", f64_from<F16>},
    {"cvt.f64.bf16", f64_from<Bf16>},
    {"cvt.f32.f64", f32_from_f64},
    {"cvt.f16.f64", half_from_f64<F16>},
    {"cvt.bf16.f64", half_from_f64<Bf16>},
    {"cvt.f16.bf16", half_to_half<F16, Bf16>},
    {"cvt.bf16.f16", half_to_half<Bf16, F16>},
    {"cvt.same.f32", same<float>},
    {"cvt.same.f64", same<double>},
    {"cvt.same.f16", same_half<F16>},
    {"cvt.same.bf16", same_half<Bf16>},
    {"cvt.pair.e4m3x2", fp8_pair_from_f32<3>},
    {"cvt.pair.e5m2x2", fp8_pair_from_f32<2>},
    {"cvt.e4m3x2.f16x2", fp8_pair_from_f16x2<3>},
    {"cvt.e5m2x2.f16x2", fp8_pair_from_f16x2<2>},
    {"cvt.f16x2.e4m3x2", f16x2_from_fp8<3>},
    {"cvt.f16x2.e5m2x2", f16x2_from_fp8<2>},
    TO_INTEGER("s8", int8_t) TO_INTEGER("u8", uint8_t) TO_INTEGER("s16", int16_t) TO_INTEGER("u16", uint16_t)
        TO_INTEGER("s32", int32_t) TO_INTEGER("u32", uint32_t) TO_INTEGER("s64", int64_t) TO_INTEGER(
            "u64", uint64_t) TO_INTEGER_F32("s8", int8_t) TO_INTEGER_F32("u8", uint8_t)
            TO_INTEGER_F32("s16", int16_t) TO_INTEGER_F32("u16", uint16_t) TO_INTEGER_F32("u32", uint32_t)
                TO_INTEGER_F32("s64", int64_t) TO_INTEGER_F32("u64", uint64_t) FROM_INTEGER("s32", int32_t)
                    FROM_INTEGER("u32", uint32_t) FROM_INTEGER("s64", int64_t) FROM_INTEGER("u64", uint64_t)};

}  // namespace

extern const HandlerTable convert_handlers;
const HandlerTable convert_handlers = {kEntries, sizeof(kEntries) / sizeof(kEntries[0])};

}  // namespace ptxsim::PTXSIM_ISA
