// SPDX-License-Identifier: Apache-2.0
//
// The one pool of threads that native ops run on.
//
// Work is cut into chunks by the op, never by the number of threads, so results cannot depend on it. Chunks
// are claimed one by one from an atomic word; the calling thread works too and at the end waits only for
// chunks that another thread has already claimed. A worker without work spins for about 50 us and then parks:
// waking a parked core costs about as much, so parking belongs between steps and not between the ops of one
// step.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace fs {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls f(chunk, worker) for every chunk in [0, num_chunks), worker in [0, num_threads()): each worker
  // index is in use by one thread at a time. Returns when all have run. f must not throw and must not call
  // parallel_for. Calls from several threads are served one after another.
  template <class F>
  void parallel_for(int64_t num_chunks, const F& f) {
    run(
        num_chunks,
        [](const void* context, int64_t chunk, int worker) {
          (*static_cast<const F*>(context))(chunk, worker);
        },
        &f);
  }

 private:
  using Body = void (*)(const void* context, int64_t chunk, int worker);

  void run(int64_t num_chunks, Body body, const void* context);
  void work(uint64_t word, int worker);
  void worker_main(int worker);

  // High half: epoch, one per job. Low half: the next chunk to claim, or kClosed while the job below is
  // replaced.
  alignas(64) std::atomic<uint64_t> word_{0};
  alignas(64) std::atomic<int64_t> num_left_{0};
  alignas(64) std::atomic<int> num_parked_{0};
  std::atomic<uint32_t> wake_{0};  // changes when parked workers must look again
  std::atomic<bool> stop_{false};

  // The job. Atomics because a late worker may read them while the next job is written; its claim then fails.
  std::atomic<Body> body_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> num_chunks_{0};

  std::mutex callers_;
  std::vector<std::thread> workers_;
};

int num_physical_cores();  // that this process may use

// The process-wide pool, made on first use with num_physical_cores() threads.
ThreadPool& pool();
void set_num_threads(int num_threads);  // 1..256; must not be called while an op runs

}  // namespace fs
