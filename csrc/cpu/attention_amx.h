// SPDX-License-Identifier: Apache-2.0
//
// The rows of a unit of attention on AMX tiles, over a bfloat16 cache: both products in bfloat16 with float32
// sums. Queries are rounded to bfloat16, and so are the weights of a row, before they are summed.
//
// A section of up to 256 tokens, counted from the start of the span, is done in three passes, so that nothing
// is rescaled on the way: scores of all its keys, weights 2^(score - maximum), output. Decodes and chunks of
// any length run the same instructions on as many rows of a tile as they have. A row's arithmetic:
//   score    as one instruction sums 32 dims, then by steps of 32
//   sum      one chain per lane of 32 keys, ascending; lanes are added at the end of the section
//   output   as one instruction sums 32 tokens (from the start of the span), then by steps of 32
// and a key that a row may not see adds exactly nothing to any of them.
#pragma once

#if defined(FS_SIMD_AMX)

#include <cstdint>
#include <cstring>

#include "cpu/attention_amx_tiles.h"
#include "cpu/attention_unit.h"

namespace fs::FS_ISA {

// 2^(score * scale - shift), relative error below 3e-6, at least 2^-125; NaN stays NaN. The exponent is at
// most some roundings above 0.
inline vf weight_of(vf score, vf scale, vf shift) {
  const vf exponent = max(set1(-125.0f), fma(score, scale, shift));
  // Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits.
  const vf magic = set1(12582912.0f);
  const vf shifted = exponent + magic;
  const vf f = exponent - (shifted - magic);  // [-0.5, 0.5]
  vf p = set1(9.570101968e-3f);
  p = fma(p, f, set1(5.591786076e-2f));
  p = fma(p, f, set1(2.402474483e-1f));
  p = fma(p, f, set1(6.931218147e-1f));
  p = fma(p, f, set1(9.999992614e-1f));
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), power))};
}

// The bits of 32 floats rounded to bfloat16, `lower` first.
inline __m512i round_to_bf16(vf lower, vf upper) {
#if defined(FS_SIMD_EMULATED)
  alignas(64) float floats[32];
  alignas(64) bf16 rounded[32];
  store(floats, lower);
  store(floats + 16, upper);
  for (int i = 0; i < 32; ++i) rounded[i] = to_bf16(floats[i]);
  return _mm512_loadu_si512(rounded);
#else
  return (__m512i)_mm512_cvtne2ps_pbh(upper.v, lower.v);
#endif
}

class AmxSpans {
 public:
  static constexpr int kBlockRows = 2 * kAmxGroupRows;

  // The head sizes that tiles take.
  static bool takes(int64_t head_dim) { return head_dim % kAmxDepth == 0; }

  explicit AmxSpans(const PackedRows& rows) : rows_(rows), cache_(rows.op.kv_cache) {
    dim_ = rows.shape.head_dim;
    size_ = rows.shape.block_size;
    const float scale = rows.op.scale * 1.44269504f;  // 2^(q . k * scale) = exp(op.scale * q . k)
    is_negative_ = scale < 0;
    scale_ = is_negative_ ? -scale : scale;
  }

  void begin(int64_t first, int64_t count) {
    count_ = count;
    tiles_.configure(count);
    for (int64_t r = 0; r < count; ++r) {
      const float* from = rows_.query(first + r);
      bf16* q = q_ + r * dim_;
      for (int64_t d = 0; d < dim_; ++d) q[d] = to_bf16(is_negative_ ? -from[d] : from[d]);
      visible_[r] = rows_.visible(first + r);
    }
  }

  void attend_span(int64_t span_begin, const Partials& partials) {
    const int64_t span_end = span_begin + rows_.op.span;
    for (int64_t r = 0; r < count_; r += kAmxGroupRows) {
      const int64_t n = count_ - r < kAmxGroupRows ? count_ - r : kAmxGroupRows;
      bool is_empty = true;
      for (int64_t at = span_begin; at < span_end; at += kSection) {
        const TokenRange section{at, at + kSection < span_end ? at + kSection : span_end};
        const TokenRange all = seen(r, n, section);
        if (all.begin >= all.end) continue;
        Partials to = partials;
        if (!is_empty) to = section_.partials(partials.stride);
        attend_section(r, n, section, to);
        if (!is_empty) {
          for (int64_t i = r; i < r + n; ++i) fold(partials.row(i), to.row(i), dim_);
        }
        is_empty = false;
      }
      if (!is_empty) continue;
      std::memset(partials.row(r).out, 0, static_cast<size_t>(n * partials.stride) * sizeof(float));
      for (int64_t i = r; i < r + n; ++i) {
        partials.max[i] = -__builtin_inff();
        partials.sum[i] = 0.0f;
      }
    }
  }

 private:
  static constexpr int kSection = 256;
  // Lines of odd numbers of cache lines, so that rows do not share sets of the cache.
  static constexpr int64_t kScoreStride = kSection + 16;
  static constexpr int64_t kWeightStride = kSection + 32;

