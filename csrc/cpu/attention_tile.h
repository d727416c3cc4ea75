// SPDX-License-Identifier: Apache-2.0
//
// The inner loops of attention: a few packed query rows against one tile of keys and values.
//
// A row's arithmetic is the same whatever rows it shares a tile with and whichever keys are skipped:
//   score    one fma chain per key, dims ascending
//   sum      one chain per vector lane, keys ascending; lanes are added at the end of the span
//   output   one fma chain per dim, keys ascending
// and a key that a row may not see adds exactly nothing to any of them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/simd.h"
#include "cpu/each.h"
#include "cpu/kv_layout.h"

namespace fs::FS_ISA {

inline constexpr int kGroupRows = 6;  // rows that share each load of K and V
inline constexpr int kTileTokens = 64;
inline constexpr int kTileVectors = kTileTokens / kLanes;

// Vectors of keys (or dims) that `rows` rows work on at a time: their sums, and what they are made of, fit 16
// registers (32 of AVX-512), and there are enough of them to hide the latency of fma.
template <class KV>
constexpr int vectors_per_pass([[maybe_unused]] int rows) {
#if defined(FS_SIMD_AVX512)
  return 4;
#endif
  if (rows > 3) return 2;
  return rows == 3 && !std::is_same_v<KV, float> ? 2 : 4;
}

// Up to kTileTokens consecutive tokens of one KV head. Pointers of tokens that nobody sees are never
// followed, but for keys in the same pass as a visible one: those must point to readable memory.
template <class KV>
struct Tile {
  const KV* keys[kTileVectors];        // K of kLanes tokens each, at dim 0
  int64_t key_line;                    // elements from one dim (bfloat16: pair of dims) to the next
  const KV* values[kTileTokens / 16];  // V of 16 tokens each, at dim 0
  int64_t value_dims;                  // head_dim, or more where V is padded with zeros
  int64_t head_dim;
  int end;  // tokens from here on are not seen
};

// Asks for the memory that score_pass and weigh_pass will read. Their passes go over a tile in strides that
// the hardware does not foresee; so a pass over one tile fetches the same part of the next.
template <class KV>
__attribute__((always_inline)) inline void prefetch_keys(const Tile<KV>& tile, int first, int vectors) {
  constexpr int kVectorsPerLine = 64 / (4 * kLanes);
  const int64_t lines = std::is_same_v<KV, float> ? tile.head_dim : tile.head_dim / 2;
  for (int v = first; v < first + vectors && v * kLanes < tile.end; v += kVectorsPerLine) {
    for (int64_t i = 0; i < lines; ++i) prefetch(tile.keys[v] + i * tile.key_line);
  }
}
template <class KV>
__attribute__((always_inline)) inline void prefetch_values(const Tile<KV>& tile, int64_t dim, int vectors) {
  constexpr int kStep = std::is_same_v<KV, float> ? 1 : 2;
  for (int token = 0; token < tile.end; token += kStep) {
    const KV* values = tile.values[token / 16] + value_index<KV>(token % 16, dim, tile.value_dims);
    for (int at = 0; at < vectors * kLanes; at += 16) prefetch(values + kStep * at);
  }
}

// Up to kGroupRows packed rows and what is known of them so far in this span.
struct RowGroup {
  const float* q;    // [rows][stride], scaled so that scores are exponents of 2
  float* out;        // [rows][stride], unnormalised
  float* max;        // [rows]
  float* lane_sums;  // [rows][kLanes]
  int64_t stride;
  int begin[kGroupRows];  // tokens of the tile that a row sees; kTileTokens and 0 if none
  int end[kGroupRows];
};

// 2^x for x <= 0, relative error below 2e-7, at least 2^-126; exactly 1 at 0; NaN stays NaN.
inline vf exp2_of_negative(vf x) {
  const vf clamped = fs::FS_ISA::max(set1(-126.0f), x);
  // f in [-0.5, 0.5], n integral
#if defined(FS_SIMD_AVX512) && !defined(FS_SIMD_EMULATED)
  const vf f{_mm512_reduce_ps(clamped.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  const vf n = clamped - f;
#else
  const vf n = round_even(clamped);
  const vf f = clamped - n;
#endif
  vf p = set1(1.326472541e-3f);
  p = fma(p, f, set1(9.671512768e-3f));
  p = fma(p, f, set1(5.550733749e-2f));
  p = fma(p, f, set1(2.402224208e-1f));
  p = fma(p, f, set1(6.931469776e-1f));
  p = fma(p, f, set1(1.0f));
#if defined(FS_SIMD_AVX512) && !defined(FS_SIMD_EMULATED)
  return {_mm512_scalef_ps(p.v, n.v)};  // the same bits in one instruction
#else
  return scale_by_power(p, n);
#endif
}

// sums[r][n] += factors[r] * x[n], where row r's factor lies r strides behind the first.
template <int Rows, int Vectors>
[[gnu::always_inline]] inline void add_products(vf (&sums)[Rows * Vectors], const float* factors,
                                                int64_t stride, const vf (&x)[Vectors]) {
  each<Rows>([&](auto r) FS_INLINE {
    const vf factor = set1(factors[r.value * stride]);
    each<Vectors>([&](auto n) FS_INLINE {
      vf& sum = sums[r.value * Vectors + n.value];
      sum = fma(factor, x[n.value], sum);
    });
  });
}

// scores[r][key] = q[r] . k[key] for Vectors vectors of keys from vector `first` on.
template <class KV, int Rows, int Vectors>
void score_pass(const RowGroup& group, const Tile<KV>& tile, int first, float* scores) {
  const KV* keys[Vectors];
  vf sums[Rows * Vectors];
  each<Vectors>([&](auto n) FS_INLINE { keys[n.value] = tile.keys[first + n.value]; });
  each<Rows * Vectors>([&](auto i) FS_INLINE { sums[i.value] = zero(); });
  const int64_t line = tile.key_line;
  const int64_t stride = group.stride;
  const float* q = group.q;
  const float* const end = q + tile.head_dim;
  do {  // there is a dim
    vf k[Vectors];
    if constexpr (std::is_same_v<KV, float>) {
      each<Vectors>([&](auto n) FS_INLINE { k[n.value] = load(keys[n.value]); });
      add_products<Rows, Vectors>(sums, q, stride, k);
      q += 1;
    } else {
      each<Vectors>([&](auto n) FS_INLINE { k[n.value] = load_even(keys[n.value]); });
      add_products<Rows, Vectors>(sums, q, stride, k);
      each<Vectors>([&](auto n) FS_INLINE { k[n.value] = load_odd(keys[n.value]); });
      add_products<Rows, Vectors>(sums, q + 1, stride, k);
      q += 2;
    }
    each<Vectors>([&](auto n) FS_INLINE { keys[n.value] += line; });
  } while (q != end);
  scores += first * kLanes;
  each<Rows>([&](auto r) FS_INLINE {
    each<Vectors>([&](auto n) FS_INLINE {
      store(scores + r.value * kTileTokens + n.value * kLanes, sums[r.value * Vectors + n.value]);
    });
  });
}

// Scores to weights 2^(score - maximum), zero where a row sees nothing; updates maxima and sums. factors[r]
// is for what row r has summed up before.
template <int Rows>
void softmax(const RowGroup& group, int first_vector, int end_vector, float* scores, float* factors) {
  const int first = first_vector * kLanes;
  const int end = end_vector * kLanes;
  const bool is_all = first_vector == 0 && end_vector == kTileVectors;
  float shifts[Rows];
  float changes[(Rows + kLanes - 1) / kLanes * kLanes] = {};
  for (int r = 0; r < Rows; ++r) {
    float* row = scores + r * kTileTokens;
    for (int j = first; j < group.begin[r]; ++j) row[j] = -__builtin_inff();
    for (int j = group.end[r]; j < end; ++j) row[j] = -__builtin_inff();
    vf highest = load(row + first);
    if (is_all) {
      each<kTileVectors>([&](auto v) FS_INLINE {
        if constexpr (v.value > 0) highest = fs::FS_ISA::max(highest, load(row + v.value * kLanes));
      });
    } else {
      for (int v = first_vector + 1; v < end_vector; ++v) {
        highest = fs::FS_ISA::max(highest, load(row + v * kLanes));
      }
    }
    const float tile_max = reduce_max(highest);
    const float old_max = group.max[r];
    const float new_max = old_max > tile_max ? old_max : tile_max;  // NaN if the tile's is
    if (group.begin[r] < group.end[r]) {
      changes[r] = old_max - new_max;
      group.max[r] = new_max;
    }
    shifts[r] = new_max;
  }
  for (int r = 0; r < Rows; r += kLanes) store(changes + r, exp2_of_negative(load(changes + r)));
  for (int r = 0; r < Rows; ++r) {
    float* row = scores + r * kTileTokens;
    const vf shift = set1(shifts[r]);
    vf sums = load(group.lane_sums + r * kLanes) * set1(changes[r]);
    const auto weigh = [&](int v) FS_INLINE {
      const vf weight = exp2_of_negative(load(row + v * kLanes) - shift);
      store(row + v * kLanes, weight);
      sums = sums + weight;
    };
    if (is_all && group.begin[r] <= 0 && group.end[r] >= kTileTokens) {
      each<kTileVectors>([&](auto v) FS_INLINE { weigh(v.value); });
    } else if (group.begin[r] <= first && group.end[r] >= end) {
      for (int v = first_vector; v < end_vector; ++v) weigh(v);
    } else {
      for (int v = first_vector; v < end_vector; ++v) {
        store(row + v * kLanes, exp2_of_negative(load(row + v * kLanes) - shift));
      }
      for (int j = first; j < group.begin[r]; ++j) row[j] = 0.0f;
      for (int j = group.end[r]; j < end; ++j) row[j] = 0.0f;
      for (int v = first_vector; v < end_vector; ++v) sums = sums + load(row + v * kLanes);
    }
    store(group.lane_sums + r * kLanes, sums);
    factors[r] = changes[r];
  }
}

// out[r][dim...] = out * factor + sum over tokens [begin, end) of weights[r][token] * v[token][dim...]. Of
// bfloat16, begin and end are even.
template <class KV, int Rows, int Vectors>
void weigh_pass(const RowGroup& group, const Tile<KV>& tile, int begin, int end, int64_t dim,
                const float* weights, const float* factors) {
  vf sums[Rows * Vectors];
  const int64_t stride = group.stride;
  float* const out = group.out + dim;
  each<Rows>([&](auto r) FS_INLINE {
    const vf factor = set1(factors[r.value]);
    each<Vectors>([&](auto n) FS_INLINE {
      sums[r.value * Vectors + n.value] = load(out + r.value * stride + n.value * kLanes) * factor;
    });
  });
  const int64_t line = std::is_same_v<KV, float> ? tile.value_dims : 2 * tile.value_dims;
  for (int token = begin; token < end;) {
    const int stop = token / 16 * 16 + 16 < end ? token / 16 * 16 + 16 : end;
    const KV* values = tile.values[token / 16] + value_index<KV>(token % 16, dim, tile.value_dims);
    do {
      vf v[Vectors];
      if constexpr (std::is_same_v<KV, float>) {
        each<Vectors>([&](auto n) FS_INLINE { v[n.value] = load(values + n.value * kLanes); });
        add_products<Rows, Vectors>(sums, weights + token, kTileTokens, v);
        token += 1;
      } else {
        each<Vectors>([&](auto n) FS_INLINE { v[n.value] = load_even(values + 2 * n.value * kLanes); });
        add_products<Rows, Vectors>(sums, weights + token, kTileTokens, v);
        each<Vectors>([&](auto n) FS_INLINE { v[n.value] = load_odd(values + 2 * n.value * kLanes); });
        add_products<Rows, Vectors>(sums, weights + token + 1, kTileTokens, v);
        token += 2;
      }
      values += line;
    } while (token < stop);
  }
  each<Rows>([&](auto r) FS_INLINE {
    each<Vectors>([&](auto n) FS_INLINE {
      store(out + r.value * stride + n.value * kLanes, sums[r.value * Vectors + n.value]);
    });
  });
}

template <class KV, int Rows>
void weigh(const RowGroup& group, const Tile<KV>& tile, const Tile<KV>* next, int begin, int end,
           const float* weights, const float* factors) {
  constexpr int kVectors = vectors_per_pass<KV>(Rows);
  int64_t dim = 0;
  for (; dim + kVectors * kLanes <= tile.value_dims; dim += kVectors * kLanes) {
    if (next != nullptr) prefetch_values(*next, dim, kVectors);
    weigh_pass<KV, Rows, kVectors>(group, tile, begin, end, dim, weights, factors);
  }
  for (; dim < tile.value_dims; dim += kLanes) {
    weigh_pass<KV, Rows, 1>(group, tile, begin, end, dim, weights, factors);
  }
}

// One token of a pair whose other one may not be looked at.
template <int Rows>
void weigh_half_pair(const RowGroup& group, const Tile<bf16>& tile, int token, const float* weights,
                     const float* factors) {
  float value[kMaxHeadDim];
  const bf16* pairs = tile.values[token / 16] + value_index<bf16>(token % 16, 0, tile.value_dims);
  for (int64_t d = 0; d < tile.value_dims; ++d) value[d] = to_float(pairs[2 * d]);
  Tile<float> one{};
  one.values[0] = value;
  one.value_dims = tile.value_dims;
  weigh<float, Rows>(group, one, nullptr, 0, 1, weights + token, factors);
}

// One tile for `Rows` rows. value_dims is a multiple of kLanes. `next` is fetched meanwhile if given.
template <class KV, int Rows>
void attend_rows(const RowGroup& group, const Tile<KV>& tile, const Tile<KV>* next) {
  int begin = kTileTokens;
  int end = 0;
  for (int r = 0; r < Rows; ++r) {
    if (group.begin[r] >= group.end[r]) continue;
    begin = group.begin[r] < begin ? group.begin[r] : begin;
    end = group.end[r] > end ? group.end[r] : end;
  }
  if (begin >= end) return;

  constexpr int kVectors = vectors_per_pass<KV>(Rows);
  const int first_vector = begin / (kVectors * kLanes) * kVectors;
  const int end_vector = (end + kVectors * kLanes - 1) / (kVectors * kLanes) * kVectors;
  alignas(64) float scores[Rows * kTileTokens];
  for (int v = first_vector; v < end_vector; v += kVectors) {
    if (next != nullptr) prefetch_keys(*next, v, kVectors);
    score_pass<KV, Rows, kVectors>(group, tile, v, scores);
  }
  float factors[Rows];
  softmax<Rows>(group, first_vector, end_vector, scores, factors);
  if constexpr (std::is_same_v<KV, float>) {
    weigh<KV, Rows>(group, tile, next, begin, end, scores, factors);
  } else {
    if (begin % 2 != 0) {
      weigh_half_pair<Rows>(group, tile, begin, scores, factors);
      begin += 1;
      for (int r = 0; r < Rows; ++r) factors[r] = 1.0f;
    }
    weigh<KV, Rows>(group, tile, next, begin, end - end % 2, scores, factors);
    if (end % 2 != 0 && end > begin) {
      for (int r = 0; r < Rows; ++r) factors[r] = 1.0f;
      weigh_half_pair<Rows>(group, tile, end - 1, scores, factors);
    }
  }
}

template <class KV>
bool is_finite_value(const Tile<KV>& tile, int token) {
  constexpr int64_t kStep = std::is_same_v<KV, float> ? 1 : 2;
  const KV* value = tile.values[token / 16] + value_index<KV>(token % 16, 0, tile.value_dims);
  bool is_finite = true;
  for (int64_t d = 0; d < tile.value_dims; ++d) {
    const auto bits = __builtin_bit_cast(uint32_t, to_float(value[d * kStep]));
    is_finite &= (bits & 0x7f800000u) != 0x7f800000u;
  }
  return is_finite;
}

// Whether the values that only some of the rows see are numbers.
template <class KV>
bool is_finite_where_hidden(const RowGroup& group, const Tile<KV>& tile, int num_rows) {
  TokenRange all{kTileTokens, 0};
  TokenRange common{0, kTileTokens};
  for (int r = 0; r < num_rows; ++r) {
    common = overlap(common, {group.begin[r], group.end[r]});
    if (group.begin[r] >= group.end[r]) continue;
    all.begin = group.begin[r] < all.begin ? group.begin[r] : all.begin;
    all.end = group.end[r] > all.end ? group.end[r] : all.end;
  }
  const auto is_finite = [&](TokenRange tokens) {
    for (int64_t token = tokens.begin; token < tokens.end; ++token) {
      if (!is_finite_value(tile, static_cast<int>(token))) return false;
    }
    return true;
  };
  if (common.begin >= common.end) return is_finite(all);
  return is_finite({all.begin, common.begin}) && is_finite({common.end, all.end});
}

template <class KV>
void attend(const RowGroup& group, const Tile<KV>& tile, const Tile<KV>* next, int num_rows) {
  static_assert(kGroupRows == 6);
  if (num_rows > 1 && !is_finite_where_hidden(group, tile, num_rows)) {
    // A weight of zero would not keep such a value out of a row that may not see it: row by row.
    for (int r = 0; r < num_rows; ++r) {
      const RowGroup row{group.q + r * group.stride,
                         group.out + r * group.stride,
                         group.max + r,
                         group.lane_sums + r * kLanes,
                         group.stride,
                         {group.begin[r]},
                         {group.end[r]}};
      attend_rows<KV, 1>(row, tile, nullptr);
    }
    return;
  }
  switch (num_rows) {
    case 1:
      return attend_rows<KV, 1>(group, tile, next);
    case 2:
      return attend_rows<KV, 2>(group, tile, next);
    case 3:
      return attend_rows<KV, 3>(group, tile, next);
    case 4:
      return attend_rows<KV, 4>(group, tile, next);
    case 5:
      return attend_rows<KV, 5>(group, tile, next);
    default:
      return attend_rows<KV, 6>(group, tile, next);
  }
}

}  // namespace fs::FS_ISA
