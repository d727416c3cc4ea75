// SPDX-License-Identifier: Apache-2.0
//
// The shortest prefix of tokens in the order (logit descending, id ascending) that reaches a target: a count
// (top-k) or a mass (top-p). A radix selection on the tokens' 64-bit keys, five bits a round, all in
// integers, so that the order in which threads add cannot matter. Rounds end as soon as the prefix ends with
// a whole bin.
#pragma once

#include <cstdint>

#include "cuda/logits_row.cuh"

namespace fs::cuda {

inline constexpr int kDigitBits = 5;
inline constexpr int kBins = 1 << kDigitBits;
static_assert(kBins * kWarp == kRowThreads);  // a warp for each bin, a lane for each of its parts

// Each lane adds to its own part of a bin, so that no two lanes of a warp ever want the same bank.
struct SelectScratch {
  unsigned long long mass[kBins][kWarp];
  uint32_t count[kBins][kWarp];
  uint64_t bin_mass[kBins];
  uint32_t bin_count[kBins];
};

// What the keys of a selection are between; the fewer bits differ, the less there is to do.
struct KeyRange {
  uint64_t low = 0, high = ~uint64_t{0};
};

// The key of the last token of the prefix, or a lower one that no further token reaches; after num_bits of it
// are known, these and zeros. Sum is uint32_t for counts, where every measure is 1, and uint64_t for masses.
// for_each(f) calls f(key, measure) for this thread's share of the tokens; together the measures should sum
// to at least `target`, which is at least 1 (else the answer is what all keys have in common: everything).
// All threads of the block call it and get the answer.
template <class Sum, class ForEach>
__device__ __forceinline__ uint64_t find_cut(Sum target, const KeyRange& range, int num_bits,
                                             SelectScratch& scratch, const ForEach& for_each) {
  constexpr bool kMasses = sizeof(Sum) == 8;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int my_bin = kBins - 1 - lane;  // from the largest key down
  Sum left = target;
  int known_bits = range.low == range.high ? 63 : __clzll(static_cast<long long>(range.low ^ range.high));
  uint64_t cut = known_bits == 0 ? 0 : range.high >> (64 - known_bits) << (64 - known_bits);
  const auto clear_mine = [&] {
    scratch.count[warp][lane] = 0;
    if constexpr (kMasses) scratch.mass[warp][lane] = 0;
  };
  clear_mine();
  __syncthreads();
  while (known_bits < num_bits) {
    const int digit_bits = 64 - known_bits < kDigitBits ? 64 - known_bits : kDigitBits;
    const int shift = 64 - known_bits - digit_bits;
    for_each([&](uint64_t key, uint32_t measure) {
      if (known_bits != 0 && ((key ^ cut) >> (64 - known_bits)) != 0) return;
      const auto bin = static_cast<uint32_t>(key >> shift) & ((1u << digit_bits) - 1);
      atomicAdd(&scratch.count[bin][lane], 1u);
      if constexpr (kMasses) atomicAdd(&scratch.mass[bin][lane], static_cast<unsigned long long>(measure));
    });
    __syncthreads();
    const uint32_t count = __reduce_add_sync(kAllLanes, scratch.count[warp][lane]);
    uint64_t mass = 0;
    if constexpr (kMasses) mass = warp_total(scratch.mass[warp][lane]);
    clear_mine();  // for the next round
    if (lane == 0) {
      scratch.bin_count[warp] = count;
      if constexpr (kMasses) scratch.bin_mass[warp] = mass;
    }
    __syncthreads();
    // Every warp finds the bin for itself.
    const Sum own = kMasses ? static_cast<Sum>(scratch.bin_mass[my_bin]) : scratch.bin_count[my_bin];
    const Sum reached = warp_inclusive_sum(own), before = reached - own;
    const uint32_t holds = __ballot_sync(kAllLanes, reached >= left && before < left);  // one lane, or none
    if (holds == 0) return cut;
    const int found = __ffs(static_cast<int>(holds)) - 1;
    const bool whole = __shfl_sync(kAllLanes, reached == left || scratch.bin_count[my_bin] == 1, found);
    left -= __shfl_sync(kAllLanes, before, found);
    cut |= static_cast<uint64_t>(kBins - 1 - found) << shift;
    known_bits += digit_bits;
    if (whole) return cut;
  }
  return cut;
}

// A lower bound of the k-th largest order_key of the row: each of the k largest maxima of the threads is a
// logit. Of the bits that it could have, as many as tell logits a thousandth apart.
__device__ __forceinline__ uint32_t bound_of_top_k(float own_max, int k, SelectScratch& scratch) {
  constexpr int kBoundBits = 20;
  if (k > kRowThreads) return 0;
  const uint64_t cut =
      find_cut(static_cast<uint32_t>(k), KeyRange{}, kBoundBits, scratch,
               [&](const auto& f) { f(token_key(own_max, static_cast<int>(threadIdx.x)), 1u); });
  return static_cast<uint32_t>(cut >> 32);
}

struct TokenListScratch {
  // Of each warp, in two halves: one may be full and on its way to memory while the other is filled.
  float logits[kMaxWarps][2 * kWarp];
  int32_t ids[kMaxWarps][2 * kWarp];
  int num_stored, num_tokens;
  uint32_t lowest;  // order_key of all
};

// The tokens that may still be chosen, in no particular order. Each warp gathers its own in shared memory and
// stores 32 of them at a time, whole lines, once it has more; its last 1 to 32 stay where they are. So a
// short list never leaves the multiprocessor.
class TokenList {
 public:
  // `memory` is of the block, aligned to 16 bytes, with room for 28 + 2 V floats if V is 33 or more (2 V if V
  // is more than 1,024 and all are listed: 256 and more then stay in shared memory). Between this and the
  // first `add` there is a barrier.
  __device__ __forceinline__ TokenList(float* memory, int vocab, TokenListScratch& scratch)
      : scratch_(scratch) {
    constexpr uintptr_t kLine = kWarp * sizeof(float);
    logits_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + kLine - 1) / kLine * kLine);
    ids_ = reinterpret_cast<int32_t*>(logits_ + vocab / kWarp * kWarp);
    if (threadIdx.x == 0) {
      scratch.num_stored = scratch.num_tokens = 0;
      scratch.lowest = lowest_;
    }
  }

  // Those of the tokens 4 index to 4 index + 3 for which wanted(i, logit) holds. All lanes of a warp call it.
  template <class Wanted>
  __device__ __forceinline__ void add(int index, const Quad& quad, const Wanted& wanted) {
    bool is_wanted[4], any = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      is_wanted[i] = wanted(i, quad.x[i]);
      any = any || is_wanted[i];
    }
    if (!__any_sync(kAllLanes, any)) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) add_one(is_wanted[i], 4 * index + i, quad.x[i]);
  }

  // Ends the list: a barrier, after which all threads may call the others.
  __device__ __forceinline__ void finish() {
    const uint32_t lowest = __reduce_min_sync(kAllLanes, lowest_);
    if (lane() == 0 && num_added_ > 0) {
      atomicAdd(&scratch_.num_tokens, num_added_);
      atomicMin(&scratch_.lowest, lowest);
    }
    __syncthreads();
  }
  __device__ __forceinline__ int size() const { return scratch_.num_tokens; }
  // Of the keys of all tokens; `best` is the largest one of the row.
  __device__ __forceinline__ KeyRange range(uint64_t best) const {
    return {static_cast<uint64_t>(scratch_.lowest) << 32, best};
  }
  // f(id, logit) for this thread's share of the tokens.
  template <class F>
  __device__ __forceinline__ void visit(const F& f) const {
    const int num_stored = scratch_.num_stored;
    for (int i = static_cast<int>(threadIdx.x); i < num_stored; i += kRowThreads) f(ids_[i], logits_[i]);
    if (num_sent_ + lane() < num_added_) f(staged_ids()[place(lane())], staged_logits()[place(lane())]);
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ __forceinline__ float* staged_logits() const { return scratch_.logits[threadIdx.x / kWarp]; }
  __device__ __forceinline__ int32_t* staged_ids() const { return scratch_.ids[threadIdx.x / kWarp]; }
  __device__ __forceinline__ int place(int i) const { return (num_sent_ + i) % (2 * kWarp); }

  __device__ __forceinline__ void add_one(bool wanted, int id, float logit) {
    const uint32_t mask = __ballot_sync(kAllLanes, wanted);
    const int at = place(num_added_ - num_sent_ + __popc(mask & ((1u << lane()) - 1)));
    if (wanted) {
      lowest_ = min(lowest_, order_key(logit));
      staged_logits()[at] = logit;
      staged_ids()[at] = id;
    }
    num_added_ += __popc(mask);
    if (num_added_ - num_sent_ <= kWarp) return;
    __syncwarp();
    int to = 0;
    if (lane() == 0) to = atomicAdd(&scratch_.num_stored, kWarp);
    to = __shfl_sync(kAllLanes, to, 0) + lane();
    logits_[to] = staged_logits()[place(lane())];
    ids_[to] = staged_ids()[place(lane())];
    __syncwarp();  // the half is free again
    num_sent_ += kWarp;
  }

  TokenListScratch& scratch_;
  float* logits_;
  int32_t* ids_;
  int num_added_ = 0, num_sent_ = 0;  // of the warp's tokens
  uint32_t lowest_ = ~0u;             // of the lane's
};

}  // namespace fs::cuda
