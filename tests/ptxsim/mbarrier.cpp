// SPDX-License-Identifier: Apache-2.0
#include "mbarrier.h"

#include <cstring>

#include "block.h"
#include "polling.h"
#include "race_detector.h"
#include "warp_operations.h"

namespace ptxsim {

void MbarrierState::set(uint32_t pending, uint32_t count, int64_t bytes, uint32_t phase) {
  word = static_cast<uint64_t>(pending & 0xfffff) | static_cast<uint64_t>(count & 0xfffff) << 20 |
         (static_cast<uint64_t>(bytes) & 0x7fffff) << 40 | static_cast<uint64_t>(phase & 1) << 63;
}
MbarrierState MbarrierState::init(uint32_t count) {
  MbarrierState s;
  s.set(count, count, 0, 0);
  return s;
}
void MbarrierState::complete_if_done() {
  if (pending() == 0 && bytes() == 0) set(count(), count(), 0, phase() ^ 1);
}
void MbarrierState::add_bytes(int64_t n) {
  set(pending(), count(), bytes() + n, phase());
  if (n < 0) complete_if_done();
}
bool MbarrierState::arrive(uint32_t n) {
  if (n > pending()) return false;
  set(pending() - n, count(), bytes(), phase());
  complete_if_done();
  return true;
}
void MbarrierState::drop(uint32_t n) {
  set(pending(), count() - n, bytes(), phase());
}
void MbarrierState::expect_more(uint32_t n) {
  set(pending() + n, count(), bytes(), phase());
}

namespace {

MbarrierState load(const Block& block, uint32_t offset) {
  uint64_t word;
  std::memcpy(&word, block.shared + offset, 8);
  return MbarrierState(word);
}
void save(Block& block, uint32_t offset, const MbarrierState& s) {
  std::memcpy(block.shared + offset, &s.word, 8);
}

// The object an instruction names, for one lane.
uint32_t object(Warp& w, const Inst& i, int lane) {
  uint64_t a[kLanes];
  const uint32_t saved = w.mask;
  for (int l = 0; l < kLanes; ++l) {
    if (i.aux & kNoBase)
      a[l] = static_cast<uint64_t>(i.imm);
    else if (i.aux & kAddress32)
      a[l] = reg<uint32_t>(w, i.r[kAddress])[l] + static_cast<uint32_t>(i.imm);
    else
      a[l] = reg<uint64_t>(w, i.r[kAddress])[l] + static_cast<uint64_t>(i.imm);
  }
  w.mask = 1u << lane;
  slow_addresses(w, i, a, 8, Access::Atomic);
  w.mask = saved;
  const uint64_t offset = a[lane] - reinterpret_cast<uint64_t>(w.shared);
  if (offset >= w.shared_bytes) fault(w, lane, FaultKind::Other, "uses an mbarrier outside shared memory");
  return static_cast<uint32_t>(offset);
}
}  // namespace

void check_mbarrier_use(Warp& w, int lane, uint32_t offset) {
  const Block& block = *w.block;
  if (w.watch & kWatchSharedRace) block.race->object_used(w, lane, offset);
  if ((w.watch & kWatchUninit) && (block.shared_written[offset / 64] >> (offset % 64) & 0xff) != 0xff)
    fault(w, lane, FaultKind::Uninitialised, "uses an mbarrier that was never initialised");
}

namespace {

template <class F>
void each_lane(Warp& w, const Inst& i, bool initialised, F f) {
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const uint32_t offset = object(w, i, l);
    if (initialised) check_mbarrier_use(w, l, offset);
    f(l, offset);
  }
}

void init(Warp& w, const Inst& i) {
  each_lane(w, i, false, [&](int l, uint32_t offset) {
    const uint32_t count = reg<uint32_t>(w, i.r[1])[l];
    if (count == 0 || count >= (1u << 20))
      fault(w, l, FaultKind::Other, "initialises an mbarrier with a count of " + std::to_string(count));
    Block& block = *w.block;
    if (w.watch & (kWatchUninit | kWatchSharedRace)) {
      uint64_t a[kLanes];
      for (uint64_t& x : a) x = reinterpret_cast<uint64_t>(w.shared) + offset;
      const uint32_t saved = w.mask;
      w.mask = 1u << l;
      observe(w, i, a, 8, Access::Write);
      w.mask = saved;
    }
    if (block.race) block.race->object_initialised(w, l, offset);
    save(block, offset, MbarrierState::init(count));
  });
}
void inval(Warp& w, const Inst& i) {
  each_lane(w, i, true, [&](int, uint32_t offset) {
    w.block->shared_written.empty()
        ? void()
        : void(w.block->shared_written[offset / 64] &= ~(0xffull << (offset % 64)));
  });
}
void expect_tx(Warp& w, const Inst& i) {
  each_lane(w, i, true, [&](int l, uint32_t offset) {
    MbarrierState s = load(*w.block, offset);
    s.add_bytes(reg<uint32_t>(w, i.r[1])[l]);
    save(*w.block, offset, s);
  });
}
void complete_tx(Warp& w, const Inst& i) {
  each_lane(w, i, true, [&](int l, uint32_t offset) {
    mbarrier_complete_bytes(*w.block, offset, reg<uint32_t>(w, i.r[1])[l]);
  });
}
template <bool kDrop>
void arrive(Warp& w, const Inst& i) {  // n: 1 a count or byte operand is present, 4 it is arrive.expect_tx
  uint64_t state[kLanes] = {};
  each_lane(w, i, true, [&](int l, uint32_t offset) {
    MbarrierState s = load(*w.block, offset);
    state[l] = s.word;
    const uint32_t value = reg<uint32_t>(w, i.r[1])[l];
    uint32_t count = 1;
    if (i.n & 4)
      s.add_bytes(value);
    else if (i.n & 1)
      count = value;
    if (w.block->race) w.block->race->release(thread_index(w, l), offset);
    if (kDrop) s.drop(count);
    if (!s.arrive(count))
      fault(w, l, FaultKind::Other, "arrives at an mbarrier more often than its phase expects");
    save(*w.block, offset, s);
  });
  ++w.launch->memory_changes;
  for (uint32_t m = w.mask; m != 0; m &= m - 1)
    reg<uint64_t>(w, i.r[0])[__builtin_ctz(m)] = state[__builtin_ctz(m)];
}
void test_wait(Warp& w, const Inst& i) {  // n: 2 the operand is a parity, else the state an arrive returned
  uint32_t done = 0;
  each_lane(w, i, true, [&](int l, uint32_t offset) {
    const MbarrierState s = load(*w.block, offset);
    const uint32_t phase =
        i.n & 2 ? reg<uint32_t>(w, i.r[1])[l] & 1 : MbarrierState(reg<uint64_t>(w, i.r[1])[l]).phase();
    if (s.phase() == phase) return;
    done |= 1u << l;
    if (w.block->race) w.block->race->acquire(thread_index(w, l), offset);
  });
  w.pred[i.r[2]] = (w.pred[i.r[2]] & ~w.mask) | done;
  if (done != w.mask) poll(w);
}

const HandlerEntry kEntries[] = {{"mbarrier.init", init},
                                 {"mbarrier.inval", inval},
                                 {"mbarrier.expect_tx", expect_tx},
                                 {"mbarrier.complete_tx", complete_tx},
                                 {"mbarrier.arrive", arrive<false>},
                                 {"mbarrier.arrive_drop", arrive<true>},
                                 {"mbarrier.test_wait", test_wait},
                                 {"mbarrier.try_wait", test_wait}};

}  // namespace

const HandlerTable mbarrier_operations = {kEntries, std::size(kEntries)};

void mbarrier_complete_bytes(Block& block, uint32_t offset, uint32_t bytes) {
  MbarrierState s = load(block, offset);
  s.add_bytes(-static_cast<int64_t>(bytes));
  save(block, offset, s);
  ++block.launch->memory_changes;
}
void mbarrier_arrive_async(Block& block, uint32_t offset) {
  MbarrierState s = load(block, offset);
  s.arrive(1);
  save(block, offset, s);
  ++block.launch->memory_changes;
}

}  // namespace ptxsim
