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

// The largest of a block, and in `wrong` a NaN if the block, or one before it, has a NaN or +infinity: of any
// other number, or the lowest instead of it, 0 times it is 0.
inline float max_of_block(const float* row, vf (&wrong)[2]) {
  vf max_a = load(row), max_b = load(row + kLanes);
  const vf lowest = set1(-kLargestFloat);
  for (int64_t i = 0; i < kBlock; i += 2 * kLanes) {
    const vf a = load(row + i), b = load(row + i + kLanes);
    max_a = max(max_a, a);
    max_b = max(max_b, b);
    wrong[0] =
        fma(max(lowest, a), zero(), wrong[0]);  // of two operands, one of them NaN, max gives the second
    wrong[1] = fma(max(lowest, b), zero(), wrong[1]);
  }
  return reduce_max(max(max_a, max_b));
}

inline Scan scan(const float* row, int64_t vocab, float* block_max) {
  constexpr int64_t kAhead = 8 * kBlock;  // 2 KB: the processor itself stops at every 4 KB
  Scan result{kMinusInfinity, true};
  vf wrong[2] = {zero(), zero()};
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    float max;
    if (begin + kBlock <= vocab) {
      for (int64_t i = 0; i < kBlock; i += 16) prefetch(row + begin + kAhead + i);
      max = max_of_block(row + begin, wrong);
    } else {
      max = max_of(row + begin, vocab - begin);
      result.sound = is_sound(row + begin, vocab - begin);
    }
    block_max[begin / kBlock] = max;
    result.max = max > result.max ? max : result.max;
  }
  const float sum = reduce_add(wrong[0] + wrong[1]);
  result.sound &= sum == sum;
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
