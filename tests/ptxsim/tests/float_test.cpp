// SPDX-License-Identifier: Apache-2.0
// Floating-point instructions against exact host arithmetic.
#include <cfenv>
#include <cmath>

#include "ptx_case.h"

using namespace ptxsim_test;

namespace {

float f32(uint64_t v) {
  return as<float>(v);
}
double f64(uint64_t v) {
  return as<double>(v);
}

// The host computes in the named direction; volatile keeps it from doing so at compile time.
template <class T>
uint64_t rounded(int mode, T (*f)(T, T, T), T a, T b, T c) {
  volatile T x = a, y = b, z = c;
  std::fesetround(mode);
  volatile T r = f(x, y, z);
  std::fesetround(FE_TONEAREST);
  return bits(static_cast<T>(r));
}

template <class T>
void arithmetic(const std::string& type) {
  const std::pair<const char*, int> modes[] = {
      {"rn", FE_TONEAREST}, {"rz", FE_TOWARDZERO}, {"rm", FE_DOWNWARD}, {"rp", FE_UPWARD}};
  struct Op {
    const char* name;
    int operands;
    T (*f)(T, T, T);
  };
  const Op ops[] = {{"add", 2, [](T a, T b, T) { return a + b; }},
                    {"sub", 2, [](T a, T b, T) { return a - b; }},
                    {"mul", 2, [](T a, T b, T) { return a * b; }},
                    {"div", 2, [](T a, T b, T) { return a / b; }},
                    {"fma", 3, [](T a, T b, T c) { return std::fma(a, b, c); }},
                    {"sqrt", 1, [](T a, T, T) { return std::sqrt(a); }},
                    {"rcp", 1, [](T a, T, T) { return T(1) / a; }}};
  for (const Op& op : ops)
    for (const auto& [mode_name, mode] : modes) {
      const std::string list = op.operands == 1 ? "%a" : op.operands == 2 ? "%a, %b" : "%a, %b, %c";
      expect_equal(std::string(op.name) + "." + mode_name + "." + type + " %d, " + list + ";", type,
                   std::vector<std::string>(static_cast<size_t>(op.operands), type),
                   [mode = mode, &op](uint64_t a, uint64_t b, uint64_t c) {
                     return rounded<T>(mode, op.f, as<T>(a), as<T>(b), as<T>(c));
                   });
    }
}
TEST(Float, RoundedArithmetic32) {
  arithmetic<float>("f32");
}
TEST(Float, RoundedArithmetic64) {
  arithmetic<double>("f64");
}

float flush(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}
float saturate(float x) {
  return x > 0 ? (x < 1 ? x : 1) : 0;
}

TEST(Float, FlushAndSaturate) {
  expect_equal("add.ftz.f32 %d, %a, %b;", "f32", {"f32", "f32"},
               [](uint64_t a, uint64_t b, uint64_t) { return bits(flush(flush(f32(a)) + flush(f32(b)))); });
  expect_equal("mul.ftz.f32 %d, %a, %b;", "f32", {"f32", "f32"},
               [](uint64_t a, uint64_t b, uint64_t) { return bits(flush(flush(f32(a)) * flush(f32(b)))); });
  expect_equal("mul.sat.f32 %d, %a, %b;", "f32", {"f32", "f32"},
               [](uint64_t a, uint64_t b, uint64_t) { return bits(saturate(f32(a) * f32(b))); });
  expect_equal("fma.rn.ftz.sat.f32 %d, %a, %b, %c;", "f32", {"f32", "f32", "f32"},
               [](uint64_t a, uint64_t b, uint64_t c) {
                 return bits(flush(saturate(std::fma(flush(f32(a)), flush(f32(b)), flush(f32(c))))));
               });
}

TEST(Float, MinMaxSign) {
  const auto extreme = [](uint64_t a, uint64_t b, bool max, bool nan) -> uint64_t {
    const float x = f32(a), y = f32(b);
    if (std::isnan(x) || std::isnan(y))
      return nan || (std::isnan(x) && std::isnan(y)) ? 0x7fffffff : std::isnan(x) ? b : a;
    if (x == y) return std::signbit(x) != max ? a : b;  // -0 < +0
    return (x < y) != max ? a : b;
  };
  expect_equal("min.f32 %d, %a, %b;", "f32", {"f32", "f32"},
               [=](uint64_t a, uint64_t b, uint64_t) { return extreme(a, b, false, false); });
  expect_equal("max.f32 %d, %a, %b;", "f32", {"f32", "f32"},
               [=](uint64_t a, uint64_t b, uint64_t) { return extreme(a, b, true, false); });
  expect_equal("max.NaN.f32 %d, %a, %b;", "f32", {"f32", "f32"},
               [=](uint64_t a, uint64_t b, uint64_t) { return extreme(a, b, true, true); });
  expect_equal("neg.f32 %d, %a;", "f32", {"f32"},
               [](uint64_t a, uint64_t, uint64_t) { return a ^ 0x80000000; });
  expect_equal("abs.f32 %d, %a;", "f32", {"f32"},
               [](uint64_t a, uint64_t, uint64_t) { return a & 0x7fffffff; });
  expect_equal("copysign.f32 %d, %a, %b;", "f32", {"f32", "f32"},
               [](uint64_t a, uint64_t b, uint64_t) { return (a & 0x80000000) | (b & 0x7fffffff); });
}

TEST(Float, Comparisons) {
  struct Case {
    const char* name;
    bool less, equal, greater, unordered;
  };
  const Case cases[] = {{"eq", 0, 1, 0, 0},  {"ne", 1, 0, 1, 0},  {"lt", 1, 0, 0, 0},  {"le", 1, 1, 0, 0},
                        {"gt", 0, 0, 1, 0},  {"ge", 0, 1, 1, 0},  {"equ", 0, 1, 0, 1}, {"neu", 1, 0, 1, 1},
                        {"ltu", 1, 0, 0, 1}, {"leu", 1, 1, 0, 1}, {"gtu", 0, 0, 1, 1}, {"geu", 0, 1, 1, 1},
                        {"num", 1, 1, 1, 0}, {"nan", 0, 0, 0, 1}};
  const auto verdict = [](const Case& c, double x, double y) {
    return x < y ? c.less : x > y ? c.greater : x == y ? c.equal : c.unordered;
  };
  for (const Case& c : cases) {
    expect_equal(std::string("setp.") + c.name + ".f32 %p0, %a, %b; selp.u32 %d, 1, 0, %p0;", "u32",
                 {"f32", "f32"},
                 [=](uint64_t a, uint64_t b, uint64_t) { return verdict(c, f32(a), f32(b)); });
    expect_equal(std::string("setp.") + c.name + ".f64 %p0, %a, %b; selp.u32 %d, 1, 0, %p0;", "u32",
                 {"f64", "f64"},
                 [=](uint64_t a, uint64_t b, uint64_t) { return verdict(c, f64(a), f64(b)); });
  }
}

TEST(Float, Integers) {
  const auto to_integer = [](double x, double low, double high) {
    return std::isnan(x) ? 0.0 : x < low ? low : x > high ? high : x;
  };
  expect_equal("cvt.rzi.s32.f32 %d, %a;", "s32", {"f32"}, [=](uint64_t a, uint64_t, uint64_t) {
    return bits(static_cast<int32_t>(to_integer(std::trunc(f32(a)), -2147483648.0, 2147483647.0)));
  });
  expect_equal("cvt.rni.s32.f32 %d, %a;", "s32", {"f32"}, [=](uint64_t a, uint64_t, uint64_t) {
    return bits(static_cast<int32_t>(to_integer(std::nearbyint(f32(a)), -2147483648.0, 2147483647.0)));
  });
  expect_equal("cvt.rmi.u32.f32 %d, %a;", "u32", {"f32"}, [=](uint64_t a, uint64_t, uint64_t) {
    return bits(static_cast<uint32_t>(to_integer(std::floor(f32(a)), 0.0, 4294967295.0)));
  });
  expect_equal("cvt.rpi.s16.f64 %d, %a;", "s16", {"f64"}, [=](uint64_t a, uint64_t, uint64_t) {
    return bits(static_cast<int16_t>(to_integer(std::ceil(f64(a)), -32768.0, 32767.0)));
  });
  expect_equal("cvt.rn.f32.s32 %d, %a;", "f32", {"s32"},
               [](uint64_t a, uint64_t, uint64_t) { return bits(static_cast<float>(as<int32_t>(a))); });
  expect_equal("cvt.rn.f32.u64 %d, %a;", "f32", {"u64"},
               [](uint64_t a, uint64_t, uint64_t) { return bits(static_cast<float>(a)); });
  expect_equal("cvt.rz.f32.u32 %d, %a;", "f32", {"u32"}, [](uint64_t a, uint64_t, uint64_t) {
    const float f = static_cast<float>(a);
    return static_cast<double>(f) > static_cast<double>(a) ? bits(std::nextafter(f, 0.0f)) : bits(f);
  });
  expect_equal("cvt.rn.f64.s64 %d, %a;", "f64", {"s64"},
               [](uint64_t a, uint64_t, uint64_t) { return bits(static_cast<double>(as<int64_t>(a))); });
  expect_equal("cvt.rn.f32.u8 %d, %a;", "f32", {"b16"},
               [](uint64_t a, uint64_t, uint64_t) { return bits(static_cast<float>(a & 255)); });
  expect_equal("cvt.rni.f32.f32 %d, %a;", "f32", {"f32"},
               [](uint64_t a, uint64_t, uint64_t) { return bits(std::nearbyint(f32(a))); });
  expect_equal("cvt.rmi.f32.f32 %d, %a;", "f32", {"f32"},
               [](uint64_t a, uint64_t, uint64_t) { return bits(std::floor(f32(a))); });
  expect_equal("cvt.sat.f32.f32 %d, %a;", "f32", {"f32"},
               [](uint64_t a, uint64_t, uint64_t) { return bits(saturate(f32(a))); });
  expect_equal("cvt.rn.f32.f64 %d, %a;", "f32", {"f64"},
               [](uint64_t a, uint64_t, uint64_t) { return bits(static_cast<float>(f64(a))); });
  expect_equal("cvt.f64.f32 %d, %a;", "f64", {"f32"},
               [](uint64_t a, uint64_t, uint64_t) { return bits(static_cast<double>(f32(a))); });
  expect_equal("cvt.rna.tf32.f32 %d, %a;", "b32", {"f32"}, [](uint64_t a, uint64_t, uint64_t) -> uint64_t {
    if (std::isnan(f32(a))) return 0x7fffffff;
    return std::isinf(f32(a)) ? a : (a + 0x1000) & ~0x1fffull;
  });
}

TEST(Float, ApproximationsAreWithinTheirBounds) {
  const auto check = [](const std::string& op, double (*f)(double), double relative, double absolute,
                        double low, double high) {
    std::vector<uint64_t> in;
    for (int i = 0; i < 8192; ++i) in.push_back(bits(static_cast<float>(low + (high - low) * i / 8191)));
    const auto got = run(op + ".f32 %d, %a;", "f32", {"f32"}, {in});
    for (size_t i = 0; i < in.size(); ++i) {
      const double want = f(f32(in[i]));
      ASSERT_NEAR(f32(got[i]), want, std::abs(want) * relative + absolute) << op << " " << f32(in[i]);
    }
  };
  check("ex2.approx", std::exp2, 2.4e-7, 0, -120, 120);
  check("ex2.approx", std::exp2, 2.4e-7, 1.5e-45, -148, -120);
  check("lg2.approx", std::log2, 2.4e-7, 2.4e-7, 0.01, 1000);
  check("rcp.approx", [](double x) { return 1 / x; }, 1.2e-7, 0, 0.001, 1000);
  check("rsqrt.approx", [](double x) { return 1 / std::sqrt(x); }, 2.4e-7, 0, 0.001, 1000);
  check("tanh.approx", std::tanh, 4.9e-4, 0, -8, 8);
  check("sin.approx", std::sin, 0, 5e-7, -3.14, 3.14);
  const auto special = run("ex2.approx.f32 %d, %a;", "f32", {"f32"},
                           {std::vector<uint64_t>{0xff800000, 0x7f800000, 0, 0x80000000, 0x43000000,
                                                  0xc3160000, 0xc7000000, 0x7fc00000}});
  EXPECT_EQ(special[0], 0u);
  EXPECT_EQ(special[1], 0x7f800000u);
  EXPECT_EQ(special[2], 0x3f800000u);
  EXPECT_EQ(special[3], 0x3f800000u);
  EXPECT_EQ(special[4], 0x7f800000u);
  EXPECT_EQ(special[5], 0u);
  EXPECT_EQ(special[6], 0u);
  EXPECT_TRUE(std::isnan(f32(special[7])));
}

}  // namespace
