// SPDX-License-Identifier: Apache-2.0
//
// A tile of keys and values as floats in scratch memory: where many rows share it, widening bfloat16 once is
// cheaper than in every pass; and rows of values that are no whole vectors are padded.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/attention_tile.h"

namespace fs::FS_ISA {

struct WideTile {
  alignas(64) float keys[kMaxHeadDim * kTileTokens];    // [head_dim][kTileTokens]
  alignas(64) float values[kTileTokens * kMaxHeadDim];  // [kTileTokens][stride]
};

template <class KV>
void widen_values(const Tile<KV>& from, int token, int64_t stride, float* to) {
  const KV* values = from.values[token / 16] + value_index<KV>(token % 16, 0, from.head_dim);
  int64_t d = 0;
  if constexpr (std::is_same_v<KV, float>) {
    for (; d + kLanes <= from.head_dim; d += kLanes) store(to + d, load(values + d));
    for (; d < stride; ++d) to[d] = d < from.head_dim ? values[d] : 0.0f;
  } else {
    for (; d + kLanes <= from.head_dim; d += kLanes) {
      store(to + d, load_even(values + 2 * d));
      store(to + stride + d, load_odd(values + 2 * d));
    }
    for (; d < stride; ++d) {
      to[d] = d < from.head_dim ? to_float(values[2 * d]) : 0.0f;
      to[stride + d] = d < from.head_dim ? to_float(values[2 * d + 1]) : 0.0f;
    }
  }
}

// Tokens [begin, end) of a tile; `stride` is head_dim up to whole vectors.
template <class KV>
Tile<float> widen(const Tile<KV>& from, int begin, int end, int64_t stride, WideTile* to) {
  for (int v = begin / kLanes; v * kLanes < end; ++v) {
    const KV* keys = from.keys[v];
    float* line = to->keys + v * kLanes;
    if constexpr (std::is_same_v<KV, float>) {
      for (int64_t d = 0; d < from.head_dim; ++d) {
        store(line + d * kTileTokens, load(keys + d * from.key_line));
      }
    } else {
      for (int64_t d = 0; d < from.head_dim; d += 2, keys += from.key_line) {
        store(line + d * kTileTokens, load_even(keys));
        store(line + (d + 1) * kTileTokens, load_odd(keys));
      }
    }
  }
  constexpr int kStep = std::is_same_v<KV, float> ? 1 : 2;
  for (int token = begin / kStep * kStep; token < end; token += kStep) {
    widen_values(from, token, stride, to->values + token * stride);
  }
  Tile<float> wide;
  for (int v = 0; v < kTileVectors; ++v) wide.keys[v] = to->keys + v * kLanes;
  for (int i = 0; i < kTileTokens / 16; ++i) wide.values[i] = to->values + i * 16 * stride;
  wide.key_line = kTileTokens;
  wide.value_dims = stride;
  wide.head_dim = from.head_dim;
  wide.end = end;
  return wide;
}

}  // namespace fs::FS_ISA
