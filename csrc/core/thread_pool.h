// SPDX-License-Identifier: Apache-2.0
//
// The one pool of threads that native ops run on.
//
// Chunks are claimed one by one from an atomic word; the calling thread works too and at the end waits only
// for chunks that another thread has already claimed. An op may cut its work by the number of threads
// (cpu/shares.h): its results must not depend on where, which the same-tokens promise rests on. A worker
// without work spins for about 50 us and then parks: waking a parked core costs about as much, so parking
// belongs between steps and not between the ops of one step.
#pragma once

#include <cstdint>

namespace fs {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

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

  // Behind a pointer, so that no header of threads is compiled into kernel files for each instruction set.
  class Workers;
  Workers* workers_;
  int num_threads_;
};

int num_physical_cores();  // that this process may use

// The process-wide pool, made on first use with num_physical_cores() threads.
ThreadPool& pool();
void set_num_threads(int num_threads);  // 1..256; must not be called while an op runs

}  // namespace fs
