// SPDX-License-Identifier: Apache-2.0
// Data races on shared memory, by vector clocks.
//
// Every warp has a clock that grows with each release any of its lanes performs; an access is stamped
// (thread, clock). Each thread knows, for every other thread, up to which clock that thread's accesses
// happened before its own next one. Knowledge moves at barriers, bar.warp.sync, mbarriers, and
// release/acquire pairs. Two accesses to a byte, one of them a write, race unless the later thread knows the
// stamp of the earlier access.
//
// Knowledge about other warps is one shared vector per synchronisation (all threads leaving __syncthreads
// share it); knowledge inside the own warp is 32 clocks per lane. Asynchronous copies write for an agent: the
// bytes belong to nobody until the issuing thread waits, or until an mbarrier they report to completes.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "warp.h"

namespace ptxsim {

class RaceDetector {
 public:
  RaceDetector(uint32_t num_threads, uint64_t shared_bytes);

  // `lanes` of w touch `bytes` each at the given offsets in shared memory. Atomics race only with ordinary
  // accesses.
  void access(Warp& w, uint32_t lanes, const uint64_t* offsets, uint32_t bytes, Access kind);
  // Lane l of ldmatrix reads the row at offsets[l], on behalf of the lanes that receive it.
  void read_rows(Warp& w, uint32_t rows, const uint64_t* offsets);

  void copy_issued(Warp& w, int lane, uint64_t offset, uint32_t bytes);
  // The thread waited: the bytes are its own ordinary write now.
  void copy_completed(Warp& w, uint32_t thread, uint64_t offset, uint32_t bytes);
  // The bytes belong to whoever waits on the mbarrier at `barrier`.
  void copy_signals(uint32_t warp, uint32_t thread, uint64_t offset, uint32_t bytes, uint64_t barrier);
  void bulk_signals(uint64_t offset, uint32_t bytes, uint64_t barrier);

  void warp_sync(const Warp& w, uint32_t lanes);
  // Threads that wait leave with everything that those who arrived (waiters included) knew.
  void barrier(const std::vector<uint16_t>& arrived, const std::vector<uint16_t>& waiting);
  // Release to, and acquire from, an object in shared memory or any other address.
  void release(uint32_t thread, uint64_t object);
  void acquire(uint32_t thread, uint64_t object);
  // An mbarrier starts anew: what was released to it is forgotten, and whoever uses it must know of this.
  void object_initialised(const Warp& w, int lane, uint64_t object);
  void object_used(Warp& w, int lane, uint64_t object);

  // Knowledge as a plain vector of clocks per thread, for the detector of global races.
  std::vector<uint32_t> knowledge(uint32_t thread) const;
  uint32_t clock(uint32_t warp) const { return clock_[warp]; }
  bool knows(uint32_t thread, uint32_t other, uint32_t clock) const;
  void tick(uint32_t warp) { ++clock_[warp]; }

 private:
  using Clocks = std::shared_ptr<const std::vector<uint32_t>>;
  struct Knowledge {
    Clocks others;                // by thread and agent
    uint32_t mates[kLanes] = {};  // own warp
  };
  struct Readers {  // lanes of one warp that read at one clock
    uint32_t clock, lanes, pc;
    uint16_t warp;
  };
  struct Cell {          // of one byte, or of an aligned word that is never split
    uint32_t clock = 0;  // of the last write; kPending: an asynchronous copy
    uint32_t pc = 0;
    uint16_t writer = kNobody;  // thread or agent
    bool atomic = false;
    uint8_t num_readers = 0;
    Readers readers[2] = {};
    std::vector<Readers> more;
  };
  static constexpr uint16_t kNobody = 0xffff;
  static constexpr uint32_t kPending = 0xffffffff;
  static constexpr uint32_t kNumAgents = 64;

  template <class F>
  void each_cell(uint64_t offset, uint32_t bytes, F f);
  Cell& split(uint64_t word, uint32_t byte);
  bool ordered(uint32_t thread, uint32_t writer, uint32_t clock) const;
  void check_write(Warp& w, int lane, Cell& c, const char* what, uint64_t offset);
  void read(Warp& w, int lane, uint32_t lanes, Cell& c, uint64_t offset, bool atomic);
  void report(Warp& w, int lane, const Cell& c, const char* now, const char* before, uint32_t other,
              uint32_t pc, uint64_t offset);
  uint32_t agent(uint64_t barrier);
  std::vector<uint32_t> flat(uint32_t thread) const;
  void learn(uint32_t thread, const std::vector<uint32_t>& known);

  uint32_t num_threads_;
  std::vector<Knowledge> knowledge_;
  std::vector<uint32_t> clock_;  // by warp
  std::vector<Cell> words_;
  std::vector<int32_t> split_;  // by word: index of its first byte cell in bytes_, or -1
  std::vector<Cell> bytes_;
  std::map<uint64_t, std::vector<uint32_t>> objects_;
  std::map<uint64_t, Cell> initialised_;  // by object: the mbarrier.init that made it
  std::map<uint64_t, uint32_t> agents_;
  std::vector<uint32_t> agent_clock_;
};

}  // namespace ptxsim
