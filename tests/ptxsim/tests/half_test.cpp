// SPDX-License-Identifier: Apache-2.0
// f16 and bf16 against exact arithmetic in 128 bits.
#include <cmath>

#include "ptx_case.h"

using namespace ptxsim_test;

namespace {

using quad = __float128;

struct Format {
  const char* name;
  int mantissa, bias;
  uint32_t infinity;
};
const Format kF16{"f16", 10, 15, 0x7c00}, kBf16{"bf16", 7, 127, 0x7f80};

quad power(int e) {
  quad r = 1;
  for (; e > 0; --e) r *= 2;
  for (; e < 0; ++e) r /= 2;
  return r;
}
bool nan_in(const Format& f, uint64_t v) {
  return (v & 0x7fff) > f.infinity;
}
bool inf_in(const Format& f, uint64_t v) {
  return (v & 0x7fff) == f.infinity;
}
quad magnitude(const Format& f, uint32_t v) {  // of finite values, and of the value infinity would have
  const int e = static_cast<int>(v >> f.mantissa), m = static_cast<int>(v & ((1u << f.mantissa) - 1));
  return e == 0 ? m * power(1 - f.bias - f.mantissa)
                : (m + (1 << f.mantissa)) * power(e - f.bias - f.mantissa);
}
quad value(const Format& f, uint64_t v) {
  return v & 0x8000 ? -magnitude(f, v & 0x7fff) : magnitude(f, v & 0x7fff);
}

// s + error to the format, nearest even or toward zero; error is smaller than half a unit of s.
uint64_t round_to(const Format& f, quad s, quad error, bool zero_sign, bool toward_zero = false) {
  if (s == 0) return zero_sign ? 0x8000 : 0;
  const bool negative = s < 0;
  const quad m = negative ? -s : s, e = negative ? -error : error;
  uint32_t low = 0, high = f.infinity;  // largest value <= m by bisection
  while (high - low > 1) {
    const uint32_t mid = (low + high) / 2;
    (magnitude(f, mid) < m || (magnitude(f, mid) == m && e >= 0) ? low : high) = mid;
  }
  if (!(magnitude(f, high) > m || (magnitude(f, high) == m && e < 0))) low = high;
  uint32_t r = low;
  if (low == f.infinity) {
    r = toward_zero ? f.infinity - 1 : f.infinity;
  } else if (!toward_zero) {
    const quad middle = (magnitude(f, low) + magnitude(f, low + 1)) / 2;
    if (m > middle || (m == middle && (e > 0 || (e == 0 && (low & 1))))) r = low + 1;
  }
  return r | (negative ? 0x8000u : 0u);
}
double wide(const Format& f, uint64_t v) {  // for the special values only
  if (nan_in(f, v)) return NAN;
  if (inf_in(f, v)) return v & 0x8000 ? -INFINITY : INFINITY;
  return static_cast<double>(value(f, v));
}
uint64_t special(const Format& f, double r) {
  return std::isnan(r) ? 0x7fff : (r < 0 ? 0x8000u : 0u) | f.infinity;
}

uint64_t fma_exact(const Format& f, uint64_t a, uint64_t b, uint64_t c) {
  if (nan_in(f, a) || nan_in(f, b) || nan_in(f, c) || inf_in(f, a) || inf_in(f, b) || inf_in(f, c))
    return special(f, wide(f, a) * wide(f, b) + wide(f, c));
  const quad p = value(f, a) * value(f, b), z = value(f, c), s = p + z;
  const quad t = s - p, error = (p - (s - t)) + (z - t);
  return round_to(f, s, error, std::signbit(std::fma(wide(f, a), wide(f, b), wide(f, c))));
}
uint64_t add_exact(const Format& f, uint64_t a, uint64_t b, bool subtract) {
  if (subtract && !nan_in(f, b)) b ^= 0x8000;
  return fma_exact(f, a, f.mantissa == 10 ? 0x3c00 : 0x3f80, b);
}
uint64_t mul_exact(const Format& f, uint64_t a, uint64_t b) {
  if (nan_in(f, a) || nan_in(f, b) || inf_in(f, a) || inf_in(f, b))
    return special(f, wide(f, a) * wide(f, b));
  return round_to(f, value(f, a) * value(f, b), 0, ((a ^ b) & 0x8000) != 0);
}

class Half : public ::testing::TestWithParam<const Format*> {};

TEST_P(Half, Arithmetic) {
  const Format& f = *GetParam();
  const std::string t = f.name;
  const size_t n = 16384;
  expect_equal(
      "fma.rn." + t + " %d, %a, %b, %c;", t, {t, t, t},
      [&](uint64_t a, uint64_t b, uint64_t c) { return fma_exact(f, a, b, c); }, n);
  expect_equal(
      "add.rn." + t + " %d, %a, %b;", t, {t, t},
      [&](uint64_t a, uint64_t b, uint64_t) { return add_exact(f, a, b, false); }, n);
  expect_equal(
      "sub.rn." + t + " %d, %a, %b;", t, {t, t},
      [&](uint64_t a, uint64_t b, uint64_t) { return add_exact(f, a, b, true); }, n);
  expect_equal(
      "mul.rn." + t + " %d, %a, %b;", t, {t, t},
      [&](uint64_t a, uint64_t b, uint64_t) { return mul_exact(f, a, b); }, n);
}

TEST_P(Half, Pairs) {
  const Format& f = *GetParam();
  const std::string t = std::string(f.name) + "x2";
  const auto both = [&](uint64_t (*op)(const Format&, uint64_t, uint64_t, uint64_t)) {
    return [&f, op](uint64_t a, uint64_t b, uint64_t c) {
      uint64_t r = 0;
      for (int h = 0; h < 32; h += 16) r |= op(f, a >> h & 0xffff, b >> h & 0xffff, c >> h & 0xffff) << h;
      return r;
    };
  };
  // NaNs inside a pair are compared exactly: they are canonical
  expect_equal(
      "fma.rn." + t + " %d, %a, %b, %c;", "b32", {"b32", "b32", "b32"},
      both([](const Format& g, uint64_t a, uint64_t b, uint64_t c) { return fma_exact(g, a, b, c); }));
  expect_equal(
      "add.rn." + t + " %d, %a, %b;", "b32", {"b32", "b32"},
      both([](const Format& g, uint64_t a, uint64_t b, uint64_t) { return add_exact(g, a, b, false); }));
  expect_equal("mul.rn." + t + " %d, %a, %b;", "b32", {"b32", "b32"},
               both([](const Format& g, uint64_t a, uint64_t b, uint64_t) { return mul_exact(g, a, b); }));
  expect_equal("max." + t + " %d, %a, %b;", "b32", {"b32", "b32"},
               both([](const Format& g, uint64_t a, uint64_t b, uint64_t) -> uint64_t {
                 if (nan_in(g, a) || nan_in(g, b)) return nan_in(g, a) ? (nan_in(g, b) ? 0x7fff : b) : a;
                 if ((a & 0x7fff) == 0 && (b & 0x7fff) == 0) return a & b;
                 return wide(g, a) > wide(g, b) ? a : b;
               }));
}

TEST_P(Half, Conversions) {
  const Format& f = *GetParam();
  const std::string t = f.name;
  const auto from_f32 = [&f](uint64_t a, bool toward_zero) {
    const float x = as<float>(a);
    if (std::isnan(x) || std::isinf(x)) return special(f, x);
    return round_to(f, x, 0, std::signbit(x), toward_zero);
  };
  expect_equal(
      "cvt.rn." + t + ".f32 %d, %a;", t, {"f32"},
      [=](uint64_t a, uint64_t, uint64_t) { return from_f32(a, false); }, 16384);
  expect_equal(
      "cvt.rz." + t + ".f32 %d, %a;", t, {"f32"},
      [=](uint64_t a, uint64_t, uint64_t) { return from_f32(a, true); }, 16384);
  expect_equal(
      "cvt.rn." + t + "x2.f32 %d, %a, %b;", "b32", {"f32", "f32"},
      [=](uint64_t a, uint64_t b, uint64_t) { return from_f32(b, false) | from_f32(a, false) << 16; });
  std::vector<uint64_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = i;
  const auto got = run("cvt.f32." + t + " %d, %a;", "f32", {t}, {all});
  for (size_t i = 0; i < all.size(); ++i) {
    if (nan_in(f, i))
      ASSERT_TRUE(is_nan("f32", got[i])) << i;
    else
      ASSERT_EQ(got[i], bits(static_cast<float>(wide(f, i)))) << i;
  }
  expect_equal("cvt.rn." + t + ".s32 %d, %a;", t, {"s32"},
               [&f](uint64_t a, uint64_t, uint64_t) { return round_to(f, as<int32_t>(a), 0, false); });
  expect_equal("setp.lt." + t + " %p0, %a, %b; selp.u32 %d, 1, 0, %p0;", "u32", {t, t},
               [&f](uint64_t a, uint64_t b, uint64_t) { return wide(f, a) < wide(f, b); });
}

// ---- eight bits: e4m3 has no infinity and one NaN, e5m2 is f16 cut short
float fp8_value(bool e4m3, uint32_t code) {  // of a finite code without its sign
  const int mantissa = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15;
  const int e = static_cast<int>(code) >> mantissa, m = static_cast<int>(code) & ((1 << mantissa) - 1);
  return e == 0 ? std::ldexp(static_cast<float>(m), 1 - bias - mantissa)
                : std::ldexp(static_cast<float>(m + (1 << mantissa)), e - bias - mantissa);
}
uint64_t to_fp8(bool e4m3, float x) {
  const uint32_t largest = e4m3 ? 0x7e : 0x7b, sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return 0x7f;
  const float magnitude = std::min(std::fabs(x), fp8_value(e4m3, largest));
  uint32_t best = 0;
  for (uint32_t code = 1; code <= largest; ++code) {
    const double here = std::fabs(double{fp8_value(e4m3, code)} - magnitude),
                 there = std::fabs(double{fp8_value(e4m3, best)} - magnitude);
    if (here < there || (here == there && code % 2 == 0)) best = code;
  }
  return best | sign;
}
TEST(Fp8, Conversions) {
  for (bool e4m3 : {true, false}) {
    const std::string t = e4m3 ? "e4m3x2" : "e5m2x2";
    const auto near_range =
        "{.reg .f32 x, y; and.b32 x, %a, 0x8fffffff; or.b32 x, x, 0x38000000; mov.b32 y, %b; "
        "cvt.rn.satfinite." +
        t + ".f32 %d, x, y;}";
    expect_equal(near_range, "b16", {"f32", "f32"}, [=](uint64_t a, uint64_t b, uint64_t) {
      return to_fp8(e4m3, as<float>(static_cast<uint32_t>((a & 0x8fffffff) | 0x38000000))) << 8 |
             to_fp8(e4m3, as<float>(static_cast<uint32_t>(b)));
    });
    std::vector<uint64_t> all(65536);
    for (size_t i = 0; i < all.size(); ++i) all[i] = i;
    const auto got = run("cvt.rn.f16x2." + t + " %d, %a;", "b32", {"b16"}, {all});
    for (size_t i = 0; i < all.size(); ++i)
      for (int half = 0; half < 2; ++half) {
        const uint32_t code = static_cast<uint32_t>(i) >> 8 * half & 255, h = got[i] >> 16 * half & 0xffff;
        if ((code & 127) > (e4m3 ? 0x7eu : 0x7cu)) {
          ASSERT_TRUE(nan_in(kF16, h)) << code;
        } else if ((code & 127) == 0x7c && !e4m3) {
          ASSERT_EQ(h, (code & 128) << 8 | 0x7c00) << code;
        } else {
          ASSERT_EQ(wide(kF16, h), (code & 128 ? -1 : 1) * fp8_value(e4m3, code & 127)) << code;
        }
      }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, Half, ::testing::Values(&kF16, &kBf16),
                         [](const auto& i) { return std::string(i.param->name); });

}  // namespace
