// SPDX-License-Identifier: Apache-2.0
//
// From the model's logits to those that a request wants: allowed tokens, logit bias, penalties; exactly the
// operations of the CPU op, each rounded on its own.
#pragma once

#include <cstdint>

#include "cuda/logits_row.cuh"

namespace fs::cuda {

// The entries of each row in a list with offsets; offsets == nullptr: not given.
struct RowList {
  const int32_t* offsets;
  const int32_t* ids;
  int size;

  __device__ __forceinline__ int begin(int64_t row) const { return clamped(row); }
  __device__ __forceinline__ int end(int64_t row) const { return clamped(row + 1); }

 private:
  __device__ __forceinline__ int clamped(int64_t at) const {
    const int offset = offsets == nullptr ? 0 : offsets[at];
    return offset < 0 ? 0 : offset < size ? offset : size;
  }
};

struct LogitChanges {
  RowList bias_list;
  const float* bias;
  RowList seen_list;
  const int32_t* seen_counts;
  const float* repetition;
  const float* frequency;
  const float* presence;
  const uint32_t* allowed;  // or nullptr
  const int32_t* allowed_rows;
  int num_masks, mask_words;

  // The mask of a row: -1: all tokens, num_masks: the index is wrong, no token.
  __device__ __forceinline__ int mask_of(int64_t row) const {
    if (allowed == nullptr) return -1;
    const int mask = allowed_rows[row];
    return mask >= -1 && mask < num_masks ? mask : num_masks;
  }
  __device__ __forceinline__ bool any(int64_t row) const {
    return mask_of(row) != -1 || bias_list.begin(row) < bias_list.end(row) ||
           seen_list.begin(row) < seen_list.end(row);
  }
};

__device__ __forceinline__ float penalised(float logit, int count, float repetition, float frequency,
                                           float presence) {
  logit = logit > 0.0f ? __fdiv_rn(logit, repetition) : rounded_mul(logit, repetition);
  if (count > 0) {
    logit = rounded_add(rounded_add(logit, -rounded_mul(frequency, static_cast<float>(count))), -presence);
  }
  return logit;
}

// Writes the changed logits of a row to `out`, 16-byte aligned memory of `vocab` floats (rounded up to four).
// False if the logits hold NaN or +infinity. Ends with a barrier.
__device__ __forceinline__ bool change_logits(const LogitChanges& changes, int64_t b, const LogitsRow& row,
                                              float* out) {
  const int mask = changes.mask_of(b);
  const bool none = mask == changes.num_masks;
  const uint32_t* allowed =
      mask >= 0 && !none ? changes.allowed + int64_t{mask} * changes.mask_words : nullptr;
  bool sound = true;
  row.visit([&](int index, const Quad& quad) {
    const uint32_t bits = none ? 0 : allowed == nullptr ? 0xfu : allowed[index / 8] >> (index % 8 * 4);
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sound = sound && is_sound(quad.x[i]);
      x[i] = (bits >> i & 1u) != 0 ? quad.x[i] : kMinusInfinity;
    }
    *reinterpret_cast<float4*>(out + 4 * index) = make_float4(x[0], x[1], x[2], x[3]);
  });
  const bool all_sound = __syncthreads_and(sound ? 1 : 0) != 0;

  const RowList& biased = changes.bias_list;
  for (int i = biased.begin(b) + static_cast<int>(threadIdx.x); i < biased.end(b); i += kRowThreads) {
    const int id = biased.ids[i];
    bool first = id >= 0 && id < row.vocab;
    for (int j = biased.begin(b); j < i && first; ++j) first = biased.ids[j] != id;
    if (!first) continue;
    // An id that comes again is added again, in the order of the list, by the thread of its first entry.
    float logit = out[id];
    for (int j = i; j < biased.end(b); ++j) {
      if (biased.ids[j] == id) logit = rounded_add(logit, changes.bias[j]);
    }
    out[id] = logit;
  }
  __syncthreads();

  const RowList& seen = changes.seen_list;
  for (int i = seen.begin(b) + static_cast<int>(threadIdx.x); i < seen.end(b); i += kRowThreads) {
    const int id = seen.ids[i];
    if (id < 0 || id >= row.vocab) continue;
    out[id] = penalised(out[id], changes.seen_counts[i], changes.repetition[b], changes.frequency[b],
                        changes.presence[b]);
  }
  __syncthreads();
  return all_sound;
}

}  // namespace fs::cuda
