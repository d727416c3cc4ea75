// SPDX-License-Identifier: Apache-2.0
//
// The thread pool: every chunk once, worker indices exclusive, callers served one after another. The same
// program runs under ThreadSanitizer, so bodies also touch plain shared memory.
#include "core/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <numeric>
#include <thread>
#include <vector>

#include "core/error.h"

namespace fs {
namespace {

class ThreadPoolSizes : public testing::TestWithParam<int> {};

INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolSizes, testing::Values(1, 2, 3, 8));

TEST_P(ThreadPoolSizes, RunsEveryChunkExactlyOnce) {
  ThreadPool pool(GetParam());
  EXPECT_EQ(pool.num_threads(), GetParam());
  for (const int64_t num_chunks : {0, 1, 2, 3, 7, 64, 1000}) {
    std::vector<int> runs(static_cast<size_t>(num_chunks),
                          0);  // not atomic: one thread per chunk, then a join
    pool.parallel_for(num_chunks, [&](int64_t chunk, int) { ++runs[static_cast<size_t>(chunk)]; });
    EXPECT_EQ(runs, std::vector<int>(static_cast<size_t>(num_chunks), 1));
  }
}

TEST_P(ThreadPoolSizes, AWorkerIndexIsUsedByOneThreadAtATime) {
  ThreadPool pool(GetParam());
  std::vector<std::atomic<int>> users(static_cast<size_t>(GetParam()));
  std::vector<int64_t> sums(static_cast<size_t>(GetParam()), 0);  // plain, as per-worker scratch is
  std::atomic<int> violations{0};
  constexpr int64_t kChunks = 2000;
  pool.parallel_for(kChunks, [&](int64_t chunk, int worker) {
    if (worker < 0 || worker >= GetParam()) {
      ++violations;
      return;
    }
    if (users[static_cast<size_t>(worker)].fetch_add(1) != 0) ++violations;
    sums[static_cast<size_t>(worker)] += chunk;
    users[static_cast<size_t>(worker)].fetch_sub(1);
  });
  EXPECT_EQ(violations, 0);
  EXPECT_EQ(std::accumulate(sums.begin(), sums.end(), int64_t{0}), kChunks * (kChunks - 1) / 2);
}

// Each job's body and data are gone when the next begins, so a worker that is late must not run the old one.
TEST_P(ThreadPoolSizes, ManyShortJobs) {
  ThreadPool pool(GetParam());
  for (int job = 0; job < 3000; ++job) {
    const int64_t num_chunks = 1 + job % 5;
    std::vector<int> result(static_cast<size_t>(num_chunks), -1);
    pool.parallel_for(num_chunks, [&](int64_t chunk, int) { result[static_cast<size_t>(chunk)] = job; });
    ASSERT_EQ(result, std::vector<int>(static_cast<size_t>(num_chunks), job));
  }
}

// After a chunk that outlasts the spinning, workers have parked and must be woken by the next job.
TEST(ThreadPool, WakesParkedWorkers) {
  ThreadPool pool(2);
  for (int job = 0; job < 20; ++job) {
    // About ten times as long as a worker spins.
    std::atomic<int> busy{0};
    while (busy.fetch_add(1) < 100'000) {
    }
    // Each chunk waits for the other, so this returns only if two threads take part.
    std::atomic<int> arrived{0};
    pool.parallel_for(2, [&](int64_t, int) {
      ++arrived;
      while (arrived.load() < 2) std::this_thread::yield();
    });
    EXPECT_EQ(arrived, 2);
  }
}

TEST_P(ThreadPoolSizes, CallersAreServedOneAfterAnother) {
  ThreadPool pool(GetParam());
  constexpr size_t kCallers = 4;
  constexpr int kJobs = 200;
  constexpr int64_t kChunks = 5;
  std::vector<std::atomic<int>> active(kCallers);  // chunks of each caller that run now
  std::atomic<int> violations{0};
  std::vector<int64_t> counts(kCallers, 0);
  std::vector<std::thread> callers;
  for (size_t caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      for (int job = 0; job < kJobs; ++job) {
        std::vector<int> runs(kChunks, 0);
        pool.parallel_for(kChunks, [&](int64_t chunk, int) {
          ++active[caller];
          for (size_t other = 0; other < kCallers; ++other) {
            if (other != caller && active[other].load() != 0) ++violations;
          }
          ++runs[static_cast<size_t>(chunk)];
          --active[caller];
        });
        counts[caller] += std::accumulate(runs.begin(), runs.end(), int64_t{0});
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(violations, 0);
  EXPECT_EQ(counts, std::vector<int64_t>(kCallers, kJobs * kChunks));
}

TEST(ThreadPool, IsMadeAndStoppedAtAnyMoment) {
  for (int round = 0; round < 50; ++round) {
    ThreadPool pool(1 + round % 4);
    std::atomic<int> runs{0};
    for (int job = 0; job < round % 3; ++job) pool.parallel_for(4, [&](int64_t, int) { ++runs; });
    EXPECT_EQ(runs, 4 * (round % 3));
  }
}

TEST(ThreadPool, TheProcessPoolIsResized) {
  const int before = pool().num_threads();
  for (const int num_threads : {1, 3, 3, 2}) {
    set_num_threads(num_threads);
    EXPECT_EQ(pool().num_threads(), num_threads);
    std::atomic<int64_t> sum{0};
    pool().parallel_for(10, [&](int64_t chunk, int) { sum += chunk; });
    EXPECT_EQ(sum, 45);
  }
  set_num_threads(before);
}

TEST(ThreadPool, RefusesImpossibleSizes) {
  for (const int num_threads : {-1, 0, 257}) EXPECT_THROW(ThreadPool{num_threads}, Error);
  const int before = pool().num_threads();
  set_num_threads(5);
  EXPECT_THROW(set_num_threads(0), Error);
  EXPECT_EQ(pool().num_threads(), 5);  // the old pool stays in use
  set_num_threads(before);
  ThreadPool two(2);
  EXPECT_THROW(two.parallel_for(int64_t{1} << 32, [](int64_t, int) {}), Error);
}

TEST(ThreadPool, CountsAtLeastOneCore) {
  EXPECT_GE(num_physical_cores(), 1);
}

}  // namespace
}  // namespace fs
