// SPDX-License-Identifier: Apache-2.0
//
// Drawing one token. Every token i that may be chosen runs a race with the finishing time E_i / w_i, where
// w_i is its weight and E_i its own exponentially distributed noise; the first one home is token i with
// probability w_i / sum(w). It is the Gumbel-max trick, argmax(log w_i + Gumbel_i), without its logarithms.
// Kept here is the inverse, w_i / E_i; the largest wins, and the lower id among equals.
#pragma once

#include <cstdint>

#include "cpu/sample_noise.h"
#include "cpu/sample_scan.h"
#include "cpu/sample_select.h"
#include "layout/sampling.h"

namespace fs::FS_ISA {

class Race {
 public:
  Race(uint64_t seed, int32_t position) : seed_(seed), position_(static_cast<uint32_t>(position)) {}

  int32_t winner() const { return winner_; }

  void run(const Candidates& candidates) {
    for (int64_t begin = 0; begin < candidates.count; begin += kNoiseBlocks) {
      const int64_t left = candidates.count - begin;
      const int count = left < kNoiseBlocks ? static_cast<int>(left) : kNoiseBlocks;
      uint32_t token_blocks[kNoiseBlocks] = {};
      uint32_t noise[4 * kNoiseBlocks];
      for (int i = 0; i < count; ++i) token_blocks[i] = static_cast<uint32_t>(candidates.ids[begin + i]) / 4;
      noise_of_blocks(token_blocks, position_, seed_, noise);
      for (int i = 0; i < count; ++i) {
        const int32_t id = candidates.ids[begin + i];
        enter(id, candidates.weights[begin + i], noise[4 * i + id % 4]);
      }
    }
  }

  // The kBlock tokens from first_id on; tokens with weight 0 do not take part.
  void run_block(int64_t first_id, const float* weights) {
    static_assert(kBlock == 4 * kNoiseBlocks);
    uint32_t token_blocks[kNoiseBlocks];
    uint32_t noise[kBlock];
    for (int i = 0; i < kNoiseBlocks; ++i) token_blocks[i] = static_cast<uint32_t>(first_id / 4 + i);
    noise_of_blocks(token_blocks, position_, seed_, noise);
    // E is never below v, its uniform number: w / v < best proves the loss without a logarithm. The factor
    // covers the roundings of this estimate.
    uint32_t may_win = 0;
    for (int i = 0; i < kBlock; ++i) may_win += is_contender(weights[i], noise[i]);
    if (may_win == 0) return;
    for (int i = 0; i < kBlock; ++i) {
      if (is_contender(weights[i], noise[i])) enter(static_cast<int32_t>(first_id + i), weights[i], noise[i]);
    }
  }

  // False if no token of weight at most `weight` can win any more, whatever its noise: E >= 2^-33.
  bool is_open_to(float weight) const { return weight * 0x1.01p33f >= best_; }

 private:
  bool is_contender(float weight, uint32_t noise) const {
    const float v = static_cast<float>(static_cast<int32_t>(noise >> 1)) * 0x1p-31f;
    return v * best_ <= weight * 0x1.00001p0f;
  }

  void enter(int32_t id, float weight, uint32_t noise) {
    if (!(weight > 0.0f)) return;
    const float score = weight / exponential(noise);
    if (score > best_ || (score == best_ && id < winner_)) {
      best_ = score;
      winner_ = id;
    }
  }

  uint64_t seed_;
  uint32_t position_;
  float best_ = 0.0f;
  int32_t winner_ = -1;
};

}  // namespace fs::FS_ISA
