// SPDX-License-Identifier: Apache-2.0
// Data races on global memory within one launch.
//
// Inside a block there is the ordering of RaceDetector, and there as between blocks that of release/acquire
// on the same address (st.release, atomics and fences around relaxed accesses): each release leaves a
// snapshot of what the releasing thread knew.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "warp.h"

namespace ptxsim {

class GlobalRaceDetector {
 public:
  void access(Warp& w, uint32_t lanes, const uint64_t* addresses, uint32_t bytes, Access kind);
  // A release to, or acquire from, a global address.
  void release(Warp& w, int lane, uint64_t object);
  void acquire(Warp& w, int lane, uint64_t object);
  void fence(Warp& w, uint32_t lanes);
  // A relaxed or volatile access: a write releases what the last fence covered, a read is acquired by the
  // next fence.
  void relaxed(Warp& w, int lane, uint64_t object, Access kind);
  // Barriers inside a block pass on what the block learnt of other blocks.
  void block_barrier(const Block& block, const std::vector<uint16_t>& arrived,
                     const std::vector<uint16_t>& waiting);
  void warp_sync(const Warp& w, uint32_t lanes);

 private:
  using Clocks = std::shared_ptr<const std::vector<uint32_t>>;
  using Known = std::map<uint32_t, Clocks>;  // block -> clocks of its threads
  using Thread = uint64_t;                   // block << 16 | thread
  static Thread id(uint32_t block, uint32_t thread) { return static_cast<uint64_t>(block) << 16 | thread; }
  struct Stamp {
    uint32_t block = 0, clock = 0, pc = 0;
    uint16_t thread = 0xffff;
  };
  struct Cell {
    Stamp write;
    bool atomic = false;
    std::vector<Stamp> reads;
  };
  bool ordered(const Warp& w, int lane, const Stamp& before) const;
  static void join(Known& into, const Known& from);
  void report(Warp& w, int lane, uint64_t address, const char* now, const char* before, const Stamp& other);
  Known snapshot(Warp& w, int lane);
  void check(Warp& w, int lane, uint64_t address, Cell& c, bool writes, bool strong);
  Cell& byte_cell(uint64_t address);

  std::unordered_map<uint64_t, Cell> words_,
      bytes_;  // by address / 4, and by address for words that narrower accesses split
  std::unordered_set<uint64_t> split_;
  std::unordered_map<Thread, std::shared_ptr<const Known>> known_;
  std::unordered_map<uint64_t, Known> objects_;
  std::unordered_map<Thread, Known> fenced_;  // snapshot at the last fence, for relaxed stores after it
  std::unordered_map<Thread, std::vector<uint64_t>>
      read_objects_;  // relaxed reads, to be acquired by a fence
};

}  // namespace ptxsim
