// SPDX-License-Identifier: Apache-2.0
#include "core/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/error.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace fs {

namespace {

constexpr uint32_t kClosed = 0xffffffffu;
constexpr auto kSpin = std::chrono::microseconds(50);

constexpr uint64_t make_word(uint32_t epoch, uint32_t next) {
  return (uint64_t{epoch} << 32) | next;
}
constexpr uint32_t epoch_of(uint64_t word) {
  return static_cast<uint32_t>(word >> 32);
}
constexpr uint32_t next_of(uint64_t word) {
  return static_cast<uint32_t>(word);
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void check_num_threads(int num_threads) {
  FS_CHECK(num_threads >= 1 && num_threads <= 256, "num_threads is " << num_threads << "; allowed: 1 to 256");
}

// Spins until done() or about 50 us passed; returns done().
template <class Done>
bool spin_until(const Done& done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return done();
}

}  // namespace

class ThreadPool::Workers {
 public:
  explicit Workers(int num_threads) {
    for (int worker = 1; worker < num_threads; ++worker) {
      threads_.emplace_back([this, worker] { worker_main(worker); });
    }
  }
  ~Workers() {
    stop_.store(true);
    wake_.fetch_add(1);
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  void run(int64_t num_chunks, Body body, const void* context);

 private:
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
  std::vector<std::thread> threads_;
};

void ThreadPool::Workers::run(int64_t num_chunks, Body body, const void* context) {
  FS_CHECK(num_chunks < int64_t{kClosed}, "parallel_for: too many chunks: " << num_chunks);
  if (num_chunks <= 0) return;
  const std::scoped_lock one_caller(callers_);
  if (threads_.empty() || num_chunks == 1) {
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) body(context, chunk, 0);
    return;
  }

  // Close first: a late worker that still holds the old word must fail its claim from here on.
  const uint32_t epoch = epoch_of(word_.load(std::memory_order_relaxed)) + 1;
  word_.exchange(make_word(epoch, kClosed), std::memory_order_acq_rel);
  body_.store(body, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  num_chunks_.store(num_chunks, std::memory_order_relaxed);
  num_left_.store(num_chunks, std::memory_order_relaxed);
  word_.store(make_word(epoch, 0));
  if (num_parked_.load() > 0) {
    wake_.fetch_add(1);
    wake_.notify_all();
  }

  work(make_word(epoch, 0), 0);
  const auto all_done = [this] { return num_left_.load(std::memory_order_acquire) == 0; };
  while (!spin_until(all_done)) std::this_thread::yield();  // somebody holds a chunk and has lost its core
}

void ThreadPool::Workers::work(uint64_t word, int worker) {
  const uint32_t epoch = epoch_of(word);
  while (true) {
    const Body body = body_.load(std::memory_order_relaxed);
    const void* context = context_.load(std::memory_order_relaxed);
    const int64_t num_chunks = num_chunks_.load(std::memory_order_relaxed);
    if (epoch_of(word) != epoch || next_of(word) == kClosed || next_of(word) >= num_chunks) return;
    // Succeeds only if the word is unchanged since it was read, so the job read above belongs to this epoch.
    if (!word_.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel, std::memory_order_acquire))
      continue;
    body(context, next_of(word), worker);
    num_left_.fetch_sub(1, std::memory_order_acq_rel);
    word = word_.load(std::memory_order_acquire);
  }
}

void ThreadPool::Workers::worker_main(int worker) {
  uint64_t seen = 0;  // the last word at which nothing was left to claim
  const auto has_news = [&] {
    const uint64_t word = word_.load(std::memory_order_acquire);
    return epoch_of(word) != epoch_of(seen) && next_of(word) != kClosed;
  };
  while (!stop_.load()) {
    if (!spin_until([&] { return has_news() || stop_.load(std::memory_order_relaxed); })) {
      const uint32_t ticket = wake_.load();
      num_parked_.fetch_add(1);
      // run() publishes the word before it looks at num_parked_: one of the two sees the other.
      if (epoch_of(word_.load()) == epoch_of(seen) && !stop_.load()) wake_.wait(ticket);
      num_parked_.fetch_sub(1);
      continue;
    }
    const uint64_t word = word_.load(std::memory_order_acquire);
    if (next_of(word) == kClosed) continue;
    work(word, worker);
    seen = word;
  }
}

ThreadPool::ThreadPool(int num_threads) : workers_(nullptr), num_threads_(num_threads) {
  check_num_threads(num_threads);
  workers_ = std::make_unique<Workers>(num_threads).release();
}

ThreadPool::~ThreadPool() {
  const std::unique_ptr<Workers> owned(workers_);
}

void ThreadPool::run(int64_t num_chunks, Body body, const void* context) {
  workers_->run(num_chunks, body, context);
}

int num_physical_cores() {
  int num_cpus = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
    num_cpus = CPU_COUNT(&allowed);
    std::set<std::pair<int, int>> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
      int package = -1;
      int core = -1;
      if (!(std::ifstream(topology + "physical_package_id") >> package) ||
          !(std::ifstream(topology + "core_id") >> core)) {
        return num_cpus;
      }
      cores.emplace(package, core);
    }
    return std::max(1, static_cast<int>(cores.size()));
  }
#endif
  return num_cpus;
}

namespace {

std::unique_ptr<ThreadPool>& pool_slot() {
  static std::unique_ptr<ThreadPool> slot;
  return slot;
}

std::mutex& pool_mutex() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace

ThreadPool& pool() {
  const std::scoped_lock lock(pool_mutex());
  auto& slot = pool_slot();
  if (!slot) slot = std::make_unique<ThreadPool>(std::min(256, num_physical_cores()));
  return *slot;
}

void set_num_threads(int num_threads) {
  check_num_threads(num_threads);  // before the old pool is given up
  const std::scoped_lock lock(pool_mutex());
  auto& slot = pool_slot();
  if (slot && slot->num_threads() == num_threads) return;
  slot.reset();
  slot = std::make_unique<ThreadPool>(num_threads);
}

}  // namespace fs