  // What one of these rows sees of a section, and what all see.
  TokenRange seen(int64_t r, int64_t n, TokenRange section) const {
    return overlap({visible_[r].begin, visible_[r + n - 1].end}, section);
  }
  TokenRange seen_by_all(int64_t r, int64_t n, TokenRange section) const {
    return overlap({visible_[r + n - 1].begin, visible_[r].end}, section);
  }

  const bf16* keys_of(int64_t token) const {
    const int32_t block = rows_.block_table()[token / size_];
    return cache_.keys(block, rows_.kv_head) + key_index<bf16>(token % size_, 0, size_);
  }
  const bf16* values_of(int64_t token) const {
    const int32_t block = rows_.block_table()[token / size_];
    return cache_.values(block, rows_.kv_head) + value_index<bf16>(token % size_, 0, dim_);
  }

  // The partials of rows [r, r + n) of the block, n <= kAmxGroupRows, over what they see of a section.
  void attend_section(int64_t r, int64_t n, TokenRange section, const Partials& to) {
    const TokenRange all = seen(r, n, section);
    if (!is_finite_where_hidden(r, n, section)) {
      // A weight of zero would not keep the value out of a row that may not see it: row by row.
      for (int64_t i = r; i < r + n; ++i) attend_section(i, 1, section, to);
      return;
    }
    const int64_t at = section.begin;
    const auto first = static_cast<int>((all.begin - at) / kAmxDepth);
    const auto last = static_cast<int>((all.end - 1 - at) / kAmxDepth);
    for (int step = first; step <= last; ++step) {
      if (r == 0) prefetch(at + step * kAmxDepth, all);
      score(r, n, at, step, all);
    }
    for (int64_t i = 0; i < n; ++i) {
      weigh(i, overlap(visible_[r + i], section), at, first, last, to.max + r + i, to.sum + r + i);
    }
    find_values(at, first, last, all);
    for (int64_t d = 0; d < dim_; d += 2 * kAmxColumns) {
      tiles_.multiply(to.out + r * to.stride + d, to.stride, weights_ + first * kAmxDepth, kWeightStride, n,
                      last - first + 1, 2 * dim_, [&](int64_t step, int half) __attribute__((always_inline)) {
                        return values_[first + step] + 2 * (d + half * kAmxColumns);
                      });
    }
  }

  // Asks for the values of a step whose scores are next, and for the keys of the step after it.
  void prefetch(int64_t token, TokenRange all) const {
    const int64_t seen_end = visible_[count_ - 1].end;
    for (int64_t t = token; t < token + kAmxDepth; t += 16) {
      if (t + 16 > all.begin && t < all.end) {
        const auto* values = reinterpret_cast<const char*>(values_of(t));
        for (int64_t line = 0; line < dim_ / 2; ++line) __builtin_prefetch(values + 64 * line, 0, 2);
      }
      const int64_t next = t + kAmxDepth;
      if (next < seen_end && next >= all.begin) {
        const bf16* keys = keys_of(next);
        for (int64_t line = 0; line < dim_ / 2; ++line) __builtin_prefetch(keys + line * 2 * size_, 0, 2);
      }
    }
  }

  // Scores of the 32 keys of one step. The address of keys that nobody sees is that of others.
  void score(int64_t r, int64_t n, int64_t at, int step, TokenRange all) {
    const int64_t token = at + step * kAmxDepth;
    const int64_t middle = token + kAmxColumns;
    const bf16* lower = keys_of(token + kAmxColumns > all.begin ? token : middle);
    const bf16* upper = keys_of(middle < all.end ? middle : token);
    const int64_t line = 2 * size_;
    tiles_.multiply(scores_ + step * kAmxDepth, kScoreStride, q_ + r * dim_, dim_, n, dim_ / kAmxDepth, line,
                    [&](int64_t depth, int half) __attribute__((always_inline)) {
                      return (half == 0 ? lower : upper) + depth * (kAmxDepth / 2) * line;
                    });
  }

