// SPDX-License-Identifier: Apache-2.0
//
// Sums of products of a line of 4-bit codes (layout/quantized_panel.h) and four inputs, one output row per
// lane, in the ways the instruction sets have.
//
//   IntegerProducts   inputs are int8: exact integers. With VNNI four products go into a 32-bit sum at once;
//                     otherwise pairs go into 16-bit sums, which a block of 32 inputs cannot overflow:
//                     15 * 127 * 16 < 2^15
//   ByteProducts      the same with codes of 8 bits
//   WideProducts      either of them with inputs of 12 bits, in two planes of bytes (quantize_rows.h)
//   Bf16Products      inputs are bf16, in the order 0 2 1 3 of every four (a 32-bit word of a line holds
//   codes
//                     of inputs 0 and 2 at the same distance as 1 and 3)
//
// A call of add_line has kHalves of the panel's two halves, rows r and r + 16. The second half's sums come
// out kHighScale times too large: where codes stay in the upper bits of a byte they are sixteenfold, and a
// factor of 2^-4 in the scale is exact.
#pragma once

#include "core/simd.h"
#include "cpu/linear_tile.h"  // each
#include "layout/quantized_panel.h"

namespace fs::FS_ISA {

[[gnu::always_inline]] inline int32_t word_at(const void* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

struct IntegerProducts {
  using Input = int8_t;
  static constexpr int kPlanes = 1;
  static constexpr bool kHasScales = true;  // of the inputs, one per block
  static constexpr int kHalves = 2;
  static constexpr int kLineBytes = 64;

#if defined(FS_SIMD_BF16)
  static constexpr int kHighScale = 16;
  struct Sum {
    __m512i v;
  };
  struct Codes {
    __m512i v;
  };
  static FS_INLINE Codes line(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  static FS_INLINE Codes low(Codes c) { return {_mm512_and_si512(c.v, _mm512_set1_epi8(0x0f))}; }
  static FS_INLINE Codes high(Codes c, Codes low) { return {_mm512_xor_si512(c.v, low.v)}; }
  static FS_INLINE Codes spread(const int8_t* x) { return {_mm512_set1_epi32(word_at(x))}; }
  static FS_INLINE Sum begin(int32_t offset) { return {_mm512_set1_epi32(offset)}; }
  static FS_INLINE void add(Sum& sum, Codes codes, Codes inputs) {
    sum.v = _mm512_dpbusd_epi32(sum.v, codes.v, inputs.v);
  }
  static FS_INLINE vf total(Sum sum, int32_t) { return {_mm512_cvtepi32_ps(sum.v)}; }
#elif defined(FS_SIMD_AVX512)
  static constexpr int kHighScale = 1;
  struct Sum {
    __m512i v;
  };
  struct Codes {
    __m512i v;
  };
  static FS_INLINE Codes line(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  static FS_INLINE Codes low(Codes c) { return {_mm512_and_si512(c.v, _mm512_set1_epi8(0x0f))}; }
  static FS_INLINE Codes high(Codes c, Codes) { return low({_mm512_srli_epi16(c.v, 4)}); }
  static FS_INLINE Codes spread(const int8_t* x) { return {_mm512_set1_epi32(word_at(x))}; }
  static FS_INLINE Sum begin(int32_t) { return {_mm512_setzero_si512()}; }
  static FS_INLINE void add(Sum& sum, Codes codes, Codes inputs) {
    sum.v = _mm512_add_epi16(sum.v, _mm512_maddubs_epi16(codes.v, inputs.v));
  }
  static FS_INLINE vf total(Sum sum, int32_t offset) {
    const __m512i pairs = _mm512_madd_epi16(sum.v, _mm512_set1_epi16(1));
    return {_mm512_cvtepi32_ps(_mm512_add_epi32(pairs, _mm512_set1_epi32(offset)))};
  }
#elif defined(FS_SIMD_AVX2)
  static constexpr int kHighScale = 1;
  struct Sum {
    __m256i v;
  };
  struct Codes {
    __m256i v;
  };
  static FS_INLINE Codes line(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static FS_INLINE Codes low(Codes c) { return {_mm256_and_si256(c.v, _mm256_set1_epi8(0x0f))}; }
  static FS_INLINE Codes high(Codes c, Codes) { return low({_mm256_srli_epi16(c.v, 4)}); }
  static FS_INLINE Codes spread(const int8_t* x) { return {_mm256_set1_epi32(word_at(x))}; }
  static FS_INLINE Sum begin(int32_t) { return {_mm256_setzero_si256()}; }
  static FS_INLINE void add(Sum& sum, Codes codes, Codes inputs) {
    sum.v = _mm256_add_epi16(sum.v, _mm256_maddubs_epi16(codes.v, inputs.v));
  }
  static FS_INLINE vf total(Sum sum, int32_t offset) {
    const __m256i pairs = _mm256_madd_epi16(sum.v, _mm256_set1_epi16(1));
    return {_mm256_cvtepi32_ps(_mm256_add_epi32(pairs, _mm256_set1_epi32(offset)))};
  }
#else
  static constexpr int kHighScale = 1;
  typedef int16_t v8h __attribute__((vector_size(16)));
  typedef uint16_t v8u __attribute__((vector_size(16)));
  struct Sum {
    v8h v;
  };
  struct Codes {
    v8u even, odd;  // inputs 0 and 2, inputs 1 and 3
  };
  struct Inputs {
    v8h even, odd;
  };
  static FS_INLINE Codes line(const uint8_t* p) {
    v8u bytes;
    std::memcpy(&bytes, p, sizeof(bytes));
    return {bytes & 0xff, bytes >> 8};
  }
  static FS_INLINE Codes low(Codes c) { return {c.even & 0x0f, c.odd & 0x0f}; }
  static FS_INLINE Codes high(Codes c, Codes) { return {c.even >> 4, c.odd >> 4}; }
  static FS_INLINE Inputs spread(const int8_t* x) {
    return {v8h{x[0], x[2], x[0], x[2], x[0], x[2], x[0], x[2]},
            v8h{x[1], x[3], x[1], x[3], x[1], x[3], x[1], x[3]}};
  }
  static FS_INLINE Sum begin(int32_t) { return {v8h{}}; }
  static FS_INLINE void add(Sum& sum, Codes codes, Inputs x) {
    sum.v += (v8h)codes.even * x.even + (v8h)codes.odd * x.odd;
  }
  static FS_INLINE vf total(Sum sum, int32_t offset) {
    const v4i words = (v4i)sum.v;
    return {__builtin_convertvector((words << 16 >> 16) + (words >> 16) + offset, v4f)};
  }
#endif

  // The products of a line's two halves and M rows of inputs: sums[(half * V + v) * M + m].
  template <int V, int M>
  static FS_INLINE void add_line(Sum (&sums)[2 * V * M], const uint8_t* p, const int8_t* x,
                                 int64_t x_stride) {
    decltype(line(p)) lows[V], highs[V];
    each<V>([&](auto v) FS_INLINE {
      const auto codes = line(p + v.value * 4 * kLanes);
      lows[v.value] = low(codes);
      highs[v.value] = high(codes, lows[v.value]);
    });
    each<M>([&](auto m) FS_INLINE {
      const auto inputs = spread(x + m.value * x_stride);
      each<V>([&](auto v) FS_INLINE {
        add(sums[v.value * M + m.value], lows[v.value], inputs);
        add(sums[(V + v.value) * M + m.value], highs[v.value], inputs);
      });
    });
  }
};

struct ByteProducts {
  using Input = int8_t;
  static constexpr int kPlanes = 1;
  static constexpr bool kHasScales = true;
  static constexpr int kHighScale = 1;
  static constexpr int kLineBytes = 128;

#if defined(FS_SIMD_BF16)
  static constexpr int kHalves = 2;
  using Sum = IntegerProducts::Sum;
  static FS_INLINE Sum begin(int32_t offset) { return IntegerProducts::begin(offset); }
  static FS_INLINE vf total(Sum sum, int32_t offset) { return IntegerProducts::total(sum, offset); }

  template <int V, int M>
  static FS_INLINE void add_line(Sum (&sums)[2 * V * M], const uint8_t* p, const int8_t* x,
                                 int64_t x_stride) {
    static_assert(V == 1);
    const auto lows = IntegerProducts::line(p), highs = IntegerProducts::line(p + 64);
    each<M>([&](auto m) FS_INLINE {
      const auto inputs = IntegerProducts::spread(x + m.value * x_stride);
      IntegerProducts::add(sums[m.value], lows, inputs);
      IntegerProducts::add(sums[M + m.value], highs, inputs);
    });
  }
#else
  // As two codes of 4 bits: products of unsigned bytes would overflow the 16-bit sums.
  static constexpr int kHalves = 1;
  struct Sum {
    IntegerProducts::Sum low, high;
  };
  static FS_INLINE Sum begin(int32_t) { return {IntegerProducts::begin(0), IntegerProducts::begin(0)}; }
  static FS_INLINE vf total(Sum sum, int32_t offset) {
    const vf high = IntegerProducts::total(sum.high, 0);
    return fma(high, set1(16.0f), IntegerProducts::total(sum.low, offset));  // integers below 2^24: exact
  }

  template <int V, int M>
  static FS_INLINE void add_line(Sum (&sums)[V * M], const uint8_t* p, const int8_t* x, int64_t x_stride) {
    each<V>([&](auto v) FS_INLINE {
      const auto codes = IntegerProducts::line(p + v.value * 4 * kLanes);
      const auto lows = IntegerProducts::low(codes), highs = IntegerProducts::high(codes, lows);
      each<M>([&](auto m) FS_INLINE {
        const auto inputs = IntegerProducts::spread(x + m.value * x_stride);
        IntegerProducts::add(sums[v.value * M + m.value].low, lows, inputs);
        IntegerProducts::add(sums[v.value * M + m.value].high, highs, inputs);
      });
    });
  }
#endif
};

// Sums stay below 2^24 (15 * 16 * 2047 * 32 and 255 * 2047 * 32), so they are exact as float32.
template <class Products>
struct WideProducts {
  using Input = int8_t;
  static constexpr int kPlanes = 2;
  static constexpr bool kHasScales = true;
  static constexpr int kHalves = Products::kHalves;
  static constexpr int kHighScale = Products::kHighScale;
  static constexpr int kLineBytes = Products::kLineBytes;
  struct Sum {
    typename Products::Sum lower, upper;
  };
  static FS_INLINE Sum begin(int32_t offset) { return {Products::begin(offset), Products::begin(0)}; }
  static FS_INLINE vf total(Sum sum, int32_t offset) {
    return fma(Products::total(sum.upper, 0), set1(16.0f), Products::total(sum.lower, offset));
  }

  template <int V, int M>
  static FS_INLINE void add_line(Sum (&sums)[kHalves * V * M], const uint8_t* p, const int8_t* x,
                                 int64_t x_stride) {
    typename Products::Sum lower[kHalves * V * M], upper[kHalves * V * M];
    each<kHalves * V * M>([&](auto i) FS_INLINE {
      lower[i.value] = sums[i.value].lower;
      upper[i.value] = sums[i.value].upper;
    });
    Products::template add_line<V, M>(lower, p, x, x_stride);
    Products::template add_line<V, M>(upper, p, x + QuantizedPanels::kBlock, x_stride);
    each<kHalves * V * M>([&](auto i) FS_INLINE { sums[i.value] = {lower[i.value], upper[i.value]}; });
  }
};

#if defined(FS_SIMD_BF16)
// 0 to 15, or -8 to 7, as bf16, twice: the instruction that looks them up reads five bits.
struct alignas(64) Bf16Table {
  bf16 value[32];
};
constexpr Bf16Table bf16_codes(int offset) {
  Bf16Table table{};
  for (int i = 0; i < 32; ++i) {
    table.value[i] =
        static_cast<bf16>(__builtin_bit_cast(uint32_t, static_cast<float>(i % 16 + offset)) >> 16);
  }
  return table;
}
inline constexpr Bf16Table kBf16Codes = bf16_codes(0);
inline constexpr Bf16Table kBf16SignedCodes = bf16_codes(-8);

template <bool kSigned>
struct Bf16Products {
  using Input = bf16;
  static constexpr int kPlanes = 1;
  static constexpr bool kHasScales = false;
  static constexpr int kHalves = 2;
  static constexpr int kHighScale = 1;
  static constexpr int kLineBytes = 64;
  using Sum = vf;
  static FS_INLINE Sum begin(int32_t) { return zero(); }
  static FS_INLINE vf total(Sum sum, int32_t) { return sum; }

  template <int V, int M>
  static FS_INLINE void add_line(Sum (&sums)[2 * V * M], const uint8_t* p, const bf16* x, int64_t x_stride) {
    static_assert(V == 1);
    const __m512i table = _mm512_load_si512(kSigned ? &kBf16SignedCodes : &kBf16Codes);
    const __m512i codes = _mm512_loadu_si512(p);
    each<2>([&](auto pair) FS_INLINE {
      const __m512i lows =
          _mm512_permutexvar_epi16(pair.value == 0 ? codes : _mm512_srli_epi16(codes, 8), table);
      const __m512i highs = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8 * pair.value + 4), table);
      each<M>([&](auto m) FS_INLINE {
        const __m512i inputs = _mm512_set1_epi32(word_at(x + m.value * x_stride + 2 * pair.value));
        vf& low = sums[m.value];
        vf& high = sums[M + m.value];
        low.v = _mm512_dpbf16_ps(low.v, (__m512bh)lows, (__m512bh)inputs);
        high.v = _mm512_dpbf16_ps(high.v, (__m512bh)highs, (__m512bh)inputs);
      });
    });
  }
};
#endif

// Codes of input j of a line's words as floats: of 4 bits the half given, or of 8 bits.
[[gnu::always_inline]] inline vf codes_of(const uint8_t* line, int shift, int mask) {
#if defined(FS_SIMD_AVX512)
  const __m512i words = _mm512_srli_epi32(_mm512_loadu_si512(line), static_cast<unsigned>(shift));
  return {_mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(mask)))};
#elif defined(FS_SIMD_AVX2)
  const __m256i words = _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(line)), shift);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(mask)))};
#else
  v4i words;
  std::memcpy(&words, line, sizeof(words));
  return {__builtin_convertvector((words >> shift) & mask, v4f)};
#endif
}

}  // namespace fs::FS_ISA
