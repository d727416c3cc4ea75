// SPDX-License-Identifier: Apache-2.0
//
// The rows of a unit of attention on AMX tiles, over a bfloat16 cache: both products in bfloat16 with float32
// sums. Queries are rounded to bfloat16, and so are the weights of a row, before they are summed.
//
// A section of up to 256 tokens, counted from the start of the span, is done in three passes, so that nothing
// is rescaled on the way: scores of all its keys, weights 2^(score - maximum), output. Decodes and chunks of
// any length run the same instructions on as many rows of a tile as they have. A row's arithmetic:
//   score    as one instruction sums 32 dims, then by steps of 32
//   sum      and
//   output   as one instruction sums 32 tokens (from the start of the span), then by steps of 32
// and a key that a row may not see adds exactly nothing to any of them.
#pragma once

#if defined(FS_SIMD_AMX)

#include <cstdint>
#include <cstring>

#include "cpu/attention_amx_queries.h"
#include "cpu/attention_amx_stream.h"
#include "cpu/attention_amx_tiles.h"
#include "cpu/attention_amx_weights.h"
#include "cpu/attention_section.h"
#include "cpu/attention_unit.h"

namespace fs::FS_ISA {

class AmxSpans {
 public:
  static constexpr int kBlockRows = 3 * kAmxGroupRows;
  static constexpr int64_t kL2Bytes = 1 << 20;
  // A token of one head takes 17 ns from memory at 15 GB/s, and a row of it a third of one.
  static constexpr int64_t kRowsPerTokenRead = 48;

  using Stream = AmxStream;
  AttentionTiles& tiles() { return tiles_; }

  // The head sizes that tiles take.
  static bool takes(int64_t head_dim) { return head_dim % kAmxDepth == 0; }

  AmxSpans(const Attention& op, const AttentionShape& shape) : cache_(op.kv_cache), queries_(op) {
    dim_ = shape.head_dim;
    size_ = shape.block_size;
  }

  void begin(const PackedRows& rows, const PackedRows* following, int64_t first, int64_t count) {
    rows_ = &rows;
    following_ = following;
    count_ = count;
    is_first_ = first == 0;  // the rows after the first ones find keys and values in the cache
    if (item_ != &rows.item || kv_head_ != rows.kv_head) {
      is_warm_ = item_ != nullptr && stays_warm(*item_, kv_head_, rows);
      item_ = &rows.item;
      kv_head_ = rows.kv_head;
    }
    tiles_.configure(count);
    rows.for_each(first, count,
                  [&](int64_t r, int64_t token, int64_t) { visible_[r] = rows.visible(token); });
    queries_.round(rows, first, count, q_);
  }

