// SPDX-License-Identifier: Apache-2.0
//
// Where a section of a bfloat16 cache lies: up to 256 tokens of one KV head, counted from the start of a
// span, in steps of 32 tokens. And how its memory is asked for in time: a core that only reads when it is
// about to multiply waits for memory half of the time, so whoever multiplies one part asks for another of the
// same size.
#pragma once

#if defined(FS_SIMD_AMX)

#include <cstdint>
#include <cstring>

#include "cpu/attention_amx_tiles.h"
#include "cpu/attention_unit.h"

namespace fs::FS_ISA {

struct KvSection {
  static constexpr int64_t kTokens = 256;
  static constexpr int kHalves = kTokens / 16;  // of steps

  TokenRange tokens{0, 0};
  TokenRange seen{0, 0};  // by some row of the block
  int first_step = 0;     // steps with tokens that are seen: [first_step, end_step)
  int end_step = 0;
  const bf16* keys[kHalves];    // 16 tokens each, at dim 0; where none is seen, keys of the step's other half
  const bf16* values[kHalves];  // nullptr where none is seen

  KvSection() = default;
  bool is_empty() const { return end_step == first_step; }

  // The first section of `rows` at or after token `at` with tokens of `visible`, which must not be empty.
  KvSection(const PackedRows& rows, const KvCache<bf16>& cache, TokenRange visible, int64_t at) {
    const int64_t span = rows.op.span;
    while (true) {
      const int64_t span_end = at / span * span + span;
      tokens = {at, at + kTokens < span_end ? at + kTokens : span_end};
      if (tokens.end > visible.begin) break;
      at = tokens.end;
    }
    seen = overlap(visible, tokens);
    if (seen.begin >= seen.end) return;
    first_step = static_cast<int>((seen.begin - at) / kAmxDepth);
    end_step = static_cast<int>((seen.end - 1 - at) / kAmxDepth + 1);
    const int32_t* table = rows.block_table();
    int half = 2 * first_step;
    int64_t block = (at + 16 * half) / cache.block_size;
    int64_t offset = (at + 16 * half) % cache.block_size;
    for (; half < 2 * end_step; ++half) {
      const int64_t token = at + 16 * half;
      const bool is_seen = token < seen.end && token + 16 > seen.begin;
      keys[half] = is_seen
                       ? cache.keys(table[block], rows.kv_head) + key_index<bf16>(offset, 0, cache.block_size)
                       : nullptr;
      values[half] =
          is_seen ? cache.values(table[block], rows.kv_head) + value_index<bf16>(offset, 0, cache.head_dim)
                  : nullptr;
      offset += 16;
      if (offset == cache.block_size) {
        offset = 0;
        block += 1;
      }
    }
    for (int step = first_step; step < end_step; ++step) {
      const bf16** pair = keys + 2 * step;
      if (pair[0] == nullptr) pair[0] = pair[1];
      if (pair[1] == nullptr) pair[1] = pair[0];
    }
  }
};

// The values of a step of 32 tokens: where they lie if one block holds them all and all are seen, else copied
// together to `copy`, zero where nobody sees them.
inline const bf16* seen_values(const bf16* const* halves, int64_t token, TokenRange seen, int64_t head_dim,
                               bf16* copy) {
  if (token >= seen.begin && token + kAmxDepth <= seen.end && halves[1] == halves[0] + 16 * head_dim) {
    return halves[0];
  }
  bf16* to = copy;
  for (int64_t i = 0; i < kAmxDepth; i += 2, to += 2 * head_dim) {
    const bool is_first_seen = token + i >= seen.begin && token + i < seen.end;
    const bool is_second_seen = token + i + 1 >= seen.begin && token + i + 1 < seen.end;
    if (!is_first_seen && !is_second_seen) {
      std::memset(to, 0, static_cast<size_t>(2 * head_dim) * sizeof(bf16));
      continue;
    }
    const uint32_t kept = (is_first_seen ? 0xffffu : 0u) | (is_second_seen ? 0xffff0000u : 0u);
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(kept));
    const bf16* values = halves[i / 16] + i % 16 * head_dim;
    for (int64_t d = 0; d < 2 * head_dim; d += 32) {
      _mm512_storeu_si512(to + d, _mm512_and_si512(_mm512_loadu_si512(values + d), mask));
    }
  }
  asm volatile("" ::: "memory");  // tiles are loaded from there
  return copy;
}

// Asks for the keys or the values of a section little by little, in lots of four lines, alternating between
// two steps: memory gives two streams of addresses at a time more than one.
template <bool kOfKeys>
class Fetch {
 public:
  Fetch(const KvSection& section, int64_t head_dim, int64_t block_size)
      : section_(section),
        step_(section.first_step),
        other_(step_ + 1 < section.end_step ? 1 : 0),
        lots_(head_dim / 4),
        line_(2 * block_size) {}

  int64_t count() const { return (section_.end_step - section_.first_step) * lots_; }

  __attribute__((always_inline)) void next(int64_t count) {
    for (; count > 0 && step_ < section_.end_step; --count) {
      ask(step_ + turn_);
      turn_ = other_ - turn_;
      if (turn_ == 0) lot_ += 1;
      if (lot_ == lots_) {
        lot_ = 0;
        step_ += 1 + other_;
        other_ = step_ + 1 < section_.end_step ? 1 : 0;
      }
    }
  }
  __attribute__((always_inline)) void rest() { next(count()); }

 private:
  __attribute__((always_inline)) void ask(int step) const {
    if constexpr (kOfKeys) {
      const bf16* lower = section_.keys[2 * step] + 2 * lot_ * line_;
      const bf16* upper = section_.keys[2 * step + 1] + 2 * lot_ * line_;
      prefetch(lower);
      prefetch(upper);
      prefetch(lower + line_);
      prefetch(upper + line_);
    } else {
      const bool is_upper = 2 * lot_ >= lots_;
      const bf16* values = section_.values[2 * step + (is_upper ? 1 : 0)];
      if (values == nullptr) return;
      values += 128 * (is_upper ? lot_ - lots_ / 2 : lot_);
      for (int i = 0; i < 4; ++i) prefetch(values + 32 * i);
    }
  }

  const KvSection& section_;
  int step_, other_;
  int64_t lots_, line_;
  int turn_ = 0;
  int64_t lot_ = 0;
};
using KeyFetch = Fetch<true>;
using ValueFetch = Fetch<false>;

// Where there is nothing to ask for.
struct NoFetch {
  int64_t count() const { return 0; }
  __attribute__((always_inline)) void next(int64_t) {}
  __attribute__((always_inline)) void rest() {}
};

}  // namespace fs::FS_ISA

#endif
