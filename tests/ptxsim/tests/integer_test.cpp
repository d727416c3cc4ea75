// SPDX-License-Identifier: Apache-2.0
// Integer instructions against host arithmetic over random and extreme operands.
#include <bit>

#include "ptx_case.h"

using namespace ptxsim_test;

namespace {

template <class T>
struct Named {
  using type = T;
  std::string name;
};
template <class F>
void each_type(F f) {
  f(Named<uint16_t>{"u16"});
  f(Named<int16_t>{"s16"});
  f(Named<uint32_t>{"u32"});
  f(Named<int32_t>{"s32"});
  f(Named<uint64_t>{"u64"});
  f(Named<int64_t>{"s64"});
}
template <class T>
void binary(const std::string& op, const Named<T>& t, T (*f)(T, T)) {
  expect_equal(op + "." + t.name + " %d, %a, %b;", t.name, {t.name, t.name},
               [f](uint64_t a, uint64_t b, uint64_t) { return bits(f(as<T>(a), as<T>(b))); });
}

TEST(Integer, Arithmetic) {
  each_type([](auto t) {
    using T = typename decltype(t)::type;
    using U = std::make_unsigned_t<T>;
    binary<T>("add", t, [](T a, T b) { return static_cast<T>(static_cast<U>(a) + static_cast<U>(b)); });
    binary<T>("sub", t, [](T a, T b) { return static_cast<T>(static_cast<U>(a) - static_cast<U>(b)); });
    binary<T>("mul.lo", t,
              [](T a, T b) { return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b)); });
    binary<T>("mul.hi", t, [](T a, T b) {
      return static_cast<T>((static_cast<__int128>(a) * static_cast<__int128>(b)) >> (8 * sizeof(T)));
    });
    binary<T>("min", t, [](T a, T b) { return a < b ? a : b; });
    binary<T>("max", t, [](T a, T b) { return a > b ? a : b; });
    const std::string n = t.name;
    expect_equal("mad.lo." + n + " %d, %a, %b, %c;", n, {n, n, n},
                 [](uint64_t a, uint64_t b, uint64_t c) { return a * b + c; });
    // division by zero and overflow are undefined in PTX: keep the divisor clear of them
    expect_equal("{.reg ." + storage(n) + " q; or." + storage(n) + " q, %b, 2; div." + n + " %d, %a, q;}", n,
                 {n, n}, [](uint64_t a, uint64_t b, uint64_t) {
                   const T q = static_cast<T>(as<T>(b) | 2);
                   return std::is_signed_v<T> && q == static_cast<T>(-1)
                              ? bits(static_cast<T>(U(0) - static_cast<U>(as<T>(a))))
                              : bits(static_cast<T>(as<T>(a) / q));
                 });
    expect_equal("{.reg ." + storage(n) + " q; or." + storage(n) + " q, %b, 2; rem." + n + " %d, %a, q;}", n,
                 {n, n}, [](uint64_t a, uint64_t b, uint64_t) {
                   const T q = static_cast<T>(as<T>(b) | 2);
                   return std::is_signed_v<T> && q == static_cast<T>(-1) ? 0
                                                                         : bits(static_cast<T>(as<T>(a) % q));
                 });
  });
}

