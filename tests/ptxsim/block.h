// SPDX-License-Identifier: Apache-2.0
// A thread block while it runs, and the launch it belongs to.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "async_copy.h"
#include "config.h"
#include "counters.h"
#include "memory.h"
#include "program.h"
#include "weak_memory.h"

namespace ptxsim {

class RaceDetector;
class GlobalRaceDetector;

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return static_cast<uint64_t>(x) * y * z; }
};

enum class FaultKind : uint8_t {
  IllegalAddress,
  Misaligned,
  Assert,
  Trap,
  Uninitialised,
  Race,
  Deadlock,
  Unsupported,
  Other
};

// Thrown by fault(): ends the launch.
struct KernelFault : std::runtime_error {
  using std::runtime_error::runtime_error;
  FaultKind kind = FaultKind::Other;
};

struct NamedBarrier {
  uint32_t arrived = 0;                 // threads
  uint32_t expected = 0;                // 0: all live threads of the block
  uint32_t popc = 0, all = 1, any = 0;  // of bar.red
  std::vector<uint16_t> threads;        // who has arrived, for the race detector
};

struct Block {
  uint32_t index = 0;  // linear
  Dim3 id;
  std::vector<Warp> warps;
  std::vector<uint8_t> registers, shared_storage, local;
  std::vector<uint32_t> predicates;
  uint8_t* shared = nullptr;
  uint64_t shared_bytes = 0;
  std::vector<uint64_t> shared_written;  // one bit per byte: somebody wrote it
  NamedBarrier barriers[16];
  uint32_t barrier_phase = 0;  // grows with every completed barrier
  uint32_t live_threads = 0;
  uint32_t sm = 0;
  AsyncCopies async;
  WeakStores weak;
  std::unique_ptr<RaceDetector> race;
  Launch* launch = nullptr;
  bool finished() const { return live_threads == 0; }
};

struct Launch {
  const Program* program = nullptr;
  Dim3 grid, block;
  uint64_t dynamic_shared = 0, shared_bytes = 0;
  std::vector<uint8_t> params;
  std::vector<uint8_t> constants;
  std::vector<AllocationCache> cache;  // by pc
  bool cooperative = false;
  std::vector<uint8_t> grid_workspace;
  Random random{0};
  LaunchCounters counters;
  uint64_t executed = 0;        // warp instructions
  uint64_t memory_changes = 0;  // stores and atomics that changed something: progress for the deadlock check
  uint64_t race_reports = 0;
  std::unique_ptr<GlobalRaceDetector> global_race;
  std::vector<std::string> reports;  // races, collected while the launch goes on
};

// Thread index of a lane as (x, y, z).
Dim3 thread_of(const Warp& w, int lane);
// "kernel k, block (1,0,0), thread (3,0,0)" and the line of the current instruction.
std::string place(const Warp& w, int lane);
[[noreturn]] void fault(Warp& w, int lane, FaultKind kind, const std::string& what);
// A race: reported, and the launch goes on.
void report_race(Warp& w, int lane, const std::string& what);

// Warp index of `lane`'s thread within the block.
inline uint32_t thread_index(const Warp& w, int lane) {
  return w.index * kLanes + static_cast<uint32_t>(lane);
}

// Runs all blocks. Throws KernelFault; races are in launch.reports.
void run_grid(Launch& launch);

// How many blocks of a launch the simulated device holds at once.
uint64_t resident_blocks(const Dim3& block, uint64_t shared_bytes);
uint64_t resident_blocks_per_multiprocessor(uint64_t threads, uint64_t shared_bytes);

}  // namespace ptxsim
