// SPDX-License-Identifier: Apache-2.0
//
// From the model's logits to those that a request wants: allowed tokens, logit bias, penalties.
#pragma once

#include <cstdint>

#include "cpu/sample_scan.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

inline const uint32_t* allowed_row(const Sample& op, int64_t row) {
  if (!op.allowed.defined()) return nullptr;
  const int32_t index = op.allowed_rows.ptr<const int32_t>()[row];
  return index < 0 ? nullptr : op.allowed.ptr<const uint32_t>() + index * op.allowed.shape[1];
}

// The entries of a row in a list with offsets, none if the list is not given.
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
};
inline Range range_of(const Tensor& offsets, int64_t row) {
  if (!offsets.defined()) return {};
  return {offsets.ptr<const int32_t>()[row], offsets.ptr<const int32_t>()[row + 1]};
}

inline bool changes_logits(const Sample& op, int64_t row) {
  const Range bias = range_of(op.bias_offsets, row);
  const Range seen = range_of(op.seen_offsets, row);
  return allowed_row(op, row) != nullptr || bias.begin < bias.end || seen.begin < seen.end;
}

inline void mask_logits(float* logits, int64_t vocab, const uint32_t* allowed) {
  for (int64_t begin = 0; begin < vocab; begin += 32) {
    const uint32_t word = allowed[begin / 32];
    if (word == 0xffffffffu) continue;
    const int64_t count = begin + 32 <= vocab ? 32 : vocab - begin;
    for (int64_t i = 0; i < count; ++i) {
      logits[begin + i] = ((word >> i) & 1u) != 0 ? logits[begin + i] : kMinusInfinity;
    }
  }
}

// Writes the changed logits of a row to `out`.
inline void change_logits(const Sample& op, int64_t row, const float* logits, float* out) {
  const int64_t vocab = op.logits.shape[1];
  __builtin_memcpy(out, logits, static_cast<size_t>(vocab) * sizeof(float));
  if (const uint32_t* allowed = allowed_row(op, row); allowed != nullptr) mask_logits(out, vocab, allowed);

  const Range bias = range_of(op.bias_offsets, row);
  for (int64_t i = bias.begin; i < bias.end; ++i) {
    out[op.bias_ids.ptr<const int32_t>()[i]] += op.bias.ptr<const float>()[i];
  }

  const Range seen = range_of(op.seen_offsets, row);
  if (seen.begin == seen.end) return;
  const float repetition = op.repetition_penalty.ptr<const float>()[row];
  const float frequency = op.frequency_penalty.ptr<const float>()[row];
  const float presence = op.presence_penalty.ptr<const float>()[row];
  for (int64_t i = seen.begin; i < seen.end; ++i) {
    float& logit = out[op.seen_ids.ptr<const int32_t>()[i]];
    const int32_t count = op.seen_counts.ptr<const int32_t>()[i];
    logit = logit > 0.0f ? logit / repetition : logit * repetition;
    if (count > 0) logit = logit - frequency * static_cast<float>(count) - presence;
  }
}

}  // namespace fs::FS_ISA
