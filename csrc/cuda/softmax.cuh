// SPDX-License-Identifier: Apache-2.0
//
// The online softmax (Milakov and Gimelshein 2018) of a warp's 16 rows, in base 2, and the fold of two
// partial results. `scale` is such that exp(score) = 2^(scale * score); maxima are of unscaled scores.
#pragma once

#include "cuda/tile.cuh"

namespace fs::cuda {

// A row's softmax over some keys, not yet divided: out = sum of 2^(scale (score - max)) value, and sum the
// same without value. Of nothing: max -infinity, and zeros.
template <int kDim>
struct PartialRows {
  OutputFragments<kDim> out;
  float sums[2];
  float max[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
    }
    sums[0] = sums[1] = 0.0f;
    max[0] = max[1] = __int_as_float(0xff800000);
  }
};

// What exponents are relative to: a row that has seen nothing has no maximum, and (-inf) - (-inf) is NaN.
__device__ __forceinline__ float exponent_base(float max) {
  return max == __int_as_float(0xff800000) ? 0.0f : max;
}

// Scores of a lane's row `half` outside its keys [begin, end) become -infinity; `first_key` is the key of
// scores[0].
__device__ __forceinline__ void mask(ScoreFragments& scores, int half, int first_key, int begin, int end) {
  const int lane_key = first_key + lane_id() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = lane_key + 8 * n + i;
      if (key < begin || key >= end) scores[n][2 * half + i] = __int_as_float(0xff800000);
    }
  }
}

// Turns the scores of a tile into weights and prepares `rows` for their sums.
template <class T, int kDim>
__device__ __forceinline__ void update(PartialRows<kDim>& rows, const ScoreFragments& scores, float scale,
                                       WeightFragments& weights) {
  float factors[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float high = rows.max[half];
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      high = fmaxf(high, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
    high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, 1));
    high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, 2));
    const float base = exponent_base(high);
    factors[half] = exp2_flushed((rows.max[half] - base) * scale);
    rows.max[half] = high;
    const float shift = -base * scale;
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      weights[n / 2][n % 2 * 2 + half] =
          pack_pair<T>(exp2_flushed(__fmaf_rn(scores[n][2 * half], scale, shift)),
                       exp2_flushed(__fmaf_rn(scores[n][2 * half + 1], scale, shift)));
    }
  }
  // A product with 1 changes nothing: most tiles leave all maxima as they are.
  if (!__any_sync(kAllLanes, factors[0] != 1.0f || factors[1] != 1.0f)) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows.sums[half] *= factors[half];
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      rows.out[n][2 * half] *= factors[half];
      rows.out[n][2 * half + 1] *= factors[half];
    }
  }
}

// The one arithmetic by which two partials become one, a's keys before b's, wherever it happens.
struct Fold {
  float max, of_a, of_b;

  __device__ __forceinline__ Fold(float max_a, float max_b, float scale) {
    max = fmaxf(max_a, max_b);
    const float base = exponent_base(max);
    of_a = exp2_flushed((max_a - base) * scale);
    of_b = exp2_flushed((max_b - base) * scale);
  }
  __device__ __forceinline__ float operator()(float a, float b) const {
    return __fmaf_rn(b, of_b, __fmul_rn(a, of_a));
  }
};

// What the outputs are multiplied by in the end: 0 for a row that has seen nothing.
__device__ __forceinline__ float reciprocal_of_sum(float sum) {
  return sum == 0.0f ? 0.0f : __frcp_rn(sum);
}

}  // namespace fs::cuda
