// SPDX-License-Identifier: Apache-2.0
//
// The register tile of `linear`: R vectors of output rows times M tokens, over all k.
//
// Every output element is one chain of fused multiply-adds with k ascending, in every tile shape: which tile
// computes an element, and beside which others, cannot change its bits.
#pragma once

#include <type_traits>

#include "core/simd.h"
#include "cpu/each.h"
#include "layout/panel.h"

namespace fs::FS_ISA {

#if defined(FS_SIMD_AVX512)
inline vf even_of_pairs(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
inline vf odd_of_pairs(const bf16* p) {
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), odd))};
}
#elif defined(FS_SIMD_AVX2)
inline vf even_of_pairs(const bf16* p) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))};
}
inline vf odd_of_pairs(const bf16* p) {
  const __m256 odd = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  return {_mm256_and_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(p)), odd)};
}
#else
inline vf even_of_pairs(const bf16* p) {
  return {v4f{to_float(p[0]), to_float(p[2]), to_float(p[4]), to_float(p[6])}};
}
inline vf odd_of_pairs(const bf16* p) {
  return {v4f{to_float(p[1]), to_float(p[3]), to_float(p[5]), to_float(p[7])}};
}
#endif

// sum += a * b, as fma() does. On AVX2 the tile fills all 16 registers; left to choose among the operand
// orders of the instruction the compiler copies accumulators around and through the stack, so here it has no
// choice.
[[gnu::always_inline]] inline void accumulate(vf& sum, vf a, vf b) {
#if defined(FS_SIMD_AVX2) && !defined(FS_SIMD_AVX512)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum.v) : "x"(a.v), "x"(b.v));
#else
  sum = fma(a, b, sum);
#endif
}

// Weights that will be read later, asked for while a tile computes: kBytes at `p`, which then moves on.
struct Prefetch {
  const char* p;
  int64_t step;

  template <int kBytes>
  [[gnu::always_inline]] void next() {
    each<(kBytes + 63) / 64>([&](auto line) FS_INLINE { __builtin_prefetch(p + line.value * 64, 0, 2); });
    p += step;
  }
};

// acc[r * M + m] += weights[r] * x[m], one k of M tokens whose rows are x_stride apart.
template <int R, int M>
[[gnu::always_inline]] inline void multiply_one(vf (&acc)[R * M], const vf (&weights)[R], const float* x,
                                                int64_t x_stride) {
  each<M>([&](auto m) FS_INLINE {
    const vf input = set1(x[m.value * x_stride]);
    each<R>([&](auto r) FS_INLINE { accumulate(acc[r.value * M + m.value], weights[r.value], input); });
  });
}

// acc += sum over k of weight(row, k) * x(token, k): float32 and float16 weights, [k][32].
template <int R, int M, class W>
  requires(!std::is_same_v<W, bf16>)
[[gnu::always_inline]] inline void multiply(vf (&acc)[R * M], const W* w, const float* x, int64_t x_stride,
                                            int64_t depth, Prefetch later) {
  for (int64_t k = 0; k < depth; ++k, w += kPanelRows) {
    later.next<R * kLanes* int{sizeof(W)}>();
    vf weights[R];
    each<R>([&](auto r) FS_INLINE { weights[r.value] = load(w + r.value * kLanes); });
    multiply_one<R, M>(acc, weights, x + k, x_stride);
  }
}

// bfloat16 weights, [k / 2][32][2].
template <int R, int M>
[[gnu::always_inline]] inline void multiply(vf (&acc)[R * M], const bf16* w, const float* x, int64_t x_stride,
                                            int64_t depth, Prefetch later) {
  const auto even = [&](int64_t k) FS_INLINE {
    vf weights[R];
    each<R>([&](auto r) FS_INLINE { weights[r.value] = even_of_pairs(w + r.value * 2 * kLanes); });
    multiply_one<R, M>(acc, weights, x + k, x_stride);
  };
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2, w += 2 * kPanelRows) {
    later.next<R * kLanes * 4>();
    even(k);
    vf weights[R];
    each<R>([&](auto r) FS_INLINE { weights[r.value] = odd_of_pairs(w + r.value * 2 * kLanes); });
    multiply_one<R, M>(acc, weights, x + k + 1, x_stride);
  }
  if (k < depth) even(k);
}

#if defined(FS_SIMD_BF16)
// bfloat16 weights times bfloat16 activations, padded with a zero to an even depth: two k per instruction.
template <int R, int M>
[[gnu::always_inline]] inline void multiply(vf (&acc)[R * M], const bf16* w, const bf16* x, int64_t x_stride,
                                            int64_t depth, Prefetch later) {
  for (int64_t k = 0; k < depth; k += 2, w += 2 * kPanelRows) {
    later.next<R * kLanes * 4>();
    __m512i weights[R];
    each<R>([&](auto r) FS_INLINE { weights[r.value] = _mm512_loadu_si512(w + r.value * 2 * kLanes); });
    each<M>([&](auto m) FS_INLINE {
      int32_t pair;
      std::memcpy(&pair, x + m.value * x_stride + k, sizeof(pair));
      const __m512i input = _mm512_set1_epi32(pair);
      each<R>([&](auto r) FS_INLINE {
        vf& sum = acc[r.value * M + m.value];
        sum.v = _mm512_dpbf16_ps(sum.v, (__m512bh)weights[r.value], (__m512bh)input);
      });
    });
  }
}
#endif

inline vf load_rows(const float* p, int count) {
  return count == kLanes ? load(p) : load_first(p, count);
}

// What a tile computes: out[m][n] for M tokens and R * kLanes output rows, over a range of k.
template <class W, class X>
struct Tile {
  float* out;
  int64_t out_stride;
  int64_t num_rows;  // output rows that exist from `out` on; more than R * kLanes is fine
  const W* w;
  const X* x;
  int64_t x_stride;
  int64_t depth;      // how many k
  bool resume;        // the sums so far are in `out`
  const float* bias;  // added at the end if not null
  Prefetch later;
};

template <int R, int M, class W, class X>
void linear_tile(const Tile<W, X>& tile) {
  vf acc[R * M];
  const auto count_of = [&](int vector) FS_INLINE {
    const int64_t rest = tile.num_rows - vector * kLanes;
    return rest >= kLanes ? kLanes : rest > 0 ? static_cast<int>(rest) : 0;
  };
  const auto target = [&](int vector, int token)
                          FS_INLINE { return tile.out + token * tile.out_stride + vector * kLanes; };
  each<R>([&](auto r) FS_INLINE {
    const int count = count_of(r.value);
    each<M>([&](auto m) FS_INLINE {
      vf sum = zero();
      if (tile.resume) sum = load_rows(target(r.value, m.value), count);
      acc[r.value * M + m.value] = sum;
    });
  });
  multiply<R, M>(acc, tile.w, tile.x, tile.x_stride, tile.depth, tile.later);
  each<R>([&](auto r) FS_INLINE {
    const int count = count_of(r.value);
    vf offset = zero();
    if (tile.bias != nullptr) offset = load_rows(tile.bias + r.value * kLanes, count);
    each<M>([&](auto m) FS_INLINE {
      vf sum = acc[r.value * M + m.value];
      if (tile.bias != nullptr) sum = sum + offset;
      if (count == kLanes) {
        store(target(r.value, m.value), sum);
      } else {
        store_first(target(r.value, m.value), sum, count);
      }
    });
  });
}

}  // namespace fs::FS_ISA
