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
#include "cpu/attention_section.h"
#include "cpu/attention_unit.h"

namespace fs::FS_ISA {

// 2^(score * scale - shift), relative error below 3e-6, at least 2^-125; NaN stays NaN. The exponent is at
// most some roundings above 0.
inline vf weight_of(vf score, vf scale, vf shift) {
  const vf exponent = max(set1(-125.0f), fma(score, scale, shift));
#if defined(FS_SIMD_EMULATED)
  float lanes[kLanes];
  float powers[kLanes];
  store(lanes, exponent);
  for (int i = 0; i < kLanes; ++i) {
    powers[i] = __builtin_floorf(lanes[i]);
    lanes[i] -= powers[i];
  }
  const vf f = load(lanes);
#else
  const vf f{_mm512_reduce_ps(exponent.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};  // [0, 1]
#endif
  vf p = set1(1.353416792e-2f);
  p = fma(p, f, set1(5.201146061e-2f));
  p = fma(p, f, set1(2.414427569e-1f));
  p = fma(p, f, set1(6.930038345e-1f));
  p = fma(p, f, set1(1.000002593f));
#if defined(FS_SIMD_EMULATED)
  store(lanes, p);
  for (int i = 0; i < kLanes; ++i) {
    if (lanes[i] == lanes[i]) lanes[i] = __builtin_ldexpf(lanes[i], static_cast<int>(powers[i]));
  }
  return load(lanes);
#else
  return {_mm512_scalef_ps(p.v, exponent.v)};
#endif
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

  AmxSpans(const Attention& op, const AttentionShape& shape) : cache_(op.kv_cache) {
    dim_ = shape.head_dim;
    size_ = shape.block_size;
    const float scale = op.scale * 1.44269504f;  // 2^(q . k * scale) = exp(op.scale * q . k)
    is_negative_ = scale < 0;
    scale_ = is_negative_ ? -scale : scale;
  }

  void begin(const PackedRows& rows, const PackedRows* following, int64_t first, int64_t count) {
    rows_ = &rows;
    following_ = following;
    count_ = count;
    fetches_ = first == 0;  // the rows after the first ones find keys and values in the cache
    for (int64_t r = 0; r < count; ++r) visible_[r] = rows.visible(first + r);
    tiles_.configure(count);
    const uint16_t sign = is_negative_ ? 0x8000 : 0;
    for (int64_t r = 0; r < count; ++r) {
      const float* from = rows.query(first + r);
      for (int64_t d = 0; d < dim_; d += 2 * kLanes) {
        const __m512i q = round_to_bf16(load(from + d), load(from + d + kLanes));
        _mm512_storeu_si512(q_ + r * dim_ + d,
                            _mm512_xor_si512(q, _mm512_set1_epi16(static_cast<short>(sign))));
      }
    }
  }

  void attend_span(int64_t span_begin, const Partials& partials) {
    const TokenRange all = overlap(seen_by_some(0, count_), {span_begin, span_begin + rows_->op.span});
    bool is_empty[kBlockRows / kAmxGroupRows] = {true, true};
    for (int64_t at = span_begin; at < all.end && all.begin < all.end;) {
      const KvSection section(*rows_, cache_, all, at);
      at = section.tokens.end;
      KvSection next;
      if (fetches_) {
        if (section.keys[2 * section.first_step] != fetched_) KeyFetch(section, dim_, size_).rest();
        next = following_section(at);
        fetched_ = next.is_empty() ? nullptr : next.keys[2 * next.first_step];
      }
      for (int64_t r = 0; r < count_; r += kAmxGroupRows) {
        const int64_t n = count_ - r < kAmxGroupRows ? count_ - r : kAmxGroupRows;
        const TokenRange seen = overlap(seen_by_some(r, n), section.tokens);
        if (seen.begin >= seen.end) continue;
        bool& is_first = is_empty[r / kAmxGroupRows];
        Partials to = partials;
        if (!is_first) to = section_.partials(partials.stride);
        attend_section(r, n, section, next, to);
        if (!is_first) fold_rows(n, [&](int64_t i) { return partials.row(r + i); }, to.from(r), dim_);
        is_first = false;
      }
    }
    for (int64_t r = 0; r < count_; r += kAmxGroupRows) {
      if (!is_empty[r / kAmxGroupRows]) continue;
      const int64_t n = count_ - r < kAmxGroupRows ? count_ - r : kAmxGroupRows;
      std::memset(partials.row(r).out, 0, static_cast<size_t>(n * partials.stride) * sizeof(float));
      for (int64_t i = r; i < r + n; ++i) {
        partials.max[i] = -__builtin_inff();
        partials.sum[i] = 0.0f;
      }
    }
  }

 private:
  static constexpr int64_t kSection = KvSection::kTokens;
  // Lines of odd numbers of cache lines, so that rows do not share sets of the cache.
  static constexpr int64_t kScoreStride = kSection + 16;
  static constexpr int64_t kWeightStride = kSection + 32;

  TokenRange seen_by_some(int64_t r, int64_t n) const { return {visible_[r].begin, visible_[r + n - 1].end}; }
  TokenRange seen_by_all(int64_t r, int64_t n) const { return {visible_[r + n - 1].begin, visible_[r].end}; }

  int64_t key_line() const { return 2 * size_; }

  // What this worker reads next: of the same rows from token `at` on, or else of the unit that follows.
  KvSection following_section(int64_t at) const {
    const TokenRange all = seen_by_some(0, count_);
    if (at < all.end) return {*rows_, cache_, all, at};
    if (following_ == nullptr) return {};
    const int64_t n = following_->count() < kBlockRows ? following_->count() : kBlockRows;
    const TokenRange theirs{following_->visible(0).begin, following_->visible(n - 1).end};
    if (theirs.begin >= theirs.end) return {};
    return {*following_, cache_, theirs, following_->item.kv_begin / rows_->op.span * rows_->op.span};
  }

  const bf16* values_of(int64_t token) const {
    const int32_t block = rows_->block_table()[token / size_];
    return cache_.values(block, rows_->kv_head) + value_index<bf16>(token % size_, 0, dim_);
  }

  // The partials of rows [r, r + n) of the block, n <= kAmxGroupRows, over what they see of a section.
  // Meanwhile asks for its values and for the keys of the next.
  void attend_section(int64_t r, int64_t n, const KvSection& section, const KvSection& next,
                      const Partials& to) {
    const TokenRange seen = overlap(seen_by_some(r, n), section.tokens);
    if (!is_finite_where_hidden(seen, overlap(seen_by_all(r, n), section.tokens))) {
      // A weight of zero would not keep the value out of a row that may not see it: row by row.
      for (int64_t i = r; i < r + n; ++i) {
        const TokenRange of_row = overlap(visible_[i], section.tokens);
        if (of_row.begin < of_row.end) {
          attend_section(i, 1, section, {}, to);
        } else {
          std::memset(to.row(i).out, 0, static_cast<size_t>(dim_) * sizeof(float));
          to.max[i] = -__builtin_inff();
          to.sum[i] = 0.0f;
        }
      }
      return;
    }
    const int64_t at = section.tokens.begin;
    const auto first = static_cast<int>((seen.begin - at) / kAmxDepth);
    const auto end = static_cast<int>((seen.end - 1 - at) / kAmxDepth + 1);
    // While scores are made and weighed, values are asked for; then, with values, the keys of the next
    // section.
    const KvSection none{};
    const bool fetches = fetches_ && r == 0;
    ValueFetch values(fetches ? section : none, dim_, size_);
    for (int step = first; step < end; ++step) {
      tiles_.multiply(scores_ + step * kAmxDepth, kScoreStride, q_ + r * dim_, dim_, n, dim_ / kAmxDepth,
                      key_line(), [&](int64_t depth, int half) __attribute__((always_inline)) {
                        values.next(2);
                        return section.keys[2 * step + half] + depth * (kAmxDepth / 2) * key_line();
                      });
    }
    for (int64_t i = 0; i < n; ++i) {
      weigh(i, overlap(visible_[r + i], section.tokens), at, first, end, &values, to.max + r + i,
            to.sum + r + i);
    }
    values.rest();
    find_values(section, first, end, seen);
    multiply_values(n, first, end, fetches ? next : none, to.out + r * to.stride, to.stride);
  }

  void multiply_values(int64_t n, int first, int end, const KvSection& next, float* out, int64_t stride) {
    const int64_t steps = end - first;
    KeyFetch keys(next, dim_, size_);
    const int64_t tiles = steps * dim_ / kAmxColumns;
    const int64_t lots = (keys.count() + tiles - 1) / tiles;
    const auto tile = [&](int64_t step, int64_t column) __attribute__((always_inline)) {
      keys.next(lots);
      return values_[first + step] + 2 * column;
    };
    const bf16* weights = weights_ + first * kAmxDepth;
    for (int64_t d = 0; d < dim_;) {
      if (n <= kAmxRows && d + 4 * kAmxColumns <= dim_) {
        tiles_.multiply<4>(out + d, stride, weights, kWeightStride, n, steps, 2 * dim_,
                           [&](int64_t step, int of)
                               __attribute__((always_inline)) { return tile(step, d + of * kAmxColumns); });
        d += 4 * kAmxColumns;
      } else {
        tiles_.multiply(out + d, stride, weights, kWeightStride, n, steps, 2 * dim_,
                        [&](int64_t step, int of)
                            __attribute__((always_inline)) { return tile(step, d + of * kAmxColumns); });
        d += 2 * kAmxColumns;
      }
    }
  }

  // The weights of row i of the group: steps [first, end) of the section that begins at `at`.
  void weigh(int64_t i, TokenRange visible, int64_t at, int first, int end, ValueFetch* values,
             float* max_score, float* sum) {
    const float* scores = scores_ + i * kScoreStride;
    bf16* weights = weights_ + i * kWeightStride;
    if (visible.begin >= visible.end) {
      for (int step = first; step < end; ++step) {
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
    for (int step = first; step < end; ++step) {
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
    for (int step = first; step < end; ++step) {
      values->next(3);
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
  void find_values(const KvSection& section, int first, int end, TokenRange seen) {
    for (int step = first; step < end; ++step) {
      const int64_t token = section.tokens.begin + step * kAmxDepth;
      const bf16* const* halves = section.values + 2 * step;
      if (token >= seen.begin && token + kAmxDepth <= seen.end && halves[1] == halves[0] + 16 * dim_) {
        values_[step] = halves[0];
        continue;
      }
      bf16* copy = copied_ + step * kAmxDepth * dim_;
      values_[step] = copy;
      for (int64_t i = 0; i < kAmxDepth; i += 2, copy += 2 * dim_) {
        const bool is_first_seen = token + i >= seen.begin && token + i < seen.end;
        const bool is_second_seen = token + i + 1 >= seen.begin && token + i + 1 < seen.end;
        if (!is_first_seen && !is_second_seen) {
          std::memset(copy, 0, static_cast<size_t>(2 * dim_) * sizeof(bf16));
          continue;
        }
        const uint32_t kept = (is_first_seen ? 0xffffu : 0u) | (is_second_seen ? 0xffff0000u : 0u);
        const __m512i mask = _mm512_set1_epi32(static_cast<int>(kept));
        const bf16* values = halves[i / 16] + i % 16 * dim_;
        for (int64_t d = 0; d < 2 * dim_; d += 32) {
          _mm512_storeu_si512(copy + d, _mm512_and_si512(_mm512_loadu_si512(values + d), mask));
        }
      }
    }
  }

  // Whether the values that only some of the rows see are numbers.
  bool is_finite_where_hidden(TokenRange seen, TokenRange common) const {
    for (int64_t t = seen.begin; t < seen.end; ++t) {
      if (t == common.begin && common.begin < common.end) t = common.end;
      if (t == seen.end) break;
      const bf16* value = values_of(t);
      bool is_finite = true;
      for (int64_t d = 0; d < dim_; ++d) is_finite &= (value[2 * d] & 0x7f80u) != 0x7f80u;
      if (!is_finite) return false;
    }
    return true;
  }

  KvCache<bf16> cache_;
  AttentionTiles tiles_;
  int64_t dim_, size_;
  float scale_;
  bool is_negative_;
  const PackedRows* rows_ = nullptr;
  const PackedRows* following_ = nullptr;
  int64_t count_ = 0;
  bool fetches_ = false;
  const bf16* fetched_ = nullptr;  // the first keys of the section that was asked for last
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
