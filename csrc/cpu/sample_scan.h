// SPDX-License-Identifier: Apache-2.0
//
// One pass over a row of logits: is it sound, what is its largest value, and what is the largest value of
// each block of 64 tokens. The later passes of sampling visit only blocks that can matter.
#pragma once

#include <cstdint>

#include "core/simd.h"
#include "layout/sampling.h"

namespace fs::FS_ISA {

inline constexpr int64_t kBlock = 64;  // tokens; a whole number of vectors and of Philox blocks
inline constexpr float kMinusInfinity = -__builtin_inff();

inline int64_t num_blocks(int64_t vocab) {
  return (vocab + kBlock - 1) / kBlock;
}

struct Scan {
  float max;
  bool sound;  // no NaN and no +infinity
};

// True if all of row[0, count) is finite or -infinity.
inline bool is_sound(const float* row, int64_t count) {
  int bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= !(row[i] <= kLargestFloat);
  return bad == 0;
}

inline float max_of(const float* row, int64_t count) {
  float max = kMinusInfinity;
  for (int64_t i = 0; i < count; ++i) max = row[i] > max ? row[i] : max;
  return max;
}

inline float max_of_block(const float* row) {
  vf a = max(load(row), load(row + kLanes));
  vf b = max(load(row + 2 * kLanes), load(row + 3 * kLanes));
  for (int64_t i = 4 * kLanes; i < kBlock; i += 4 * kLanes) {
    a = max(a, max(load(row + i), load(row + i + kLanes)));
    b = max(b, max(load(row + i + 2 * kLanes), load(row + i + 3 * kLanes)));
  }
  return reduce_max(max(a, b));
}

inline Scan scan(const float* row, int64_t vocab, float* block_max) {
  Scan result{kMinusInfinity, true};
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const bool whole = begin + kBlock <= vocab;
    const float max = whole ? max_of_block(row + begin) : max_of(row + begin, vocab - begin);
    block_max[begin / kBlock] = max;
    result.max = max > result.max ? max : result.max;
    result.sound &= whole ? is_sound(row + begin, kBlock) : is_sound(row + begin, vocab - begin);
  }
  return result;
}

// The lowest token id whose logit is the maximum of a sound row.
inline int32_t first_of_max(const float* row, int64_t vocab, const float* block_max, float max) {
  int64_t block = 0;
  while (block_max[block] != max) ++block;
  int64_t id = block * kBlock;
  while (id < vocab - 1 && row[id] != max) ++id;
  return static_cast<int32_t>(id);
}

}  // namespace fs::FS_ISA
