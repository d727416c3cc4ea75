// SPDX-License-Identifier: Apache-2.0
// mbarrier objects: one 64-bit word in shared memory.
#pragma once

#include <cstdint>

namespace ptxsim {

struct Block;
struct Warp;

// pending arrivals in bits 0-19, arrivals per phase in 20-39, outstanding bytes (signed) in 40-62, phase
// in 63.
struct MbarrierState {
  uint64_t word;
  explicit MbarrierState(uint64_t w = 0) : word(w) {}
  static MbarrierState init(uint32_t count);
  uint32_t pending() const { return static_cast<uint32_t>(word & 0xfffff); }
  uint32_t count() const { return static_cast<uint32_t>(word >> 20 & 0xfffff); }
  int64_t bytes() const { return static_cast<int64_t>(word << 1) >> 41; }
  uint32_t phase() const { return static_cast<uint32_t>(word >> 63); }
  void add_bytes(int64_t n);
  void drop(uint32_t n);
  bool arrive(uint32_t n);  // false: more arrivals than were pending
  void expect_more(uint32_t n);

 private:
  void complete_if_done();
  void set(uint32_t pending, uint32_t count, int64_t bytes, uint32_t phase);
};

// A fault if nobody initialised the mbarrier, a race if that is not ordered before this use.
void check_mbarrier_use(Warp& w, int lane, uint32_t offset);
// Bytes of an asynchronous copy have arrived; one asynchronous arrival.
void mbarrier_complete_bytes(Block& block, uint32_t offset, uint32_t bytes);
void mbarrier_arrive_async(Block& block, uint32_t offset);

}  // namespace ptxsim
