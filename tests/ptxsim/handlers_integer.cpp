// SPDX-License-Identifier: Apache-2.0
// Integer arithmetic, bit operations, integer comparisons, moves and selections.
#include "lanes.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

#define PTXSIM_FN(...) [](__VA_ARGS__) __attribute__((always_inline))

// One handler per (name, type): H2(add, uint32_t, a + b)
#define H1(name, T, expr)                                 \
  void name(Warp& w, const Inst& i) {                     \
    unary<T, T>(w, i, PTXSIM_FN(T a) { return (expr); }); \
  }
#define H2(name, T, expr)                                          \
  void name(Warp& w, const Inst& i) {                              \
    binary<T, T, T>(w, i, PTXSIM_FN(T a, T b) { return (expr); }); \
  }
#define H3(name, T, expr)                                                   \
  void name(Warp& w, const Inst& i) {                                       \
    ternary<T, T, T, T>(w, i, PTXSIM_FN(T a, T b, T c) { return (expr); }); \
  }
#define FOR_UNSIGNED(M) M(16, uint16_t) M(32, uint32_t) M(64, uint64_t)
#define FOR_TYPED(M) \
  M(u16, uint16_t) M(s16, int16_t) M(u32, uint32_t) M(s32, int32_t) M(u64, uint64_t) M(s64, int64_t)

using u128 = unsigned __int128;
using s128 = __int128;

