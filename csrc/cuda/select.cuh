// SPDX-License-Identifier: Apache-2.0
//
// The shortest prefix of tokens in the order (logit descending, id ascending) that reaches a target: a count
// (top-k) or a mass (top-p). A radix selection on the tokens' 64-bit keys, ten bits a round, all in integers,
// so that the order in which threads add cannot matter. Rounds end as soon as the prefix ends with a whole
// bin.
#pragma once

#include <cstdint>

#include "cuda/logits_row.cuh"

namespace fs::cuda {

inline constexpr int kDigitBits = 10;
inline constexpr int kBins = 1 << kDigitBits;
static_assert(kBins == kRowThreads);  // a thread per bin

struct SelectScratch {
  unsigned long long sum[kBins];
  uint32_t count[kBins];
  uint64_t warps[kMaxWarps];
  unsigned long long left;
  int bin;  // -1: the bins do not reach the target
  bool whole;
};

// The key of the last token of the prefix, or a lower one that no further token reaches. for_each(f) calls
// f(key, measure) for this thread's share of the tokens; together the measures should sum to at least
// `target`, which is at least 1 (else the answer is 0: everything). All threads of the block call it and get
// the answer.
template <class ForEach>
__device__ __forceinline__ uint64_t find_cut(uint64_t target, SelectScratch& scratch,
                                             const ForEach& for_each) {
  const int thread = static_cast<int>(threadIdx.x);
  const int my_bin = kBins - 1 - thread;  // from the largest key down
  uint64_t cut = 0;
  uint64_t left = target;
  int known_bits = 0;
  while (known_bits < 64) {
    const int digit_bits = 64 - known_bits < kDigitBits ? 64 - known_bits : kDigitBits;
    const int shift = 64 - known_bits - digit_bits;
    __syncthreads();  // the last round's, or the caller's, reads are over
    scratch.sum[my_bin] = 0;
    scratch.count[my_bin] = 0;
    if (thread == 0) scratch.bin = -1;
    __syncthreads();
    for_each([&](uint64_t key, uint32_t measure) {
      if (known_bits != 0 && ((key ^ cut) >> (64 - known_bits)) != 0) return;
      const auto bin = static_cast<uint32_t>(key >> shift) & ((1u << digit_bits) - 1);
      atomicAdd(&scratch.sum[bin], static_cast<unsigned long long>(measure));
      atomicAdd(&scratch.count[bin], 1u);
    });
    __syncthreads();
    const uint64_t own = scratch.sum[my_bin];
    const uint64_t reached = block_inclusive_sum(own, scratch.warps);
    if (reached >= left && reached - own < left) {  // true in one thread
      scratch.bin = my_bin;
      scratch.left = left - (reached - own);
      scratch.whole = reached == left || scratch.count[my_bin] == 1;
    }
    __syncthreads();
    if (scratch.bin < 0) return cut;
    cut |= static_cast<uint64_t>(scratch.bin) << shift;
    left = scratch.left;
    known_bits += digit_bits;
    if (scratch.whole) return cut;
  }
  return cut;
}

// A lower bound of the k-th largest order_key of the row: each of the k largest maxima of the threads is a
// logit.
__device__ __forceinline__ uint32_t bound_of_top_k(float own_max, int k, SelectScratch& scratch) {
  if (k > kRowThreads) return 0;
  const uint64_t cut = find_cut(static_cast<uint64_t>(k), scratch, [&](const auto& f) {
    f(token_key(own_max, static_cast<int>(threadIdx.x)), 1u);
  });
  return static_cast<uint32_t>(cut >> 32);
}

// The tokens that may still be chosen, in no particular order.
struct TokenList {
  float* logits;
  int32_t* ids;
  int* count;  // shared memory

  __device__ __forceinline__ void add(int id, float logit) const {
    const int at = atomicAdd(count, 1);
    logits[at] = logit;
    ids[at] = id;
  }
  template <class F>
  __device__ __forceinline__ void visit(int size, const F& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kRowThreads) f(ids[i], logits[i]);
  }
};

}  // namespace fs::cuda