TEST(Integer, Wide) {
  const std::vector<std::string> u{"u32", "u32", "u64"}, s{"s32", "s32", "s64"};
  expect_equal("mul.wide.u32 %d, %a, %b;", "u64", {"u32", "u32"},
               [](uint64_t a, uint64_t b, uint64_t) { return a * b; });
  expect_equal("mul.wide.s32 %d, %a, %b;", "s64", {"s32", "s32"}, [](uint64_t a, uint64_t b, uint64_t) {
    return bits(int64_t{as<int32_t>(a)} * as<int32_t>(b));
  });
  expect_equal("mad.wide.u32 %d, %a, %b, %c;", "u64", u,
               [](uint64_t a, uint64_t b, uint64_t c) { return a * b + c; });
  expect_equal("mad.wide.s32 %d, %a, %b, %c;", "s64", s, [](uint64_t a, uint64_t b, uint64_t c) {
    return bits(int64_t{as<int32_t>(a)} * as<int32_t>(b)) + c;
  });
  expect_equal("mul.wide.s16 %d, %a, %b;", "s32", {"s16", "s16"}, [](uint64_t a, uint64_t b, uint64_t) {
    return bits(int32_t{as<int16_t>(a)} * as<int16_t>(b));
  });
  expect_equal("mul24.lo.s32 %d, %a, %b;", "s32", {"s32", "s32"}, [](uint64_t a, uint64_t b, uint64_t) {
    const int64_t x = static_cast<int64_t>(a << 40) >> 40, y = static_cast<int64_t>(b << 40) >> 40;
    return static_cast<uint64_t>(x * y);
  });
}

TEST(Integer, Carry) {
  expect_equal(
      "{.reg .b32 l, h, bl, bh; mov.b64 {l, h}, %a; mov.b64 {bl, bh}, %b; add.cc.u32 l, l, bl; addc.u32 h, "
      "h, bh; mov.b64 %d, {l, h};}",
      "u64", {"u64", "u64"}, [](uint64_t a, uint64_t b, uint64_t) { return a + b; });
  expect_equal(
      "{.reg .b32 l, h, bl, bh; mov.b64 {l, h}, %a; mov.b64 {bl, bh}, %b; sub.cc.u32 l, l, bl; subc.u32 h, "
      "h, bh; mov.b64 %d, {l, h};}",
      "u64", {"u64", "u64"}, [](uint64_t a, uint64_t b, uint64_t) { return a - b; });
  expect_equal(
      "{.reg .b32 al, ah, bl, bh, l, h; mov.b64 {al, ah}, %a; mov.b64 {bl, bh}, %b; mul.lo.u32 l, al, bl; "
      "mul.hi.u32 h, al, bl; mad.lo.cc.u32 l, al, 1, l; madc.hi.u32 h, ah, 0, h;"
      "mad.lo.u32 h, al, bh, h; mad.lo.u32 h, ah, bl, h; mov.b64 %d, {l, h};}",
      "u64", {"u64", "u64"}, [](uint64_t a, uint64_t b, uint64_t) { return a * b + (a & 0xffffffff); });
  expect_equal("add.sat.s32 %d, %a, %b;", "s32", {"s32", "s32"}, [](uint64_t a, uint64_t b, uint64_t) {
    const int64_t v = int64_t{as<int32_t>(a)} + as<int32_t>(b);
    return bits(static_cast<int32_t>(v > INT32_MAX ? INT32_MAX : v < INT32_MIN ? INT32_MIN : v));
  });
}

