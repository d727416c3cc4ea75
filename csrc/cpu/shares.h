// SPDX-License-Identifier: Apache-2.0
//
// Work in shares, one for each worker of the pool: who has the first rows in one op has them in the next, and
// finds them in its caches. Workers that are done help others, so nobody waits for one that lost its core but
// for what it had claimed.
#pragma once

#include <cstdint>

#include "core/thread_pool.h"

namespace fs::FS_ISA {

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part i of `count` parts of [0, total), equal give or take one.
[[gnu::always_inline]] inline Span part(int64_t total, int64_t count, int64_t i) {
  return {total * i / count, total * (i + 1) / count};
}

// Units [0, count), count below 2^32.
class Shares {
 public:
  enum Amount { kOne, kHalf };

  explicit Shares(int64_t count) {
    const int64_t num_threads = pool().num_threads();
    num_shares_ = num_threads < kMaxShares ? num_threads : kMaxShares;
    if (num_shares_ > count) num_shares_ = count;
    for (int64_t i = 0; i < num_shares_; ++i) shares_[i].left = word_of(part(count, num_shares_, i));
  }
  Shares(const Shares&) = delete;
  Shares& operator=(const Shares&) = delete;

  // Calls f(worker) on as many threads of the pool as there are shares, or as come before all is done; each
  // claims until nothing is left.
  template <class F>
  void run(const F& f) const {
    if (num_shares_ == 1) return f(0);
    pool().parallel_for(num_shares_, [&](int64_t, int worker) { f(worker); });
  }

  // Units that nobody has: the next one, or half, of what is left of the worker's own share; then of others',
  // from the end. False: all are taken.
  template <Amount kAmount>
  bool claim(int worker, Span* units) {
    for (int64_t i = 0; i < num_shares_; ++i) {
      uint64_t& word = shares_[(worker + i) % num_shares_].left;
      uint64_t seen = __atomic_load_n(&word, __ATOMIC_RELAXED);
      while (true) {
        const Span left{static_cast<int64_t>(seen >> 32), static_cast<int64_t>(seen & 0xffffffffu)};
        if (left.size() == 0) break;
        const int64_t size = kAmount == kHalf ? (left.size() + 1) / 2 : 1;
        const int64_t cut = i == 0 ? left.begin + size : left.end - size;
        const Span front{left.begin, cut}, back{cut, left.end};
        if (__atomic_compare_exchange_n(&word, &seen, word_of(i == 0 ? back : front), true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
          *units = i == 0 ? front : back;
          return true;
        }
      }
    }
    return false;
  }

 private:
  static constexpr int64_t kMaxShares = 64;
  static uint64_t word_of(Span span) {
    return static_cast<uint64_t>(span.begin) << 32 | static_cast<uint64_t>(span.end);
  }

  struct alignas(64) Share {
    uint64_t left;  // begin and end
  };
  int64_t num_shares_;
  Share shares_[kMaxShares];
};

}  // namespace fs::FS_ISA
