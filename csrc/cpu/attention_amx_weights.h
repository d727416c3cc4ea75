// SPDX-License-Identifier: Apache-2.0
//
// From scores to weights, for attention on AMX tiles: 2^(score - maximum) of each row, rounded to bfloat16.
//
// While a core has used its tiles within the last microsecond or so, only one of its two ports takes fma, max
// and the like, so these are what a vector of scores is paid for: eight of them. Comparisons and logic are
// free beside them.
#pragma once

#if defined(FS_SIMD_AMX)

#include <cstdint>

#include "core/simd.h"
#include "cpu/attention_amx_tiles.h"
#include "cpu/kv_layout.h"

namespace fs::FS_ISA {

// 2^(score * scale - shift) of the lanes in `seen`, relative error below 8e-5, and 0 below 2^-125 and in
// other lanes; NaN stays NaN. The exponent is at most some roundings above 0.
inline vf weight_of(vf score, vf scale, vf shift, __mmask16 seen) {
  const vf exponent = fma(score, scale, shift);
#if defined(FS_SIMD_EMULATED)
  float lanes[kLanes];
  float powers[kLanes];
  store(lanes, exponent);
  for (int i = 0; i < kLanes; ++i) {
    powers[i] = lanes[i] < -125.0f ? -125.0f : __builtin_floorf(lanes[i]);
    lanes[i] -= powers[i];
  }
  const vf f = load(lanes);
#else
  // What would be subnormal costs vscalefps 200 cycles.
  const __mmask16 kept = _mm512_mask_cmp_ps_mask(seen, exponent.v, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
  const vf f{_mm512_reduce_ps(exponent.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};  // [0, 1]
#endif
  vf p = set1(7.802450e-2f);
  p = fma(p, f, set1(2.2606716e-1f));
  p = fma(p, f, set1(6.9583354e-1f));
  p = fma(p, f, set1(9.9992522e-1f));
#if defined(FS_SIMD_EMULATED)
  store(lanes, p);
  float exponents[kLanes];
  store(exponents, exponent);
  for (int i = 0; i < kLanes; ++i) {
    if ((seen >> i & 1) == 0 || exponents[i] < -125.0f) {
      lanes[i] = 0.0f;
    } else if (lanes[i] == lanes[i]) {
      lanes[i] = __builtin_ldexpf(lanes[i], static_cast<int>(powers[i]));
    }
  }
  return load(lanes);
#else
  return {_mm512_maskz_scalef_ps(kept, p.v, exponent.v)};
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

// The maximum of a row, lane by lane.
class RowMaximum {
 public:
  // Of the 32 scores at `score`, those in `seen`.
  template <bool kAll>
  __attribute__((always_inline)) void add(const float* score, [[maybe_unused]] uint32_t seen) {
    if constexpr (kAll) {
      lower_ = fs::FS_ISA::max(lower_, load(score));
      upper_ = fs::FS_ISA::max(upper_, load(score + kLanes));
    } else {
      lower_ = {_mm512_mask_max_ps(lower_.v, static_cast<__mmask16>(seen), lower_.v, load(score).v)};
      upper_ = {
          _mm512_mask_max_ps(upper_.v, static_cast<__mmask16>(seen >> 16), upper_.v, load(score + kLanes).v)};
    }
  }
  float value() const { return _mm512_reduce_max_ps(fs::FS_ISA::max(lower_, upper_).v); }

 private:
  vf lower_ = set1(-__builtin_inff());
  vf upper_ = set1(-__builtin_inff());
};

// Rows of scores of one section of keys, steps [first, end) of 32, and where their weights go.
struct ScoreRows {
  static constexpr int kKeys = 256;
  // Lines of odd numbers of cache lines, so that rows do not share sets of the cache.
  static constexpr int64_t kScoreStride = kKeys + 16;
  static constexpr int64_t kWeightStride = kKeys + 32;

  const float* scores;
  bf16* weights;
  int first, end;
  float scale;  // not negative

  // Row i sees the tokens visible[i] of a section that begins at token `at`; its maximum, scaled, goes to
  // max[i], and -inf if it sees none. Calls between() for each step of each row.
  template <class F>
  void weigh(int64_t num_rows, const TokenRange* visible, int64_t at, float* max, const F& between) const {
    // Up to four together: one row's maximum is found while another is weighed.
    for (int64_t i = 0; i < num_rows;) {
      const int64_t rows = num_rows - i < 4 ? num_rows - i : 4;
      bool all = true;
      for (int64_t r = i; r < i + rows; ++r) {
        all = all && visible[r].begin <= at + first * kAmxDepth && visible[r].end >= at + end * kAmxDepth;
      }
      if (rows == 4) {
        all ? weigh_rows<4, true>(i, visible, at, max, between)
            : weigh_rows<4, false>(i, visible, at, max, between);
      } else if (rows == 3) {
        weigh_rows<3, false>(i, visible, at, max, between);
      } else if (rows == 2) {
        weigh_rows<2, false>(i, visible, at, max, between);
      } else {
        weigh_rows<1, false>(i, visible, at, max, between);
      }
      i += rows;
    }
  }

  // The weights of row i for a step of 32 keys, 0 for those that are not in `seen`; shift: less its maximum.
  __attribute__((always_inline)) void weigh_step(int64_t i, int step, vf shift, uint32_t seen) const {
    const float* score = scores + i * kScoreStride + step * kAmxDepth;
    const vf a = weight_of(load(score), set1(scale), shift, static_cast<__mmask16>(seen));
    const vf b = weight_of(load(score + kLanes), set1(scale), shift, static_cast<__mmask16>(seen >> 16));
    _mm512_storeu_si512(weights + i * kWeightStride + step * kAmxDepth, round_to_bf16(a, b));
  }

  // Which of the 32 keys from `token` on are visible.
  static uint32_t visible_keys(TokenRange visible, int64_t token) {
    const int64_t from = visible.begin - token;
    const int64_t to = visible.end - token;
    if (from >= 32 || to <= 0) return 0;
    const uint32_t below_end = to >= 32 ? ~0u : (1u << to) - 1;
    return from <= 0 ? below_end : below_end & ~((1u << from) - 1);
  }

 private:
  template <int kRows, bool kAll, class F>
  __attribute__((always_inline)) void weigh_rows(int64_t i, const TokenRange* visible, int64_t at, float* max,
                                                 const F& between) const {
    const auto seen = [&](int r, int step) __attribute__((always_inline)) {
      return kAll ? ~0u : visible_keys(visible[i + r], at + step * kAmxDepth);
    };
    RowMaximum highest[kRows];
    for (int step = first; step < end; ++step) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        highest[r].template add<kAll>(scores + (i + r) * kScoreStride + step * kAmxDepth, seen(r, step));
      }
    }
    vf shift[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      float top = highest[r].value() * scale;
      if (!kAll && visible[i + r].begin >= visible[i + r].end) top = -__builtin_inff();
      max[i + r] = top;
      shift[r] = set1(-top);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      for (int step = first; step < end; ++step) {
        between();
        weigh_step(i + r, step, shift[r], seen(r, step));
      }
    }
  }
};

}  // namespace fs::FS_ISA

#endif