TEST(Integer, Bits) {
  for (const std::string n : {"16", "32", "64"}) {
    const std::string b = "b" + n;
    expect_equal("and." + b + " %d, %a, %b;", b, {b, b},
                 [](uint64_t x, uint64_t y, uint64_t) { return x & y; });
    expect_equal("or." + b + " %d, %a, %b;", b, {b, b},
                 [](uint64_t x, uint64_t y, uint64_t) { return x | y; });
    expect_equal("xor." + b + " %d, %a, %b;", b, {b, b},
                 [](uint64_t x, uint64_t y, uint64_t) { return x ^ y; });
    expect_equal("not." + b + " %d, %a;", b, {b}, [](uint64_t x, uint64_t, uint64_t) { return ~x; });
    const uint64_t width = std::stoull(n);
    expect_equal("shl." + b + " %d, %a, %b;", b, {b, "u32"},
                 [=](uint64_t x, uint64_t y, uint64_t) { return y >= width ? 0 : x << y; });
    expect_equal("shr.u" + n + " %d, %a, %b;", b, {b, "u32"},
                 [=](uint64_t x, uint64_t y, uint64_t) { return y >= width ? 0 : x >> y; });
    expect_equal("shr.s" + n + " %d, %a, %b;", b, {b, "u32"}, [=](uint64_t x, uint64_t y, uint64_t) {
      const int64_t v = static_cast<int64_t>(x << (64 - width)) >> (64 - width);
      return static_cast<uint64_t>(v >> std::min<uint64_t>(y, 63));
    });
  }
  expect_equal("popc.b32 %d, %a;", "u32", {"b32"},
               [](uint64_t a, uint64_t, uint64_t) { return static_cast<uint64_t>(std::popcount(a)); });
  expect_equal("popc.b64 %d, %a;", "u32", {"b64"},
               [](uint64_t a, uint64_t, uint64_t) { return static_cast<uint64_t>(std::popcount(a)); });
  expect_equal("clz.b32 %d, %a;", "u32", {"b32"}, [](uint64_t a, uint64_t, uint64_t) {
    return static_cast<uint64_t>(std::countl_zero(static_cast<uint32_t>(a)));
  });
  expect_equal("clz.b64 %d, %a;", "u32", {"b64"},
               [](uint64_t a, uint64_t, uint64_t) { return static_cast<uint64_t>(std::countl_zero(a)); });
  expect_equal("brev.b32 %d, %a;", "u32", {"b32"}, [](uint64_t a, uint64_t, uint64_t) {
    uint64_t r = 0;
    for (int k = 0; k < 32; ++k) r |= (a >> k & 1) << (31 - k);
    return r;
  });
  expect_equal("bfind.u32 %d, %a;", "u32", {"u32"}, [](uint64_t a, uint64_t, uint64_t) {
    return a == 0 ? 0xffffffffull : static_cast<uint64_t>(63 - std::countl_zero(a));
  });
  expect_equal("bfind.s32 %d, %a;", "u32", {"s32"}, [](uint64_t a, uint64_t, uint64_t) {
    const uint32_t v = a >> 31 ? ~static_cast<uint32_t>(a) : static_cast<uint32_t>(a);
    return v == 0 ? 0xffffffffull : static_cast<uint64_t>(31 - std::countl_zero(v));
  });
  expect_equal(
      "dp4a.s32.s32 %d, %a, %b, %c;", "s32", {"b32", "b32", "s32"}, [](uint64_t a, uint64_t b, uint64_t c) {
        for (int k = 0; k < 4; ++k)
          c += static_cast<uint64_t>(static_cast<int8_t>(a >> 8 * k) * static_cast<int8_t>(b >> 8 * k));
        return c;
      });
}

