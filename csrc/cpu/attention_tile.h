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
#include "cpu/kv_layout.h"

namespace fs::FS_ISA {

inline constexpr int kGroupRows = 6;  // rows that share each load of K and V
inline constexpr int kMaxTile = static_cast<int>(kMaxBlockSize);

// Vectors of keys (or dims) that `rows` rows work on at a time, such that the accumulators fill the
// registers.
constexpr int vectors_per_pass(int rows) {
#if defined(FS_SIMD_AVX512)
  return rows > 3 ? 4 : 8;
#else
  return rows > 3 ? 2 : rows > 1 ? 4 : 8;
#endif
}

// The keys and values of one tile: blocks of one KV head.
template <class KV>
struct Tile {
  int64_t block_size;
  int64_t head_dim;
  const KV* keys[kMaxTile / 16];  // block by block
  const KV* values[kMaxTile / 16];

  const KV* key_vector(int vector) const {
    const int64_t token = vector * kLanes;
    return keys[token / block_size] + key_index<KV>(token % block_size, 0, block_size);
  }
};

// Up to kGroupRows packed rows and what is known of them so far in this span.
struct RowGroup {
  const float* q;    // [rows][stride], scaled so that scores are exponents of 2
  float* out;        // [rows][stride], unnormalised
  float* max;        // [rows]
  float* lane_sums;  // [rows][kLanes]
  int64_t stride;
  int begin[kGroupRows];  // keys of the tile that a row sees
  int end[kGroupRows];
};

// scores[r][key] = q[r] . k[key] for Vectors vectors of keys from vector `first` on.
template <class KV, int Rows, int Vectors>
void score_pass(const RowGroup& group, const Tile<KV>& tile, int first, float* scores) {
  const KV* keys[Vectors];
  vf sums[Rows][Vectors];
  for (int n = 0; n < Vectors; ++n) keys[n] = tile.key_vector(first + n);
  for (int r = 0; r < Rows; ++r) {
    for (int n = 0; n < Vectors; ++n) sums[r][n] = zero();
  }
  if constexpr (std::is_same_v<KV, float>) {
    for (int64_t d = 0; d < tile.head_dim; ++d) {
      vf k[Vectors];
      for (int n = 0; n < Vectors; ++n) k[n] = load(keys[n] + d * tile.block_size);
      for (int r = 0; r < Rows; ++r) {
        const vf q = set1(group.q[r * group.stride + d]);
        for (int n = 0; n < Vectors; ++n) sums[r][n] = fma(q, k[n], sums[r][n]);
      }
    }
  } else {
    for (int64_t d = 0; d < tile.head_dim; d += 2) {
      Pairs k[Vectors];
      for (int n = 0; n < Vectors; ++n) k[n] = load_pairs(keys[n] + d * tile.block_size);
      for (int r = 0; r < Rows; ++r) {
        const vf q = set1(group.q[r * group.stride + d]);
        for (int n = 0; n < Vectors; ++n) sums[r][n] = fma(q, k[n].even, sums[r][n]);
      }
      for (int r = 0; r < Rows; ++r) {
        const vf q = set1(group.q[r * group.stride + d + 1]);
        for (int n = 0; n < Vectors; ++n) sums[r][n] = fma(q, k[n].odd, sums[r][n]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int n = 0; n < Vectors; ++n) store(scores + r * kMaxTile + (first + n) * kLanes, sums[r][n]);
  }
}

// Scores of one row to weights 2^(score - maximum), zero outside [begin, end); updates maximum and sums.
// Returns the factor for what was summed before.
inline float softmax_row(float* scores, int first_vector, int end_vector, int begin, int end, float* max,
                         float* lane_sums) {
  if (begin >= end) {
    for (int v = first_vector; v < end_vector; ++v) store(scores + v * kLanes, zero());
    return 1.0f;
  }
  const bool partial = begin > first_vector * kLanes || end < end_vector * kLanes;
  if (partial) {
    for (int j = first_vector * kLanes; j < begin; ++j) scores[j] = -__builtin_inff();
    for (int j = end; j < end_vector * kLanes; ++j) scores[j] = -__builtin_inff();
  }
  vf highest = load(scores + first_vector * kLanes);
  for (int v = first_vector + 1; v < end_vector; ++v)
    highest = fs::FS_ISA::max(highest, load(scores + v * kLanes));
  const float tile_max = reduce_max(highest);
  const float old_max = *max;
  const float new_max = old_max > tile_max ? old_max : tile_max;  // NaN if the tile's is
  float factors[kLanes];
  store(factors, exp2(set1(old_max - new_max)));
  const float factor = factors[0];
  *max = new_max;

  vf sums = load(lane_sums) * set1(factor);
  const vf shift = set1(new_max);
  for (int v = first_vector; v < end_vector; ++v) {
    vf weight = exp2(load(scores + v * kLanes) - shift);
    if (partial) {
      store(scores + v * kLanes, weight);
      for (int j = v * kLanes; j < (v + 1) * kLanes; ++j) {
        if (j < begin || j >= end) scores[j] = 0.0f;
      }
      weight = load(scores + v * kLanes);
    }
    store(scores + v * kLanes, weight);
    sums = sums + weight;
  }
  store(lane_sums, sums);
  return factor;
}

// A vector of V: kLanes dims, or the first `count` of them where D ends inside the vector.
template <bool Whole>
vf load_value(const float* p, [[maybe_unused]] int count) {
  if constexpr (Whole) {
    return load(p);
  } else {
    return load_first(p, count);
  }
}
template <bool Whole>
Pairs load_value(const bf16* p, [[maybe_unused]] int count) {
  if constexpr (Whole) {
    return load_pairs(p);
  } else {
    bf16 pairs[2 * kLanes] = {};
    for (int i = 0; i < 2 * count; ++i) pairs[i] = p[i];
    return load_pairs(pairs);
  }
}

// out[r][dim...] = out * factor + sum over keys [begin, end) of weights[r][key] * v[key][dim...].
template <class KV, int Rows, int Vectors, bool Whole>
void weigh_pass(const RowGroup& group, const Tile<KV>& tile, int begin, int end, int64_t dim,
                const float* weights, const float* factors) {
  const int count = static_cast<int>(tile.head_dim - dim);  // only looked at if not Whole
  const int64_t line = tile.head_dim;
  vf sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    const vf factor = set1(factors[r]);
    for (int n = 0; n < Vectors; ++n) {
      sums[r][n] = load(group.out + r * group.stride + dim + n * kLanes) * factor;
    }
  }
  const int block_size = static_cast<int>(tile.block_size);
  for (int key = begin; key < end;) {
    const int block = key / block_size;
    const int block_end = (block + 1) * block_size < end ? (block + 1) * block_size : end;
    const KV* values = tile.values[block] + value_index<KV>(key % block_size, dim, line);
    if constexpr (std::is_same_v<KV, float>) {
      for (; key < block_end; ++key, values += line) {
        vf v[Vectors];
        for (int n = 0; n < Vectors; ++n) v[n] = load_value<Whole>(values + n * kLanes, count);
        for (int r = 0; r < Rows; ++r) {
          const vf weight = set1(weights[r * kMaxTile + key]);
          for (int n = 0; n < Vectors; ++n) sums[r][n] = fma(weight, v[n], sums[r][n]);
        }
      }
    } else {
      const auto add = [&](const KV* from, int k, auto first, auto second) {
        Pairs v[Vectors];
        for (int n = 0; n < Vectors; ++n) v[n] = load_value<Whole>(from + 2 * n * kLanes, count);
        if constexpr (first.value) {
          for (int r = 0; r < Rows; ++r) {
            const vf weight = set1(weights[r * kMaxTile + k]);
            for (int n = 0; n < Vectors; ++n) sums[r][n] = fma(weight, v[n].even, sums[r][n]);
          }
        }
        if constexpr (second.value) {
          for (int r = 0; r < Rows; ++r) {
            const vf weight = set1(weights[r * kMaxTile + k + 1]);
            for (int n = 0; n < Vectors; ++n) sums[r][n] = fma(weight, v[n].odd, sums[r][n]);
          }
        }
      };
      constexpr std::true_type yes;
      constexpr std::false_type no;
      if (key % 2 != 0) {  // the pair's first token is not visible
        values -= 1;
        add(values, key - 1, no, yes);
        values += 2 * line;
        key += 1;
      }
      for (; key + 2 <= block_end; key += 2, values += 2 * line) add(values, key, yes, yes);
      if (key < block_end) {  // its second may not be written yet
        add(values, key, yes, no);
        key += 1;
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int n = 0; n < Vectors; ++n) store(group.out + r * group.stride + dim + n * kLanes, sums[r][n]);
  }
}

// One tile for `Rows` rows.
template <class KV, int Rows>
void attend_rows(const RowGroup& group, const Tile<KV>& tile) {
  constexpr int kVectors = vectors_per_pass(Rows);
  // Rows are in ascending order of what they see.
  int begin = kMaxTile;
  int end = 0;
  for (int r = 0; r < Rows; ++r) {
    if (group.begin[r] >= group.end[r]) continue;
    begin = group.begin[r] < begin ? group.begin[r] : begin;
    end = group.end[r] > end ? group.end[r] : end;
  }
  if (begin >= end) return;
  const int first_vector = begin / kLanes;
  const int end_vector = (end + kLanes - 1) / kLanes;

  alignas(64) float scores[Rows * kMaxTile];
  int vector = first_vector;
  for (; vector + kVectors <= end_vector; vector += kVectors) {
    score_pass<KV, Rows, kVectors>(group, tile, vector, scores);
  }
  for (; vector < end_vector; ++vector) score_pass<KV, Rows, 1>(group, tile, vector, scores);

  float factors[Rows];
  for (int r = 0; r < Rows; ++r) {
    factors[r] = softmax_row(scores + r * kMaxTile, first_vector, end_vector, group.begin[r], group.end[r],
                             group.max + r, group.lane_sums + r * kLanes);
  }

  int64_t dim = 0;
  for (; dim + kVectors * kLanes <= tile.head_dim; dim += kVectors * kLanes) {
    weigh_pass<KV, Rows, kVectors, true>(group, tile, begin, end, dim, scores, factors);
  }
  for (; dim + kLanes <= tile.head_dim; dim += kLanes) {
    weigh_pass<KV, Rows, 1, true>(group, tile, begin, end, dim, scores, factors);
  }
  if (dim < tile.head_dim) weigh_pass<KV, Rows, 1, false>(group, tile, begin, end, dim, scores, factors);
}

template <class KV>
void attend(const RowGroup& group, const Tile<KV>& tile, int num_rows) {
  static_assert(kGroupRows == 6);
  switch (num_rows) {
    case 1:
      return attend_rows<KV, 1>(group, tile);
    case 2:
      return attend_rows<KV, 2>(group, tile);
    case 3:
      return attend_rows<KV, 3>(group, tile);
    case 4:
      return attend_rows<KV, 4>(group, tile);
    case 5:
      return attend_rows<KV, 5>(group, tile);
    default:
      return attend_rows<KV, 6>(group, tile);
  }
}

}  // namespace fs::FS_ISA
