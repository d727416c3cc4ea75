// SPDX-License-Identifier: Apache-2.0
// cp.async and bulk copies between their issue and the moment the program may rely on them.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "warp.h"

namespace ptxsim {

// One warp-wide cp.async whose bytes have not been declared complete yet.
struct PendingCopy {
  uint32_t warp = 0, lanes = 0, pc = 0;
  uint64_t sequence = 0;  // copies of a block, in the order of issue
  uint8_t size = 0;
  bool landed = false;                // early mode: the bytes are already there
  uint32_t group[kLanes] = {};        // commit group, per lane
  uint64_t source[kLanes] = {};       // host pointers
  uint32_t destination[kLanes] = {};  // offsets in shared memory
  uint8_t source_size[kLanes] = {};
};

struct PendingBulk {  // cp.async.bulk, issued by one thread
  uint32_t thread = 0, pc = 0;
  uint64_t source = 0, destination = 0;  // host pointers
  uint32_t bytes = 0;
  bool to_shared = false, landed = false;
  uint32_t barrier = 0;  // offset of the mbarrier (to_shared)
  uint32_t group = 0;    // bulk commit group (to global)
};

struct AsyncCopies {
  std::vector<std::deque<PendingCopy>> by_warp;
  std::vector<uint32_t> group;       // by thread: number of the open cp.async group
  std::vector<uint32_t> bulk_group;  // by thread: number of the open bulk group
  std::deque<PendingBulk> bulk;
  struct BarrierWait {  // a cp.async.mbarrier.arrive that has not been triggered yet
    uint32_t offset, thread;
    uint64_t sequence;  // it stands for the copies issued before it
  };
  std::vector<BarrierWait> barrier_waits;
  uint64_t next_sequence = 0;

  void reset(size_t warps) {
    by_warp.assign(warps, {});
    group.assign(warps * kLanes, 0);
    bulk_group.assign(warps * kLanes, 0);
    bulk.clear();
    barrier_waits.clear();
  }
};

// Lets one pending bulk copy into shared memory complete, at random among them when `random`. False if there
// is none.
bool advance_bulk(Block& block);

}  // namespace ptxsim