#define BITS_HANDLERS(S, T)                                                                              \
  H2(add_##S, T, a + b)                                                                                  \
  H2(sub_##S, T, a - b)                                                                                  \
  H2(mul_lo_##S, T, static_cast<uint64_t>(a) * static_cast<uint64_t>(b))                                 \
  H3(mad_lo_##S, T, static_cast<uint64_t>(a) * static_cast<uint64_t>(b) + c)                             \
  H2(and_##S, T, a& b)                                                                                   \
  H2(or_##S, T, a | b)                                                                                   \
  H2(xor_##S, T, a ^ b)                                                                                  \
  H1(not_##S, T, ~a)                                                                                     \
  H1(cnot_##S, T, a == 0)                                                                                \
  H1(mov_##S, T, a)                                                                                      \
  void shl_##S(Warp& w, const Inst& i) {                                                                 \
    binary<T, T, uint32_t>(                                                                              \
        w, i, PTXSIM_FN(T a, uint32_t b) { return b < S ? static_cast<T>(a << (b & (S - 1))) : T(0); }); \
  }                                                                                                      \
  void shr_u##S(Warp& w, const Inst& i) {                                                                \
    binary<T, T, uint32_t>(                                                                              \
        w, i, PTXSIM_FN(T a, uint32_t b) { return b < S ? static_cast<T>(a >> (b & (S - 1))) : T(0); }); \
  }                                                                                                      \
  void selp_##S(Warp& w, const Inst& i) {                                                                \
    const uint32_t p = w.pred[i.r[3]] ^ (i.aux ? kAllLanes : 0u);                                        \
    const T *a = reg<T>(w, i.r[1]), *b = reg<T>(w, i.r[2]);                                              \
    write_lanes(w, reg<T>(w, i.r[0]),                                                                    \
                [&](int l) __attribute__((always_inline)) { return (p >> l) & 1 ? a[l] : b[l]; });       \
  }
FOR_UNSIGNED(BITS_HANDLERS)

#define SHIFT_SIGNED(S, T)                                                                      \
  void shr_s##S(Warp& w, const Inst& i) {                                                       \
    binary<T, T, uint32_t>(                                                                     \
        w, i, PTXSIM_FN(T a, uint32_t b) { return static_cast<T>(a >> (b < S ? b : S - 1)); }); \
  }
SHIFT_SIGNED(16, int16_t)
SHIFT_SIGNED(32, int32_t)
SHIFT_SIGNED(64, int64_t)

template <class T>
PTXSIM_INLINE T divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if (static_cast<T>(-1) < 0 && b == static_cast<T>(-1)) return static_cast<T>(0 - static_cast<uint64_t>(a));
  return static_cast<T>(a / b);
}
template <class T>
PTXSIM_INLINE T remainder(T a, T b) {
  if (b == 0) return a;
  if (static_cast<T>(-1) < 0 && b == static_cast<T>(-1)) return 0;
  return static_cast<T>(a % b);
}
template <class T>
PTXSIM_INLINE T high_product(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    if constexpr (static_cast<T>(-1) < 0)
      return static_cast<T>((static_cast<s128>(a) * b) >> 64);
    else
      return static_cast<T>((static_cast<u128>(a) * b) >> 64);
  } else if constexpr (static_cast<T>(-1) < 0) {
    return static_cast<T>((static_cast<int64_t>(a) * b) >> (8 * sizeof(T)));
  } else {
    return static_cast<T>((static_cast<uint64_t>(a) * b) >> (8 * sizeof(T)));
  }
}
template <class T>
PTXSIM_INLINE T magnitude(T a) {
  return a < 0 ? static_cast<T>(0 - static_cast<uint64_t>(a)) : a;
}
template <class T>
PTXSIM_INLINE T distance(T a, T b) {
  return static_cast<T>(a < b ? static_cast<uint64_t>(b) - static_cast<uint64_t>(a)
                              : static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
}

// Index of the highest bit that differs from the sign, or -1.
template <class T>
PTXSIM_INLINE uint32_t highest_bit(T a, bool shift_amount) {
  uint64_t v = static_cast<uint64_t>(a);
  if constexpr (static_cast<T>(-1) < 0) {
    if (a < 0) v = ~v;
    if constexpr (sizeof(T) == 4) v &= 0xffffffffu;
  }
  if (v == 0) return 0xffffffffu;
  const uint32_t index = 63u - static_cast<uint32_t>(__builtin_clzll(v));
  return shift_amount ? static_cast<uint32_t>(sizeof(T) * 8 - 1) - index : index;
}
template <class T>
PTXSIM_INLINE T extract_field(T a, uint32_t position, uint32_t length) {
  constexpr uint32_t bits = sizeof(T) * 8;
  const uint32_t pos = position & 255, len = length & 255;
  constexpr bool is_signed = static_cast<T>(-1) < 0;
  if (len == 0) return 0;
  const uint64_t raw =
      sizeof(T) == 4 ? static_cast<uint64_t>(static_cast<uint32_t>(a)) : static_cast<uint64_t>(a);
  const uint32_t last = pos + len - 1 < bits - 1 ? pos + len - 1 : bits - 1;
  const bool sign = is_signed && ((raw >> last) & 1);
  uint64_t out = pos < bits ? raw >> pos : 0;
  const uint32_t have = pos < bits ? (len < bits - pos ? len : bits - pos) : 0;
  if (have < 64) {
    out &= (1ull << have) - 1;
    if (sign) out |= ~0ull << have;
  }
  if (!is_signed && have == 0) out = 0;
  return static_cast<T>(out);
}
template <class T>
PTXSIM_INLINE T insert_field(T a, T b, uint32_t position, uint32_t length) {
  constexpr uint32_t bits = sizeof(T) * 8;
  const uint32_t pos = position & 255, len = length & 255;
  if (pos >= bits || len == 0) return b;
  const uint64_t field = len >= 64 ? ~0ull : (1ull << len) - 1;
  const uint64_t mask = field << pos;
  return static_cast<T>((static_cast<uint64_t>(b) & ~mask) | ((static_cast<uint64_t>(a) << pos) & mask));
}

#define TYPED_HANDLERS(S, T)                                                                 \
  H2(min_##S, T, a < b ? a : b)                                                              \
  H2(max_##S, T, a < b ? b : a)                                                              \
  H2(div_##S, T, divide<T>(a, b))                                                            \
  H2(rem_##S, T, remainder<T>(a, b))                                                         \
  H2(mul_hi_##S, T, high_product<T>(a, b))                                                   \
  H3(mad_hi_##S, T, high_product<T>(a, b) + c)                                               \
  H3(sad_##S, T, distance<T>(a, b) + c)                                                      \
  H1(neg_##S, T, 0 - static_cast<uint64_t>(a))                                               \
  H1(abs_##S, T, magnitude<T>(a))                                                            \
  void bfind_##S(Warp& w, const Inst& i) {                                                   \
    unary<uint32_t, T>(w, i, PTXSIM_FN(T a) { return highest_bit<T>(a, false); });           \
  }                                                                                          \
  void bfind_shift_##S(Warp& w, const Inst& i) {                                             \
    unary<uint32_t, T>(w, i, PTXSIM_FN(T a) { return highest_bit<T>(a, true); });            \
  }                                                                                          \
  void bfe_##S(Warp& w, const Inst& i) {                                                     \
    ternary<T, T, uint32_t, uint32_t>(                                                       \
        w, i, PTXSIM_FN(T a, uint32_t b, uint32_t c) { return extract_field<T>(a, b, c); }); \
  }
FOR_TYPED(TYPED_HANDLERS)

#define WIDE_HANDLERS(S, N, W)                                                                    \
  void mul_wide_##S(Warp& w, const Inst& i) {                                                     \
    binary<W, N, N>(w, i, PTXSIM_FN(N a, N b) { return static_cast<W>(a) * static_cast<W>(b); }); \
  }                                                                                               \
  void mad_wide_##S(Warp& w, const Inst& i) {                                                     \
    ternary<W, N, N, W>(                                                                          \
        w, i, PTXSIM_FN(N a, N b, W c) {                                                          \
          return static_cast<W>(static_cast<uint64_t>(static_cast<W>(a) * static_cast<W>(b)) +    \
                                static_cast<uint64_t>(c));                                        \
        });                                                                                       \
  }
WIDE_HANDLERS(u16, uint16_t, uint32_t)
WIDE_HANDLERS(s16, int16_t, int32_t)
WIDE_HANDLERS(u32, uint32_t, uint64_t)
WIDE_HANDLERS(s32, int32_t, int64_t)

H2(mul24_u32, uint32_t, (a & 0xffffffu) * (b & 0xffffffu))
H2(mul24_s32, int32_t, static_cast<int64_t>(a << 8 >> 8) * (b << 8 >> 8))
H3(mad24_u32, uint32_t, (a & 0xffffffu) * (b & 0xffffffu) + c)
H3(mad24_s32, int32_t, static_cast<int64_t>(a << 8 >> 8) * (b << 8 >> 8) + c)

PTXSIM_INLINE int32_t saturate32(int64_t v) {
  return static_cast<int32_t>(v > INT32_MAX ? INT32_MAX : v < INT32_MIN ? INT32_MIN : v);
}
H2(add_sat_s32, int32_t, saturate32(static_cast<int64_t>(a) + b))
H2(sub_sat_s32, int32_t, saturate32(static_cast<int64_t>(a) - b))
H2(add_16x2, uint32_t, ((a + b) & 0xffffu) | ((a & 0xffff0000u) + (b & 0xffff0000u)))
H2(sub_16x2, uint32_t, ((a - b) & 0xffffu) | ((a & 0xffff0000u) - (b & 0xffff0000u)))

template <class T, bool kMax>
PTXSIM_INLINE uint32_t extreme16x2(uint32_t a, uint32_t b) {
  const T al = static_cast<T>(a), ah = static_cast<T>(a >> 16), bl = static_cast<T>(b),
          bh = static_cast<T>(b >> 16);
  const T l = (al < bl) != kMax ? al : bl, h = (ah < bh) != kMax ? ah : bh;
  return static_cast<uint32_t>(static_cast<uint16_t>(l)) | static_cast<uint32_t>(static_cast<uint16_t>(h))
                                                               << 16;
}
H2(min_u16x2, uint32_t, (extreme16x2<uint16_t, false>(a, b)))
H2(max_u16x2, uint32_t, (extreme16x2<uint16_t, true>(a, b)))
H2(min_s16x2, uint32_t, (extreme16x2<int16_t, false>(a, b)))
H2(max_s16x2, uint32_t, (extreme16x2<int16_t, true>(a, b)))

// ---- carry chains: aux bit 0 reads the carry, bit 1 writes it
template <class T, class F>
PTXSIM_INLINE void with_carry(Warp& w, const Inst& i, F f) {
  const T *a = reg<T>(w, i.r[1]), *b = reg<T>(w, i.r[2]);
  T* d = reg<T>(w, i.r[0]);
  const uint32_t in = i.aux & 1 ? w.pred[i.r[4]] : 0;
  uint32_t out = 0;
  alignas(64) T t[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const u128 v = f(static_cast<u128>(a[l]), static_cast<u128>(b[l]), static_cast<u128>((in >> l) & 1), l);
    t[l] = static_cast<T>(v);
    out |= static_cast<uint32_t>((v >> (8 * sizeof(T))) & 1) << l;
  }
  blend(d, t, w.mask);
  if (i.aux & 2) write_predicate(w, i.r[4], out);
}
template <class T>
void add_carry(Warp& w, const Inst& i) {
  with_carry<T>(w, i, [](u128 a, u128 b, u128 c, int) { return a + b + c; });
}
template <class T>
void sub_carry(Warp& w, const Inst& i) {
  with_carry<T>(w, i, [](u128 a, u128 b, u128 c, int) { return a - b - c; });
}
template <class T, bool kHigh>
void mad_carry(Warp& w, const Inst& i) {
  const T* addend = reg<T>(w, i.r[3]);
  alignas(64) T saved[kLanes];
  __builtin_memcpy(saved, addend, sizeof(saved));
  using U = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  with_carry<T>(w, i, [&](u128 a, u128 b, u128 c, int l) {
    const T x = static_cast<T>(a), y = static_cast<T>(b);
    const U product =
        kHigh ? static_cast<U>(high_product<T>(x, y)) : static_cast<U>(static_cast<U>(x) * static_cast<U>(y));
    return static_cast<u128>(product) + static_cast<U>(saved[l]) + c;
  });
}

// ---- bits
H1(brev_32, uint32_t,
   (a = ((a >> 1) & 0x55555555u) | ((a & 0x55555555u) << 1),
    a = ((a >> 2) & 0x33333333u) | ((a & 0x33333333u) << 2),
    a = ((a >> 4) & 0x0f0f0f0fu) | ((a & 0x0f0f0f0fu) << 4), __builtin_bswap32(a)))
H1(brev_64, uint64_t,
   (a = ((a >> 1) & 0x5555555555555555u) | ((a & 0x5555555555555555u) << 1),
    a = ((a >> 2) & 0x3333333333333333u) | ((a & 0x3333333333333333u) << 2),
    a = ((a >> 4) & 0x0f0f0f0f0f0f0f0fu) | ((a & 0x0f0f0f0f0f0f0f0fu) << 4), __builtin_bswap64(a)))
void popc_32(Warp& w, const Inst& i) {
  unary<uint32_t, uint32_t>(w, i, PTXSIM_FN(uint32_t a) { return __builtin_popcount(a); });
}
void popc_64(Warp& w, const Inst& i) {
  unary<uint32_t, uint64_t>(w, i, PTXSIM_FN(uint64_t a) { return __builtin_popcountll(a); });
}
void clz_32(Warp& w, const Inst& i) {
  unary<uint32_t, uint32_t>(w, i, PTXSIM_FN(uint32_t a) { return a ? __builtin_clz(a) : 32; });
}
void clz_64(Warp& w, const Inst& i) {
  unary<uint32_t, uint64_t>(w, i, PTXSIM_FN(uint64_t a) { return a ? __builtin_clzll(a) : 64; });
}

template <class T>
void bfi(Warp& w, const Inst& i) {
  const T *a = reg<T>(w, i.r[1]), *b = reg<T>(w, i.r[2]);
  const uint32_t *c = reg<uint32_t>(w, i.r[3]), *e = reg<uint32_t>(w, i.r[4]);
  write_lanes(w, reg<T>(w, i.r[0]),
              [&](int l) __attribute__((always_inline)) { return insert_field<T>(a[l], b[l], c[l], e[l]); });
}

// The truth table is applied as a tree of selections, all 32 bits of a lane at once.
void lop3(Warp& w, const Inst& i) {
  const uint32_t *a = reg<uint32_t>(w, i.r[1]), *b = reg<uint32_t>(w, i.r[2]), *c = reg<uint32_t>(w, i.r[3]);
  uint32_t* d = reg<uint32_t>(w, i.r[0]);
  const auto with = [&](auto f) __attribute__((always_inline)) {
    write_lanes(w, d, [&](int l) __attribute__((always_inline)) { return f(a[l], b[l], c[l]); });
  };
  switch (static_cast<uint32_t>(i.imm)) {  // the tables compilers like
    case 0x80:
      return with([](uint32_t x, uint32_t y, uint32_t z) { return x & y & z; });
    case 0xea:
      return with([](uint32_t x, uint32_t y, uint32_t z) { return (x & y) | z; });
    case 0x6a:
      return with([](uint32_t x, uint32_t y, uint32_t z) { return (x & y) ^ z; });
    case 0x96:
      return with([](uint32_t x, uint32_t y, uint32_t z) { return x ^ y ^ z; });
    case 0xfe:
      return with([](uint32_t x, uint32_t y, uint32_t z) { return x | y | z; });
    case 0xca:
      return with([](uint32_t x, uint32_t y, uint32_t z) { return (x & y) | (~x & z); });
    default:
      break;
  }
  uint32_t t[8];
  for (int k = 0; k < 8; ++k) t[k] = (i.imm >> k) & 1 ? kAllLanes : 0u;
  with([&](uint32_t x, uint32_t y, uint32_t z) __attribute__((always_inline)) {
    const uint32_t z00 = (z & t[1]) | (~z & t[0]), z01 = (z & t[3]) | (~z & t[2]);
    const uint32_t z10 = (z & t[5]) | (~z & t[4]), z11 = (z & t[7]) | (~z & t[6]);
    return (x & ((y & z11) | (~y & z10))) | (~x & ((y & z01) | (~y & z00)));
  });
}
void lop3_test(Warp& w, const Inst& i) {
  const uint32_t* d = reg<uint32_t>(w, i.r[1]);
  uint32_t nonzero = 0;
  for (int l = 0; l < kLanes; ++l) nonzero |= static_cast<uint32_t>(d[l] != 0) << l;
  const uint32_t q = w.pred[i.r[2]] ^ (i.aux & 2 ? kAllLanes : 0u);
  write_predicate(w, i.r[0], i.aux & 1 ? nonzero & q : nonzero | q);
}

PTXSIM_INLINE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t out = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t s = selector >> (4 * k);
    uint32_t byte = static_cast<uint32_t>(both >> (8 * (s & 7))) & 0xffu;
    if (s & 8) byte = byte & 0x80u ? 0xffu : 0u;
    out |= byte << (8 * k);
  }
  return out;
}
H3(prmt, uint32_t, permute(a, b, c))
void prmt_imm(Warp& w, const Inst& i) {
  const uint32_t s = static_cast<uint32_t>(i.imm);
  if ((s & 0x8888u) != 0)
    return binary<uint32_t, uint32_t, uint32_t>(w, i,
                                                [s](uint32_t a, uint32_t b) { return permute(a, b, s); });
  // no sign replication: a sum of four shifted bytes
  const uint32_t shift[4] = {8 * (s & 3), 8 * (s >> 4 & 3), 8 * (s >> 8 & 3), 8 * (s >> 12 & 3)};
  const uint32_t from_b[4] = {s & 4 ? kAllLanes : 0, s & 0x40 ? kAllLanes : 0, s & 0x400 ? kAllLanes : 0,
                              s & 0x4000 ? kAllLanes : 0};
  binary<uint32_t, uint32_t, uint32_t>(w, i, [&](uint32_t a, uint32_t b) __attribute__((always_inline)) {
    const uint32_t x0 = (a & ~from_b[0]) | (b & from_b[0]), x1 = (a & ~from_b[1]) | (b & from_b[1]);
    const uint32_t x2 = (a & ~from_b[2]) | (b & from_b[2]), x3 = (a & ~from_b[3]) | (b & from_b[3]);
    return ((x0 >> shift[0]) & 0xffu) | ((x1 >> shift[1]) & 0xffu) << 8 | ((x2 >> shift[2]) & 0xffu) << 16 |
           (x3 >> shift[3]) << 24;
  });
}
template <class F>
PTXSIM_INLINE uint32_t permute_mode(uint32_t a, uint32_t b, uint32_t c, F selector) {
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t out = 0;
  for (uint32_t k = 0; k < 4; ++k)
    out |= (static_cast<uint32_t>(both >> (8 * selector(k, c & 3))) & 0xffu) << (8 * k);
  return out;
}
H3(prmt_f4e, uint32_t, permute_mode(a, b, c, [](uint32_t k, uint32_t s) { return (s + k) & 7; }))
H3(prmt_b4e, uint32_t, permute_mode(a, b, c, [](uint32_t k, uint32_t s) { return (s - k) & 7; }))
H3(prmt_rc8, uint32_t, permute_mode(a, b, c, [](uint32_t, uint32_t s) { return s; }))
H3(prmt_ecl, uint32_t, permute_mode(a, b, c, [](uint32_t k, uint32_t s) { return k > s ? k : s; }))
H3(prmt_ecr, uint32_t, permute_mode(a, b, c, [](uint32_t k, uint32_t s) { return k < s ? k : s; }))
H3(prmt_rc16, uint32_t, permute_mode(a, b, c, [](uint32_t k, uint32_t s) { return (s & 1) * 2 + (k & 1); }))

PTXSIM_INLINE uint64_t concatenate(uint32_t low, uint32_t high) {
  return low | static_cast<uint64_t>(high) << 32;
}
H3(shf_l_wrap, uint32_t, (concatenate(a, b) << (c & 31)) >> 32)
H3(shf_r_wrap, uint32_t, concatenate(a, b) >> (c & 31))
H3(shf_l_clamp, uint32_t, (concatenate(a, b) << (c < 32 ? c : 32)) >> 32)
H3(shf_r_clamp, uint32_t, concatenate(a, b) >> (c < 32 ? c : 32))

template <class A, class B, int kCount, int kWidthA, int kOffsetB>
PTXSIM_INLINE uint32_t dot(uint32_t a, uint32_t b, uint32_t c) {
  for (int k = 0; k < kCount; ++k) {
    const int32_t x =
        kWidthA == 8
            ? static_cast<int32_t>(static_cast<A>(a >> (8 * k)))
            : static_cast<int32_t>(
                  static_cast<std::conditional_t<std::is_signed_v<A>, int16_t, uint16_t>>(a >> (16 * k)));
    c += static_cast<uint32_t>(x * static_cast<int32_t>(static_cast<B>(b >> (8 * (k + kOffsetB)))));
  }
  return c;
}
#define DOT_HANDLERS(S, A, B)                               \
  H3(dp4a_##S, uint32_t, (dot<A, B, 4, 8, 0>(a, b, c)))     \
  H3(dp2a_lo_##S, uint32_t, (dot<A, B, 2, 16, 0>(a, b, c))) \
  H3(dp2a_hi_##S, uint32_t, (dot<A, B, 2, 16, 2>(a, b, c)))
DOT_HANDLERS(uu, uint8_t, uint8_t)
DOT_HANDLERS(us, uint8_t, int8_t)
DOT_HANDLERS(su, int8_t, uint8_t)
DOT_HANDLERS(ss, int8_t, int8_t)

// ---- comparisons
template <class T, class F>
PTXSIM_INLINE void compare(Warp& w, const Inst& i, F f) {
  const T *a = reg<T>(w, i.r[1]), *b = reg<T>(w, i.r[2]);
  alignas(64) int32_t t[kLanes];
#pragma GCC ivdep
  for (int l = 0; l < kLanes; ++l) t[l] = f(a[l], b[l]) ? -1 : 0;
  const uint32_t result = to_mask(t);
  uint32_t p = result, q = ~result;
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
#define COMPARE_HANDLERS(S, T)                         \
  void setp_eq_##S(Warp& w, const Inst& i) {           \
    compare<T>(w, i, [](T a, T b) { return a == b; }); \
  }                                                    \
  void setp_ne_##S(Warp& w, const Inst& i) {           \
    compare<T>(w, i, [](T a, T b) { return a != b; }); \
  }                                                    \
  void setp_lt_##S(Warp& w, const Inst& i) {           \
    compare<T>(w, i, [](T a, T b) { return a < b; });  \
  }                                                    \
  void setp_le_##S(Warp& w, const Inst& i) {           \
    compare<T>(w, i, [](T a, T b) { return a <= b; }); \
  }                                                    \
  void setp_gt_##S(Warp& w, const Inst& i) {           \
    compare<T>(w, i, [](T a, T b) { return a > b; });  \
  }                                                    \
  void setp_ge_##S(Warp& w, const Inst& i) {           \
    compare<T>(w, i, [](T a, T b) { return a >= b; }); \
  }
FOR_TYPED(COMPARE_HANDLERS)

void set_32(Warp& w, const Inst& i) {
  const uint32_t p = w.pred[i.r[1]];
  write_lanes(w, reg<uint32_t>(w, i.r[0]),
              [&](int l) __attribute__((always_inline)) { return (p >> l) & 1 ? 0xffffffffu : 0u; });
}
void set_f32(Warp& w, const Inst& i) {
  const uint32_t p = w.pred[i.r[1]];
  write_lanes(w, reg<float>(w, i.r[0]),
              [&](int l) __attribute__((always_inline)) { return (p >> l) & 1 ? 1.0f : 0.0f; });
}
template <uint16_t kTrue>
void set_16(Warp& w, const Inst& i) {
  const uint32_t p = w.pred[i.r[1]];
  write_lanes(w, reg<uint16_t>(w, i.r[0]), [&](int l) __attribute__((always_inline)) {
    return static_cast<uint16_t>((p >> l) & 1 ? kTrue : 0);
  });
}
template <class T, class C>
void slct(Warp& w, const Inst& i) {
  ternary<T, T, T, C>(w, i, [](T a, T b, C c) __attribute__((always_inline)) { return c >= 0 ? a : b; });
}

// ---- predicates
void pred_not(Warp& w, const Inst& i) {
  write_predicate(w, i.r[0], ~(w.pred[i.r[1]] ^ (i.aux & 1 ? kAllLanes : 0u)));
}
template <int kOp>
void pred_op(Warp& w, const Inst& i) {
  const uint32_t a = w.pred[i.r[1]] ^ (i.aux & 1 ? kAllLanes : 0u),
                 b = w.pred[i.r[2]] ^ (i.aux & 2 ? kAllLanes : 0u);
  write_predicate(w, i.r[0], kOp == 0 ? a & b : kOp == 1 ? a | b : a ^ b);
}
void pred_mov(Warp& w, const Inst& i) {
  write_predicate(w, i.r[0], w.pred[i.r[1]] ^ (i.aux ? kAllLanes : 0u));
}
void pred_mov_imm(Warp& w, const Inst& i) {
  write_predicate(w, i.r[0], static_cast<uint32_t>(i.imm));
}

// ---- moves between registers of different width
template <class W, class N, int kParts>
void pack(Warp& w, const Inst& i) {
  const N* part[kParts];
  for (int k = 0; k < kParts; ++k) part[k] = reg<N>(w, i.r[1 + k]);
  write_lanes(w, reg<W>(w, i.r[0]), [&](int l) __attribute__((always_inline)) {
    W v = 0;
    for (int k = 0; k < kParts; ++k)
      v |= static_cast<W>(static_cast<W>(part[k][l]) << (8 * sizeof(N) * static_cast<size_t>(k)));
    return v;
  });
}
template <class W, class N, int kParts>
void unpack(Warp& w, const Inst& i) {
  alignas(64) W whole[kLanes];
  __builtin_memcpy(whole, reg<W>(w, i.r[0]), sizeof(whole));
  for (int k = 0; k < kParts; ++k)
    write_lanes(w, reg<N>(w, i.r[1 + k]), [&](int l) __attribute__((always_inline)) {
      return static_cast<N>(whole[l] >> (8 * sizeof(N) * static_cast<size_t>(k)));
    });
}

void cvta(Warp& w, const Inst& i) {
  const uint64_t window = static_cast<uint64_t>(i.imm);
  unary<uint64_t, uint64_t>(w, i, [=](uint64_t a) { return a | window; });
}
void cvta_to(Warp& w, const Inst& i) {
  const uint64_t window = static_cast<uint64_t>(i.imm);
  unary<uint64_t, uint64_t>(w, i, [=](uint64_t a) { return a & ~window; });
}
void isspacep(Warp& w, const Inst& i) {
  const uint64_t* a = reg<uint64_t>(w, i.r[1]);
  const auto windows = static_cast<uint64_t>(i.imm);  // bit n: addresses whose upper byte is n
  uint32_t m = 0;
  for (int l = 0; l < kLanes; ++l)
    m |= static_cast<uint32_t>((a[l] >> 56) < 64 && (windows >> (a[l] >> 56 & 63) & 1) != 0) << l;
  write_predicate(w, i.r[0], m);
}

// ---- integer extension and truncation: `from` is how the value is read, In the register it sits in
template <class Out, class From, class In>
void extend(Warp& w, const Inst& i) {
  unary<Out, In>(w, i,
                 [](In a) __attribute__((always_inline)) { return static_cast<Out>(static_cast<From>(a)); });
}
template <class From, class To>
PTXSIM_INLINE int64_t clamp_to(From v) {
  if constexpr (std::is_signed_v<From>) {
    if constexpr (std::is_signed_v<To>) {
      constexpr int64_t low = sizeof(To) == 8 ? INT64_MIN : -(1ll << (8 * sizeof(To) - 1)),
                        high = sizeof(To) == 8 ? INT64_MAX : (1ll << (8 * sizeof(To) - 1)) - 1;
      return v < low ? low : v > high ? high : v;
    } else {
      constexpr uint64_t high = sizeof(To) == 8 ? ~0ull : (1ull << (8 * (sizeof(To) & 7))) - 1;
      return v < 0 ? 0 : static_cast<uint64_t>(v) > high ? static_cast<int64_t>(high) : v;
    }
  } else {
    constexpr uint64_t high = std::is_signed_v<To> ? (1ull << (8 * sizeof(To) - 1)) - 1
                              : sizeof(To) == 8    ? ~0ull
                                                   : (1ull << (8 * (sizeof(To) & 7))) - 1;
    return static_cast<int64_t>(v > high ? high : v);
  }
}
template <class From, class To>
void clamp(Warp& w, const Inst& i) {
  unary<int64_t, From>(w, i, [](From a) __attribute__((always_inline)) { return clamp_to<From, To>(a); });
}

void nop(Warp&, const Inst&) {}

#define BITS_ENTRIES(S, T)                                                                            \
  {"add." #S, add_##S}, {"sub." #S, sub_##S}, {"mul.lo." #S, mul_lo_##S}, {"mad.lo." #S, mad_lo_##S}, \
      {"and." #S, and_##S}, {"or." #S, or_##S}, {"xor." #S, xor_##S}, {"not." #S, not_##S},           \
      {"cnot." #S, cnot_##S}, {"mov." #S, mov_##S}, {"shl." #S, shl_##S}, {"shr.u" #S, shr_u##S},     \
      {"shr.s" #S, shr_s##S}, {"selp." #S, selp_##S},
#define TYPED_ENTRIES(S, T)                                                                               \
  {"min." #S, min_##S}, {"max." #S, max_##S}, {"div." #S, div_##S}, {"rem." #S, rem_##S},                 \
      {"mul.hi." #S, mul_hi_##S}, {"mad.hi." #S, mad_hi_##S}, {"sad." #S, sad_##S}, {"neg." #S, neg_##S}, \
      {"abs." #S, abs_##S}, {"bfind." #S, bfind_##S}, {"bfind.shiftamt." #S, bfind_shift_##S},            \
      {"bfe." #S, bfe_##S}, {"setp.eq." #S, setp_eq_##S}, {"setp.ne." #S, setp_ne_##S},                   \
      {"setp.lt." #S, setp_lt_##S}, {"setp.le." #S, setp_le_##S}, {"setp.gt." #S, setp_gt_##S},           \
      {"setp.ge." #S, setp_ge_##S},
#define WIDE_ENTRIES(S) {"mul.wide." #S, mul_wide_##S}, {"mad.wide." #S, mad_wide_##S},
#define DOT_ENTRIES(a, b, S) \
  {"dp4a." a "." b, dp4a_##S}, {"dp2a.lo." a "." b, dp2a_lo_##S}, {"dp2a.hi." a "." b, dp2a_hi_##S},
#define EXTEND_TO(out, Out, from, From, suffix, In) {"ext." out "." from suffix, extend<Out, From, In>},
#define EXTEND_ALL(from, From, suffix, In)          \
  EXTEND_TO("16", uint16_t, from, From, suffix, In) \
  EXTEND_TO("32", uint32_t, from, From, suffix, In) \
  EXTEND_TO("64", uint64_t, from, From, suffix, In)
#define CLAMP_ENTRIES(to, To) {"clamp.s64." to, clamp<int64_t, To>}, {"clamp.u64." to, clamp<uint64_t, To>},

const HandlerEntry kEntries[] = {
    FOR_UNSIGNED(BITS_ENTRIES) FOR_TYPED(TYPED_ENTRIES) WIDE_ENTRIES(u16) WIDE_ENTRIES(s16) WIDE_ENTRIES(u32)
        WIDE_ENTRIES(s32){"mul24.lo.u32", mul24_u32},
    {"mul24.lo.s32", mul24_s32},
    {"mad24.lo.u32", mad24_u32},
    {"mad24.lo.s32", mad24_s32},
    {"add.sat.s32", add_sat_s32},
    {"sub.sat.s32", sub_sat_s32},
    {"add.16x2", add_16x2},
    {"sub.16x2", sub_16x2},
    {"min.u16x2", min_u16x2},
    {"max.u16x2", max_u16x2},
    {"min.s16x2", min_s16x2},
    {"max.s16x2", max_s16x2},
    {"add.carry.32", add_carry<uint32_t>},
    {"add.carry.64", add_carry<uint64_t>},
    {"sub.carry.32", sub_carry<uint32_t>},
    {"sub.carry.64", sub_carry<uint64_t>},
    {"mad.carry.lo.32", mad_carry<uint32_t, false>},
    {"mad.carry.lo.64", mad_carry<uint64_t, false>},
    {"mad.carry.hi.u32", mad_carry<uint32_t, true>},
    {"mad.carry.hi.s32", mad_carry<int32_t, true>},
    {"mad.carry.hi.u64", mad_carry<uint64_t, true>},
    {"mad.carry.hi.s64", mad_carry<int64_t, true>},
    {"brev.32", brev_32},
    {"brev.64", brev_64},
    {"popc.32", popc_32},
    {"popc.64", popc_64},
    {"clz.32", clz_32},
    {"clz.64", clz_64},
    {"bfi.32", bfi<uint32_t>},
    {"bfi.64", bfi<uint64_t>},
    {"lop3", lop3},
    {"lop3.test", lop3_test},
    {"prmt", prmt},
    {"prmt.imm", prmt_imm},
    {"prmt.f4e", prmt_f4e},
    {"prmt.b4e", prmt_b4e},
    {"prmt.rc8", prmt_rc8},
    {"prmt.ecl", prmt_ecl},
    {"prmt.ecr", prmt_ecr},
    {"prmt.rc16", prmt_rc16},
    {"shf.l.wrap", shf_l_wrap},
    {"shf.r.wrap", shf_r_wrap},
    {"shf.l.clamp", shf_l_clamp},
    {"shf.r.clamp", shf_r_clamp},
    DOT_ENTRIES("u32", "u32", uu) DOT_ENTRIES("u32", "s32", us) DOT_ENTRIES("s32", "u32", su)
        DOT_ENTRIES("s32", "s32", ss){"set.32", set_32},
    {"set.f32", set_f32},
    {"set.16.u16", set_16<0xffff>},
    {"set.16.s16", set_16<0xffff>},
    {"set.16.f16", set_16<0x3c00>},
    {"set.16.bf16", set_16<0x3f80>},
    {"slct.32.s32", slct<uint32_t, int32_t>},
    {"slct.64.s32", slct<uint64_t, int32_t>},
    {"slct.32.f32", slct<uint32_t, float>},
    {"slct.64.f32", slct<uint64_t, float>},
    {"not.pred", pred_not},
    {"and.pred", pred_op<0>},
    {"or.pred", pred_op<1>},
    {"xor.pred", pred_op<2>},
    {"mov.pred", pred_mov},
    {"mov.pred.imm", pred_mov_imm},
    {"pack.32.16", pack<uint32_t, uint16_t, 2>},
    {"pack.64.32", pack<uint64_t, uint32_t, 2>},
    {"pack.64.16", pack<uint64_t, uint16_t, 4>},
    {"unpack.32.16", unpack<uint32_t, uint16_t, 2>},
    {"unpack.64.32", unpack<uint64_t, uint32_t, 2>},
    {"unpack.64.16", unpack<uint64_t, uint16_t, 4>},
    {"cvta", cvta},
    {"cvta.to", cvta_to},
    {"isspacep", isspacep},
    {"nop", nop},
    EXTEND_ALL("u8", uint8_t, ".in16", uint16_t) EXTEND_ALL("s8", int8_t, ".in16", uint16_t)
        EXTEND_ALL("u8", uint8_t, ".in32", uint32_t) EXTEND_ALL("s8", int8_t, ".in32", uint32_t) EXTEND_ALL(
            "u8", uint8_t, ".in64", uint64_t) EXTEND_ALL("s8", int8_t, ".in64", uint64_t)
            EXTEND_ALL("u16", uint16_t, "", uint16_t) EXTEND_ALL("s16", int16_t, "", uint16_t) EXTEND_ALL(
                "u16", uint16_t, ".in32", uint32_t) EXTEND_ALL("s16", int16_t, ".in32", uint32_t)
                EXTEND_ALL("u16", uint16_t, ".in64", uint64_t) EXTEND_ALL("s16", int16_t, ".in64", uint64_t)
                    EXTEND_ALL("u32", uint32_t, "", uint32_t) EXTEND_ALL("s32", int32_t, "", uint32_t)
                        EXTEND_ALL("u32", uint32_t, ".in64", uint64_t) EXTEND_ALL(
                            "s32", int32_t, ".in64", uint64_t) EXTEND_ALL("u64", uint64_t, "", uint64_t)
                            EXTEND_ALL("s64", int64_t, "", uint64_t) CLAMP_ENTRIES("u8", uint8_t)
                                CLAMP_ENTRIES("s8", int8_t) CLAMP_ENTRIES("u16", uint16_t)
                                    CLAMP_ENTRIES("s16", int16_t) CLAMP_ENTRIES("u32", uint32_t)
                                        CLAMP_ENTRIES("s32", int32_t) CLAMP_ENTRIES("u64", uint64_t)
                                            CLAMP_ENTRIES("s64", int64_t)};

}  // namespace

extern const HandlerTable integer_handlers;
const HandlerTable integer_handlers = {kEntries, sizeof(kEntries) / sizeof(kEntries[0])};

}  // namespace ptxsim::PTXSIM_ISA