  // The weights of row i of the group: steps [first, last] of the section that begins at `at`.
  void weigh(int64_t i, TokenRange visible, int64_t at, int first, int last, float* max_score, float* sum) {
    const float* scores = scores_ + i * kScoreStride;
    bf16* weights = weights_ + i * kWeightStride;
    if (visible.begin >= visible.end) {
      for (int step = first; step <= last; ++step) {
        _mm512_storeu_si512(weights + step * kAmxDepth, _mm512_setzero_si512());
      }
      *max_score = -__builtin_inff();
      *sum = 0.0f;
      return;
    }
    const auto from = static_cast<int>(visible.begin - at);
    const auto to = static_cast<int>(visible.end - at);
    vf highest = set1(-__builtin_inff());
    vf highest_upper = highest;
    for (int step = first; step <= last; ++step) {
      const uint32_t mask = visible_keys(from - step * kAmxDepth, to - step * kAmxDepth);
      const vf lower = load(scores + step * kAmxDepth);
      const vf upper = load(scores + step * kAmxDepth + kLanes);
      if (mask == ~0u) [[likely]] {
        highest = max(highest, lower);
        highest_upper = max(highest_upper, upper);
      } else {
        const auto of_lower = static_cast<__mmask16>(mask);
        const auto of_upper = static_cast<__mmask16>(mask >> 16);
        highest = {_mm512_mask_max_ps(highest.v, of_lower, highest.v, lower.v)};
        highest_upper = {_mm512_mask_max_ps(highest_upper.v, of_upper, highest_upper.v, upper.v)};
      }
    }
    const float top = _mm512_reduce_max_ps(max(highest, highest_upper).v) * scale_;
    const vf scale = set1(scale_);
    const vf shift = set1(-top);
    vf even = zero();
    vf odd = zero();
    for (int step = first; step <= last; ++step) {
      const uint32_t mask = visible_keys(from - step * kAmxDepth, to - step * kAmxDepth);
      vf lower = weight_of(load(scores + step * kAmxDepth), scale, shift);
      vf upper = weight_of(load(scores + step * kAmxDepth + kLanes), scale, shift);
      if (mask != ~0u) [[unlikely]] {
        lower = {_mm512_maskz_mov_ps(static_cast<__mmask16>(mask), lower.v)};
        upper = {_mm512_maskz_mov_ps(static_cast<__mmask16>(mask >> 16), upper.v)};
      }
      const __m512i rounded = round_to_bf16(lower, upper);
      _mm512_storeu_si512(weights + step * kAmxDepth, rounded);
      even = even + vf{_mm512_castsi512_ps(_mm512_slli_epi32(rounded, 16))};
      const __m512i odd_bits = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
      odd = odd + vf{_mm512_castsi512_ps(_mm512_and_si512(rounded, odd_bits))};
    }
    *max_score = top;
    *sum = reduce_add(even + odd);
  }

  // Bits [from, to) of 32.
  static uint32_t visible_keys(int from, int to) {
    if (from <= 0 && to >= 32) return ~0u;
    if (from >= 32 || to <= 0) return 0;
    const uint32_t below_end = to >= 32 ? ~0u : (1u << to) - 1;
    return from <= 0 ? below_end : below_end & ~((1u << from) - 1);
  }

  // The values of each step: where they lie if one block holds them all and all are seen by somebody, else
  // copied together, zero where nobody sees them.
  void find_values(int64_t at, int first, int last, TokenRange all) {
    for (int step = first; step <= last; ++step) {
      const int64_t token = at + step * kAmxDepth;
      if (size_ % kAmxDepth == 0 && token >= all.begin && token + kAmxDepth <= all.end) {
        values_[step] = values_of(token);
        continue;
      }
      bf16* copy = copied_ + step * kAmxDepth * dim_;
      values_[step] = copy;
      for (int64_t t = token; t < token + kAmxDepth; t += 2, copy += 2 * dim_) {
        const bool is_first_seen = t >= all.begin && t < all.end;
        const bool is_second_seen = t + 1 >= all.begin && t + 1 < all.end;
        if (!is_first_seen && !is_second_seen) {
          std::memset(copy, 0, static_cast<size_t>(2 * dim_) * sizeof(bf16));
          continue;
        }
        const uint32_t kept = (is_first_seen ? 0xffffu : 0u) | (is_second_seen ? 0xffff0000u : 0u);
        const __m512i mask = _mm512_set1_epi32(static_cast<int>(kept));
        const bf16* values = values_of(t);
        for (int64_t d = 0; d < 2 * dim_; d += 32) {
          _mm512_storeu_si512(copy + d, _mm512_and_si512(_mm512_loadu_si512(values + d), mask));
        }
      }
    }
  }

  // Whether the values that only some of the rows see are numbers.
  bool is_finite_where_hidden(int64_t r, int64_t n, TokenRange section) const {
    const TokenRange all = seen(r, n, section);
    const TokenRange common = seen_by_all(r, n, section);
    for (int64_t t = all.begin; t < all.end; ++t) {
      if (t == common.begin && common.begin < common.end) t = common.end;
      if (t == all.end) break;
      const bf16* value = values_of(t);
      bool is_finite = true;
      for (int64_t d = 0; d < dim_; ++d) is_finite &= (value[2 * d] & 0x7f80u) != 0x7f80u;
      if (!is_finite) return false;
    }
    return true;
  }

  const PackedRows& rows_;
  KvCache<bf16> cache_;
  AttentionTiles tiles_;
  int64_t dim_, size_;
  float scale_;
  bool is_negative_;
  int64_t count_ = 0;
  TokenRange visible_[kBlockRows];
  const bf16* values_[kSection / kAmxDepth];
  PartialsMemory<kBlockRows> section_;
  alignas(64) bf16 q_[(kBlockRows + kAmxGroupRows) * kMaxHeadDim];
  alignas(64) float scores_[kAmxGroupRows * kScoreStride];
  alignas(64) bf16 weights_[kAmxGroupRows * kWeightStride];
  alignas(64) bf16 copied_[kSection * kMaxHeadDim];
};

}  // namespace fs::FS_ISA

#endif