  void attend_span(int64_t span_begin, const Partials& partials) {
    const TokenRange all = overlap(seen_by_some(0, count_), {span_begin, span_begin + rows_->op.span});
    bool is_empty[kBlockRows / kAmxGroupRows];
    for (bool& group : is_empty) group = true;
    const KvSection none{};
    for (int64_t at = span_begin; at < all.end && all.begin < all.end;) {
      const KvSection section(*rows_, cache_, all, at);
      at = section.tokens.end;
      KvSection next;
      if (is_first_) {
        if (!is_warm_ && section.keys[2 * section.first_step] != fetched_) {
          KeyFetch(section, dim_, size_).rest();
        }
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
        if (r == 0 && is_first_ && !(is_warm_ && next.is_empty())) {
          attend_section(r, n, section, to, KeyFetch(next, dim_, size_),
                         ValueFetch(is_warm_ ? none : section, dim_, size_));
        } else {
          attend_section(r, n, section, to, NoFetch(), NoFetch());
        }
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
  static_assert(kSection == ScoreRows::kKeys);
  static constexpr int64_t kScoreStride = ScoreRows::kScoreStride;
  static constexpr int64_t kWeightStride = ScoreRows::kWeightStride;

  TokenRange seen_by_some(int64_t r, int64_t n) const { return {visible_[r].begin, visible_[r + n - 1].end}; }
  TokenRange seen_by_all(int64_t r, int64_t n) const { return {visible_[r + n - 1].begin, visible_[r].end}; }

  int64_t key_line() const { return 2 * size_; }

  // Whether the keys and values of `rows` are in L2 after a unit of `item` and `kv_head`.
  bool stays_warm(const AttentionItem& item, int64_t kv_head, const PackedRows& rows) const {
    return rows.kv_head == kv_head && rows.item.request == item.request &&
           rows.item.kv_begin >= item.kv_begin && rows.item.kv_end <= item.kv_end &&
           (item.kv_end - item.kv_begin) * 2 * dim_ * int64_t{sizeof(bf16)} <= kL2Bytes;
  }

  // What this worker has to ask for next: of the same rows from token `at` on, or else of the unit that
  // follows.
  KvSection following_section(int64_t at) const {
    const TokenRange all = seen_by_some(0, count_);
    if (at < all.end) return is_warm_ ? KvSection() : KvSection(*rows_, cache_, all, at);
    if (following_ == nullptr || stays_warm(rows_->item, rows_->kv_head, *following_)) return {};
    const int64_t n = following_->count() < kBlockRows ? following_->count() : kBlockRows;
    const TokenRange theirs{following_->visible(0).begin,
                            following_->visible(following_->token_of(n - 1)).end};
    if (theirs.begin >= theirs.end) return {};
    return {*following_, cache_, theirs, following_->item.kv_begin / rows_->op.span * rows_->op.span};
  }

  const bf16* values_of(int64_t token) const {
    const int32_t block = rows_->block_table()[token / size_];
    return cache_.values(block, rows_->kv_head) + value_index<bf16>(token % size_, 0, dim_);
  }

  // The partials of rows [r, r + n) of the block, n <= kAmxGroupRows, over what they see of a section.
  // Asks for `values` while scores are made and weighed, then, with values, for `keys`: those of the next
  // section.
  template <class Keys, class Values>
  void attend_section(int64_t r, int64_t n, const KvSection& section, const Partials& to, Keys keys,
                      Values values) {
    const TokenRange seen = overlap(seen_by_some(r, n), section.tokens);
    if (!is_finite_where_hidden(seen, overlap(seen_by_all(r, n), section.tokens))) {
      // A weight of zero would not keep the value out of a row that may not see it: row by row.
      for (int64_t i = r; i < r + n; ++i) {
        const TokenRange of_row = overlap(visible_[i], section.tokens);
        if (of_row.begin < of_row.end) {
          attend_section(i, 1, section, to, NoFetch(), NoFetch());
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
    for (int step = first; step < end; ++step) {
      tiles_.multiply(scores_ + step * kAmxDepth, kScoreStride, q_ + r * dim_, dim_, n, dim_ / kAmxDepth,
                      key_line(), [&](int64_t depth, int half) __attribute__((always_inline)) {
                        values.next(2);
                        return section.keys[2 * step + half] + depth * (kAmxDepth / 2) * key_line();
                      });
    }
    const ScoreRows rows{scores_, weights_, first, end, queries_.scale()};
    rows.weigh(n, visible_ + r, at, to.max + r, [&]() __attribute__((always_inline)) { values.next(3); });
    values.rest();
    find_values(section, first, end, seen);
    multiply_values(n, first, end, keys, to.out + r * to.stride, to.stride);
    tiles_.multiply<1>(sums_, kAmxColumns, weights_ + first * kAmxDepth, kWeightStride, n, end - first,
                       2 * kAmxColumns, [&](int64_t, int) { return kOnes.value; });
    for (int64_t i = 0; i < n; ++i) to.sum[r + i] = sums_[i * kAmxColumns];
  }

  template <class Keys>
  void multiply_values(int64_t n, int first, int end, Keys& keys, float* out, int64_t stride) {
    const int64_t steps = end - first;
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

  void find_values(const KvSection& section, int first, int end, TokenRange seen) {
    for (int step = first; step < end; ++step) {
      values_[step] = seen_values(section.values + 2 * step, section.tokens.begin + step * kAmxDepth, seen,
                                  dim_, copied_ + step * kAmxDepth * dim_);
    }
  }

  // Whether the values that only some of the rows see are numbers.
  bool is_finite_where_hidden(TokenRange seen, TokenRange common) const {
    for (int64_t t = seen.begin; t < seen.end; ++t) {
      if (t == common.begin && common.begin < common.end) t = common.end;
      if (t == seen.end) break;
      const bf16* pair = values_of(t / 2 * 2);
      const __m512i exponent = _mm512_set1_epi32(t % 2 == 0 ? 0x7f80 : 0x7f800000);
      __mmask16 is_bad = 0;
      for (int64_t d = 0; d < 2 * dim_; d += 32) {
        const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(pair + d), exponent);
        is_bad |= _mm512_cmpeq_epi32_mask(bits, exponent);
      }
      if (is_bad != 0) return false;
    }
    return true;
  }

  KvCache<bf16> cache_;
  AttentionTiles tiles_;
  AmxQueries queries_;
  int64_t dim_, size_;
  const PackedRows* rows_ = nullptr;
  const PackedRows* following_ = nullptr;
  int64_t count_ = 0;
  bool is_first_ = false;
  bool is_warm_ = false;
  const AttentionItem* item_ = nullptr;  // of this unit
  int64_t kv_head_ = 0;
  const bf16* fetched_ = nullptr;  // the first keys of the section that was asked for last
  TokenRange visible_[kBlockRows];
  const bf16* values_[kSection / kAmxDepth];
  PartialsMemory<kBlockRows> section_;
  alignas(64) bf16 q_[(kBlockRows + kAmxGroupRows) * kMaxHeadDim];
  alignas(64) float sums_[kAmxGroupRows * kAmxColumns];
  alignas(64) float scores_[kAmxGroupRows * kScoreStride];
  alignas(64) bf16 weights_[kAmxGroupRows * kWeightStride];
  alignas(64) bf16 copied_[kSection * kMaxHeadDim];
};

}  // namespace fs::FS_ISA

#endif
