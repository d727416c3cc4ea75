// SPDX-License-Identifier: Apache-2.0
// What a launch did, in the numbers that predict speed.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>

#include "warp.h"

namespace ptxsim {

struct MemoryCounts {
  uint64_t requests = 0;       // warp instructions
  uint64_t bytes = 0;          // asked for by active lanes
  uint64_t sectors = 0;        // 32-byte sectors touched, per request
  uint64_t ideal_sectors = 0;  // the least that distinct bytes need
};
struct SharedCounts {
  uint64_t requests = 0, wavefronts = 0, ideal = 0;
};

struct LaunchCounters {
  std::array<uint64_t, static_cast<size_t>(InstClass::Count)> classes{};
  MemoryCounts global_load, global_store, global_async, global_atomic;
  SharedCounts shared_load, shared_store, ldmatrix, shared_async;
  uint64_t divergent_barriers = 0;

  void global(MemoryCounts& counts, const uint64_t* addresses, uint32_t mask, uint32_t bytes);
  // `offsets` in shared memory; rows are the requests of one warp, one per set bit of mask.
  static void shared(SharedCounts& counts, const uint64_t* offsets, uint32_t mask, uint32_t bytes);
};

struct LaunchRecord {
  std::string kernel;
  uint32_t grid[3], block[3];
  uint64_t dynamic_shared = 0;  // bytes
  uint64_t warp_instructions = 0;
  double seconds = 0;
  LaunchCounters counters;
  std::map<std::string, std::pair<uint64_t, uint64_t>> buffers;  // name -> bytes read, written
};

std::string to_json(const LaunchRecord& record);

}  // namespace ptxsim
