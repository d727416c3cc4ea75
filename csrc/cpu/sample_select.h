// SPDX-License-Identifier: Apache-2.0
//
// The shortest prefix of tokens in the order (logit descending, token id ascending) that reaches a target: a
// count (top-k) or a mass (top-p). A radix selection on the bits of the logits: three linear passes, no sort.
#pragma once

#include <cstdint>

#include "cpu/sample_scan.h"
#include "layout/sampling.h"

namespace fs::FS_ISA {

// Everything with a larger key belongs to the prefix; of those with this key, in the order of their ids, as
// many as it takes to reach `left`.
struct Cut {
  uint32_t key;
  uint64_t left;
};

// key(i) and measure(i) for i in [0, count); the measures must sum to at least target, and target >= 1.
template <class Key, class Measure>
Cut find_cut(int64_t count, uint64_t target, const Key& key, const Measure& measure) {
  constexpr int kShifts[] = {21, 10, 0};
  constexpr int kWidths[] = {11, 11, 10};
  Cut cut{0, target};
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = kShifts[pass];
    const uint32_t mask = (1u << kWidths[pass]) - 1;
    uint64_t bins[1 << 11] = {};
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t k = key(i);
      if ((uint64_t{k ^ cut.key} >> (shift + kWidths[pass])) == 0) bins[(k >> shift) & mask] += measure(i);
    }
    uint32_t bin = mask;
    while (bin > 0 && bins[bin] < cut.left) cut.left -= bins[bin--];
    cut.key |= bin << shift;
  }
  return cut;
}

// Tokens that may still be chosen, in ascending order of id.
struct Candidates {
  int32_t* ids;
  float* weights;
  int64_t count;

  void add(int64_t id, float weight) {
    ids[count] = static_cast<int32_t>(id);
    weights[count] = weight;
    ++count;
  }
};

template <class Measure>
void keep_prefix(Candidates& candidates, const float* logits, uint64_t target, const Measure& measure) {
  const auto key = [&](int64_t i) { return order_key(logits[candidates.ids[i]]); };
  Cut cut = find_cut(candidates.count, target, key, measure);
  const int64_t count = candidates.count;
  candidates.count = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t k = key(i);
    if (k < cut.key || (k == cut.key && cut.left == 0)) continue;
    if (k == cut.key) {
      const uint64_t m = measure(i);
      cut.left -= m < cut.left ? m : cut.left;
    }
    candidates.add(candidates.ids[i], candidates.weights[i]);
  }
}

inline void keep_top_k(Candidates& candidates, const float* logits, int64_t k) {
  if (k >= candidates.count) return;
  keep_prefix(candidates, logits, static_cast<uint64_t>(k), [](int64_t) { return uint64_t{1}; });
}

// A lower bound of the k-th largest logit: each of the k largest block maxima is a logit. -infinity if there
// are fewer than k blocks.
inline float bound_of_top_k(const float* block_max, int64_t count, int64_t k) {
  if (k > count) return kMinusInfinity;
  const Cut cut = find_cut(
      count, static_cast<uint64_t>(k), [&](int64_t i) { return order_key(block_max[i]); },
      [](int64_t) { return uint64_t{1}; });
  return float_from_order_key(cut.key);
}

// The mass that a prefix must reach to hold the share top_p of `total`.
inline uint64_t mass_for(float top_p, uint64_t total) {
  const auto target =
      static_cast<uint64_t>(__builtin_ceil(static_cast<double>(top_p) * static_cast<double>(total)));
  return target < 1 ? 1 : target < total ? target : total;
}

inline void keep_top_p(Candidates& candidates, const float* logits, uint64_t target) {
  keep_prefix(candidates, logits, target,
              [&](int64_t i) { return uint64_t{mass_of(candidates.weights[i])}; });
}

}  // namespace fs::FS_ISA