TEST(Integer, Fields) {
  const auto extract = [](uint64_t a, uint64_t pos, uint64_t len, int width,
                          bool is_signed) {  // from the PTX manual's definition
    pos &= 255, len &= 255;
    const int msb = width - 1;
    const uint64_t end = std::min<uint64_t>(pos + len - 1, msb);
    const uint64_t sign = !is_signed || len == 0 ? 0 : a >> end & 1;
    uint64_t d = 0;
    for (int i = 0; i <= msb; ++i)
      d |= (static_cast<uint64_t>(i) < len && pos + i <= static_cast<uint64_t>(msb) ? a >> (pos + i) & 1
                                                                                    : sign)
           << i;
    return d;
  };
  for (const std::string t : {"u32", "s32", "u64", "s64"}) {
    const int width = bits_of(t);
    expect_equal("{.reg .b32 x, y; and.b32 x, %b, 127; and.b32 y, %c, 127; bfe." + t + " %d, %a, x, y;}", t,
                 {t, "u32", "u32"}, [=](uint64_t a, uint64_t b, uint64_t c) {
                   return extract(a, b & 127, c & 127, width, t[0] == 's');
                 });
  }
  for (const std::string t : {"b32", "b64"}) {
    const uint64_t width = static_cast<uint64_t>(bits_of(t));
    expect_equal("{.reg .b32 x, y; and.b32 x, %c, 63; shr.u32 y, %c, 8; and.b32 y, y, 63; bfi." + t +
                     " %d, %a, %b, x, y;}",
                 t, {t, t, "u32"}, [=](uint64_t a, uint64_t b, uint64_t c) {
                   const uint64_t pos = c & 63, len = c >> 8 & 63;
                   for (uint64_t i = 0; i < len && pos + i < width; ++i)
                     b = (b & ~(1ull << (pos + i))) | (a >> i & 1) << (pos + i);
                   return b;
                 });
  }
  for (int table : {0x80, 0xea, 0x6a, 0x96, 0xfe, 0xca, 0x1b, 0x78, 0xe8, 0x00, 0xff, 0x2d})
    expect_equal(
        "lop3.b32 %d, %a, %b, %c, " + std::to_string(table) + ";", "b32", {"b32", "b32", "b32"},
        [=](uint64_t a, uint64_t b, uint64_t c) {
          uint64_t d = 0;
          for (int i = 0; i < 32; ++i)
            d |= static_cast<uint64_t>(table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1)
                 << i;
          return d;
        });
  const auto permute = [](uint64_t a, uint64_t b, uint64_t s) {
    const uint64_t both = a | b << 32;
    uint64_t d = 0;
    for (int k = 0; k < 4; ++k) {
      const uint64_t sel = s >> 4 * k, byte = both >> 8 * (sel & 7) & 255;
      d |= (sel & 8 ? (byte & 128 ? 255ull : 0ull) : byte) << 8 * k;
    }
    return d;
  };
  expect_equal("prmt.b32 %d, %a, %b, %c;", "b32", {"b32", "b32", "b32"}, permute);
  for (int s : {0x5410, 0x7632, 0x3210, 0x4567, 0x0123, 0x4040, 0xba98, 0x5140})
    expect_equal("prmt.b32 %d, %a, %b, " + std::to_string(s) + ";", "b32", {"b32", "b32"},
                 [=](uint64_t a, uint64_t b, uint64_t) { return permute(a, b, static_cast<uint64_t>(s)); });
  expect_equal("shf.l.wrap.b32 %d, %a, %b, %c;", "b32", {"b32", "b32", "u32"},
               [](uint64_t a, uint64_t b, uint64_t c) { return (a | b << 32) << (c & 31) >> 32; });
  expect_equal("shf.r.clamp.b32 %d, %a, %b, %c;", "b32", {"b32", "b32", "u32"},
               [](uint64_t a, uint64_t b, uint64_t c) { return (a | b << 32) >> std::min<uint64_t>(c, 32); });
  expect_equal("shf.r.wrap.b32 %d, %a, %b, %c;", "b32", {"b32", "b32", "u32"},
               [](uint64_t a, uint64_t b, uint64_t c) { return (a | b << 32) >> (c & 31); });
}

TEST(Integer, CompareAndSelect) {
  each_type([](auto t) {
    using T = typename decltype(t)::type;
    const std::pair<const char*, bool (*)(T, T)> comparisons[] = {
        {"eq", [](T a, T b) { return a == b; }}, {"ne", [](T a, T b) { return a != b; }},
        {"lt", [](T a, T b) { return a < b; }},  {"le", [](T a, T b) { return a <= b; }},
        {"gt", [](T a, T b) { return a > b; }},  {"ge", [](T a, T b) { return a >= b; }}};
    for (const auto& [name, f] : comparisons)
      expect_equal(std::string("setp.") + name + "." + t.name + " %p0, %a, %b; selp.b32 %d, 7, 9, %p0;",
                   "u32", {t.name, t.name},
                   [f = f](uint64_t a, uint64_t b, uint64_t) { return f(as<T>(a), as<T>(b)) ? 7 : 9; });
  });
  expect_equal(
      "setp.lt.s32 %p0, %a, 0; setp.gt.and.s32 %p1|%p2, %b, 5, !%p0; selp.b32 %d, 1, 0, %p1; @%p2 add.s32 "
      "%d, %d, 2;",
      "u32", {"s32", "s32"}, [](uint64_t a, uint64_t b, uint64_t) {
        const bool c = !(as<int32_t>(a) < 0), g = as<int32_t>(b) > 5;
        return (g && c ? 1ull : 0ull) + (!g && c ? 2ull : 0ull);
      });
  expect_equal("set.le.u32.s32 %d, %a, %b;", "u32", {"s32", "s32"}, [](uint64_t a, uint64_t b, uint64_t) {
    return as<int32_t>(a) <= as<int32_t>(b) ? 0xffffffffull : 0ull;
  });
}

TEST(Integer, Conversions) {
  each_type([](auto from) {
    using F = typename decltype(from)::type;
    each_type([&](auto to) {
      using T = typename decltype(to)::type;
      const std::string f = from.name, t = to.name;
      expect_equal("cvt." + t + "." + f + " %d, %a;", t, {f},
                   [](uint64_t a, uint64_t, uint64_t) { return bits(static_cast<T>(as<F>(a))); });
      if (std::is_signed_v<F> != std::is_signed_v<T> || sizeof(T) < sizeof(F))
        expect_equal("cvt.sat." + t + "." + f + " %d, %a;", t, {f}, [](uint64_t a, uint64_t, uint64_t) {
          const __int128 v = as<F>(a), low = std::numeric_limits<T>::min(),
                         high = std::numeric_limits<T>::max();
          return bits(static_cast<T>(v < low ? low : v > high ? high : v));
        });
    });
  });
  expect_equal("cvt.u32.u8 %d, %a;", "u32", {"b32"}, [](uint64_t a, uint64_t, uint64_t) { return a & 255; });
  expect_equal("cvt.s32.s8 %d, %a;", "s32", {"b16"}, [](uint64_t a, uint64_t, uint64_t) {
    return bits(static_cast<int32_t>(static_cast<int8_t>(a)));
  });
  expect_equal("cvt.u8.u32 %d, %a;", "b16", {"b32"}, [](uint64_t a, uint64_t, uint64_t) { return a & 255; });
}

TEST(Integer, PackAndUnpack) {
  expect_equal("{.reg .b16 l, h; mov.b32 {l, h}, %a; mov.b32 %d, {h, l};}", "b32", {"b32"},
               [](uint64_t a, uint64_t, uint64_t) { return (a >> 16 & 0xffff) | a << 16; });
  expect_equal("{.reg .b16 w, x, y, z; mov.b64 {w, x, y, z}, %a; mov.b64 %d, {z, y, x, w};}", "b64", {"b64"},
               [](uint64_t a, uint64_t, uint64_t) {
                 return (a >> 48) | (a >> 16 & 0xffff0000u) | (a & 0xffff0000u) << 16 | a << 48;
               });
  expect_equal("{.reg .b32 h; mov.b64 {_, h}, %a; mov.b64 %d, {h, h};}", "b64", {"b64"},
               [](uint64_t a, uint64_t, uint64_t) { return (a >> 32) | (a >> 32) << 32; });
}

TEST(Integer, ShadowedNamesAndLabels) {
  expect_equal(
      "{ .reg .b32 t; mov.u32 t, 5; { .reg .b32 t; mov.u32 t, 7; setp.eq.u32 %p0, t, 8; @%p0 bra L; add.u32 "
      "%d, %a, t; L: } add.u32 %d, %d, t; setp.eq.u32 %p0, %d, %d; @%p0 bra L; mov.u32 %d, 0; L: }",
      "u32", {"u32"}, [](uint64_t a, uint64_t, uint64_t) { return a + 12; });
}

TEST(Integer, DivergentLoop) {  // each lane runs its own number of rounds
  expect_equal(
      "and.b32 %r4, %a, 31; mov.u32 %d, 0; LOOP: setp.eq.u32 %p0, %r4, 0; @%p0 bra DONE; mad.lo.u32 %d, %d, "
      "3, %r4; sub.u32 %r4, %r4, 1; bra LOOP; DONE:",
      "u32", {"u32"}, [](uint64_t a, uint64_t, uint64_t) {
        uint32_t d = 0;
        for (uint32_t n = a & 31; n != 0; --n) d = d * 3 + n;
        return d;
      });
}

}  // namespace
