// SPDX-License-Identifier: Apache-2.0
// When the bytes of an asynchronous copy land: at the wait (late, the destination holding poison until then),
// at the instruction (early), or one or the other at random.
#include "async_copy.h"

#include <cstring>

#include "block.h"
#include "mbarrier.h"
#include "race_detector.h"
#include "warp_operations.h"

namespace ptxsim {
namespace {

bool lands_now(Launch& launch) {
  const int mode = config().async_mode;
  return mode == PTXSIM_ASYNC_EARLY || (mode == PTXSIM_ASYNC_RANDOM && (launch.random.next() & 1));
}

void write_lane(Block& block, const PendingCopy& c, int l) {
  if (c.source_size[l] == 16 &&
      !config().weak_memory) {  // nearly all of them: a copy of fixed size is one move
    std::memcpy(block.shared + c.destination[l], reinterpret_cast<const void*>(c.source[l]), 16);
    return;
  }
  uint8_t bytes[16] = {};
  if (c.source_size[l] != 0) {
    if (config().weak_memory)
      block.weak.read(c.source[l], c.source_size[l], bytes);
    else
      std::memcpy(bytes, reinterpret_cast<const void*>(c.source[l]), c.source_size[l]);
  }
  std::memcpy(block.shared + c.destination[l], bytes, c.size);
}

void cp_async(Warp& w, const Inst& i) {
  Block& block = *w.block;
  PendingCopy c;
  c.warp = w.index;
  c.lanes = w.mask;
  c.pc = w.pc;
  c.sequence = block.async.next_sequence++;
  c.size = static_cast<uint8_t>(i.target);
  // destination
  uint64_t to[kLanes], from[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if (i.aux & kNoBase)
      to[l] = static_cast<uint64_t>(i.imm);
    else if (i.aux & kAddress32)
      to[l] = reg<uint32_t>(w, i.r[kAddress])[l] + static_cast<uint32_t>(i.imm);
    else
      to[l] = reg<uint64_t>(w, i.r[kAddress])[l] + static_cast<uint64_t>(i.imm);
    from[l] = reg<uint64_t>(w, i.r[0])[l] + reg<uint64_t>(w, i.r[1])[l];
  }
  slow_addresses(w, i, to, c.size, Access::Write);
  // source: lanes with a source size of 0 read nothing, and their address is not checked
  uint32_t reading = w.mask;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    uint32_t size = c.size;
    if (i.n == 1) size = reg<uint32_t>(w, i.r[2])[l];
    if (i.n == 2 && ((w.pred[i.r[2]] >> l) & 1)) size = 0;
    if (size > c.size)
      fault(w, l, FaultKind::Other,
            "copies " + std::to_string(size) + " source bytes into " + std::to_string(c.size));
    c.source_size[l] = static_cast<uint8_t>(size);
    if (size == 0) reading &= ~(1u << l);
  }
  const uint32_t saved = w.mask;
  const uint64_t base = reinterpret_cast<uint64_t>(w.shared);
  if (reading != 0) {
    Inst load;
    load.aux = static_cast<uint32_t>(Space::Global);
    w.mask = reading;
    for (uint32_t m = reading; m != 0;
         m &= m - 1) {  // hardware wants the full alignment, whatever the source size
      const int l = __builtin_ctz(m);
      if (from[l] % c.size != 0) slow_addresses(w, load, from, c.size, Access::Read);
    }
    // bounds by what is read
    uint32_t same = c.source_size[__builtin_ctz(reading)];
    for (uint32_t m = reading; m != 0; m &= m - 1) same = same == c.source_size[__builtin_ctz(m)] ? same : 0;
    if (same != 0 && (same & (same - 1)) == 0) {
      slow_addresses(w, load, from, same, Access::Read);
      if (w.watch) {
        load.cls = InstClass::LoadGlobal;
        const MemoryCounts before = w.launch->counters.global_load;
        w.launch->counters.global_load = w.launch->counters.global_async;
        observe(w, load, from, same, Access::Read);
        w.launch->counters.global_async = w.launch->counters.global_load;
        w.launch->counters.global_load = before;
      }
    } else {
      for (uint32_t m = reading; m != 0; m &= m - 1) {
        const int l = __builtin_ctz(m);
        w.mask = 1u << l;
        uint64_t one[kLanes];
        for (uint32_t byte = 0; byte < c.source_size[l];
             byte += c.source_size[l] > 1 ? c.source_size[l] - 1u : 1u) {
          one[l] = from[l] + byte;
          slow_addresses(w, load, one, 1, Access::Read);
        }
      }
    }
    w.mask = saved;
  }
  c.landed = lands_now(*w.launch);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    c.source[l] = from[l];
    c.destination[l] = static_cast<uint32_t>(to[l] - base);
    c.group[l] = block.async.group[thread_index(w, l)];
  }
  if ((w.watch & kWatchCounters) != 0) {
    uint64_t offsets[kLanes] = {};
    for (int l = 0; l < kLanes; ++l) offsets[l] = c.destination[l];
    LaunchCounters::shared(w.launch->counters.shared_async, offsets, w.mask, c.size);
  }
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    if (block.race && (w.watch & kWatchSharedRace)) block.race->copy_issued(w, l, c.destination[l], c.size);
    if (w.watch & kWatchUninit)
      block.shared_written[c.destination[l] / 64] |= ((1ull << c.size) - 1) << (c.destination[l] % 64);
    if (c.landed)
      write_lane(block, c, l);
    else
      std::memset(block.shared + c.destination[l], 0xff, c.size);
  }
  block.async.by_warp[w.index].push_back(c);
}

void commit(Warp& w, const Inst&) {
  for (uint32_t m = w.mask; m != 0; m &= m - 1) ++w.block->async.group[thread_index(w, __builtin_ctz(m))];
}

// Everything the lanes issued, committed or not, or only groups below their thread's limit.
void complete(Warp& w, uint32_t lanes, bool all, uint32_t keep) {
  Block& block = *w.block;
  auto& queue = block.async.by_warp[w.index];
  for (auto& c : queue) {
    uint32_t done = 0;
    for (uint32_t m = c.lanes & lanes; m != 0; m &= m - 1) {
      const int l = __builtin_ctz(m);
      const uint32_t open = block.async.group[thread_index(w, l)];
      if (all || (c.group[l] < open && open - c.group[l] > keep)) done |= 1u << l;
    }
    for (uint32_t m = done; m != 0; m &= m - 1) {
      const int l = __builtin_ctz(m);
      if (!c.landed) write_lane(block, c, l);
      if (block.race && (w.watch & kWatchSharedRace))
        block.race->copy_completed(w, thread_index(w, l), c.destination[l], c.size);
    }
    c.lanes &= ~done;
  }
  while (!queue.empty() && queue.front().lanes == 0) queue.pop_front();
}
void wait_group(Warp& w, const Inst& i) {
  complete(w, w.mask, false, static_cast<uint32_t>(i.imm));
}
void wait_all(Warp& w, const Inst&) {
  complete(w, w.mask, true, 0);
}

// The thread's copies so far will arrive at the mbarrier when they are complete: here, at once or at the
// latest moment, which is when the block cannot go on otherwise (advance_bulk).
void signal_mbarrier(Block& block, uint32_t thread, uint32_t offset, uint64_t before) {
  const uint32_t warp = thread / kLanes;
  const int lane = static_cast<int>(thread % kLanes);
  for (auto& c : block.async.by_warp[warp]) {
    if (((c.lanes >> lane) & 1) == 0 || c.sequence >= before) continue;
    if (!c.landed) write_lane(block, c, lane);
    if (block.race && config().check_race)
      block.race->copy_signals(warp, thread, c.destination[lane], c.size, offset);
    c.lanes &= ~(1u << lane);
  }
  mbarrier_arrive_async(block, offset);
}
// Arrivals of one thread happen in order, for each stands for all of the thread's copies before it.
void signal_earlier(Block& block, uint32_t thread, uint64_t before) {
  auto& waits = block.async.barrier_waits;
  for (size_t k = 0; k < waits.size();) {
    const AsyncCopies::BarrierWait wait = waits[k];
    if (wait.thread != thread || wait.sequence >= before) {
      ++k;
      continue;
    }
    waits.erase(waits.begin() + static_cast<std::ptrdiff_t>(k));
    signal_mbarrier(block, thread, wait.offset, wait.sequence);
  }
}
void mbarrier_arrive(Warp& w, const Inst& i) {
  Block& block = *w.block;
  uint64_t a[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if (i.aux & kNoBase)
      a[l] = static_cast<uint64_t>(i.imm);
    else if (i.aux & kAddress32)
      a[l] = reg<uint32_t>(w, i.r[kAddress])[l] + static_cast<uint32_t>(i.imm);
    else
      a[l] = reg<uint64_t>(w, i.r[kAddress])[l] + static_cast<uint64_t>(i.imm);
  }
  slow_addresses(w, i, a, 8, Access::Atomic);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const uint32_t offset = static_cast<uint32_t>(a[l] - reinterpret_cast<uint64_t>(w.shared)),
                   thread = thread_index(w, l);
    check_mbarrier_use(w, l, offset);
    if ((i.aux & (1u << 16)) == 0) {  // without .noinc the arrival is one more than the count foresees
      MbarrierState s;
      std::memcpy(&s.word, block.shared + offset, 8);
      s.expect_more(1);
      std::memcpy(block.shared + offset, &s.word, 8);
    }
    if (lands_now(*w.launch)) {
      signal_earlier(block, thread, block.async.next_sequence);
      signal_mbarrier(block, thread, offset, block.async.next_sequence);
    } else {
      block.async.barrier_waits.push_back({offset, thread, block.async.next_sequence});
    }
  }
}

// ---- bulk copies
uint64_t operand(Warp& w, uint16_t base, uint16_t offset, bool narrow, int lane) {
  return (narrow ? reg<uint32_t>(w, base)[lane] : reg<uint64_t>(w, base)[lane]) +
         reg<uint64_t>(w, offset)[lane];
}
uint64_t checked(Warp& w, int lane, Space space, uint64_t address, uint32_t bytes, Access access) {
  Inst i;
  i.aux = static_cast<uint32_t>(space);
  const uint32_t saved = w.mask;
  w.mask = 1u << lane;
  uint64_t a[kLanes] = {};
  a[lane] = address;
  slow_addresses(w, i, a, 16, access);
  const uint64_t first = a[lane];
  a[lane] = address + bytes - 16;
  slow_addresses(w, i, a, 16, access);
  w.mask = saved;
  if (a[lane] != first + bytes - 16)
    fault(w, lane, FaultKind::IllegalAddress, "bulk copy across two state spaces");
  return first;
}
void move_bytes(Block& block, const PendingBulk& b) {
  if (b.to_shared && config().weak_memory)
    block.weak.read(b.source, b.bytes, reinterpret_cast<void*>(b.destination));
  else
    std::memcpy(reinterpret_cast<void*>(b.destination), reinterpret_cast<const void*>(b.source), b.bytes);
}
void finish_bulk(Block& block, const PendingBulk& b) {
  if (!b.landed) move_bytes(block, b);
  if (!b.to_shared) return;
  if (block.race && config().check_race)
    block.race->bulk_signals(b.destination - reinterpret_cast<uint64_t>(block.shared), b.bytes, b.barrier);
  mbarrier_complete_bytes(block, b.barrier, b.bytes);
}
template <bool kToShared>
void bulk(Warp& w, const Inst& i) {
  Block& block = *w.block;
  const uint64_t shared = reinterpret_cast<uint64_t>(w.shared);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    PendingBulk b;
    b.thread = thread_index(w, l);
    b.pc = w.pc;
    b.bytes = reg<uint32_t>(w, i.r[6])[l];
    b.to_shared = kToShared;
    if (b.bytes == 0) continue;
    if (b.bytes % 16 != 0)
      fault(w, l, FaultKind::Misaligned,
            "copies " + std::to_string(b.bytes) + " bytes in bulk, no multiple of 16");
    b.destination = checked(w, l, kToShared ? Space::Shared : Space::Global,
                            operand(w, i.r[0], i.r[1], i.aux & 1, l), b.bytes, Access::Write);
    b.source = checked(w, l, kToShared ? Space::Global : Space::Shared,
                       operand(w, i.r[2], i.r[3], (i.aux & 2) != 0, l), b.bytes, Access::Read);
    if (kToShared)
      b.barrier = static_cast<uint32_t>(checked(w, l, Space::Shared,
                                                operand(w, i.r[4], i.r[5], (i.aux & 4) != 0, l) & ~15ull, 16,
                                                Access::Atomic) -
                                        shared + (operand(w, i.r[4], i.r[5], (i.aux & 4) != 0, l) & 15));
    if (kToShared) check_mbarrier_use(w, l, b.barrier);
    b.group = block.async.bulk_group[b.thread];
    if (w.watch & kWatchCounters) {
      MemoryCounts& counts = kToShared ? w.launch->counters.global_async : w.launch->counters.global_store;
      counts.bytes += b.bytes, counts.requests += 1;
      counts.sectors += b.bytes / 32, counts.ideal_sectors += b.bytes / 32;
    }
    const uint64_t in_shared = (kToShared ? b.destination : b.source) - shared;
    for (uint32_t k = 0; k < b.bytes; k += 16) {
      if (kToShared && block.race && (w.watch & kWatchSharedRace))
        block.race->copy_issued(w, l, in_shared + k, 16);
      if (w.watch & kWatchUninit) {
        uint64_t& word = block.shared_written[(in_shared + k) / 64];
        const uint64_t bits = 0xffffull << ((in_shared + k) % 64);
        if (kToShared)
          word |= bits;
        else if ((word & bits) != bits)
          fault(w, l, FaultKind::Uninitialised, "copies shared memory in bulk that nobody has written");
      }
      if (!kToShared && block.race && (w.watch & kWatchSharedRace)) {
        uint64_t a[kLanes] = {};
        a[l] = in_shared + k;
        block.race->access(w, 1u << l, a, 16, Access::Read);
      }
    }
    b.landed = lands_now(*w.launch);
    if (b.landed)
      move_bytes(block, b);
    else if (kToShared)
      std::memset(reinterpret_cast<void*>(b.destination), 0xff, b.bytes);
    block.async.bulk.push_back(b);
    ++w.launch->memory_changes;
  }
}
void bulk_commit(Warp& w, const Inst&) {
  for (uint32_t m = w.mask; m != 0; m &= m - 1)
    ++w.block->async.bulk_group[thread_index(w, __builtin_ctz(m))];
}
void bulk_wait(Warp& w, const Inst& i) {
  Block& block = *w.block;
  std::erase_if(block.async.bulk, [&](const PendingBulk& b) {
    if (b.to_shared || b.thread / kLanes != w.index || ((w.mask >> (b.thread % kLanes)) & 1) == 0)
      return false;
    const uint32_t open = block.async.bulk_group[b.thread];
    if (b.group >= open || open - b.group <= static_cast<uint32_t>(i.imm)) return false;
    finish_bulk(block, b);
    return true;
  });
}

const HandlerEntry kEntries[] = {{"cp.async", cp_async},
                                 {"cp.async.commit", commit},
                                 {"cp.async.wait", wait_group},
                                 {"cp.async.wait_all", wait_all},
                                 {"cp.async.mbarrier.arrive", mbarrier_arrive},
                                 {"bulk.to_shared", bulk<true>},
                                 {"bulk.to_global", bulk<false>},
                                 {"bulk.commit", bulk_commit},
                                 {"bulk.wait", bulk_wait}};

}  // namespace

const HandlerTable async_operations = {kEntries, std::size(kEntries)};

bool advance_bulk(Block& block) {
  auto& waits = block.async.barrier_waits;
  const size_t choices = waits.size() + block.async.bulk.size();
  if (choices == 0) return false;
  const size_t pick = config().seed != 0 ? static_cast<size_t>(block.launch->random.below(choices)) : 0;
  if (pick < waits.size()) {
    const auto wait = waits[pick];
    waits.erase(waits.begin() + static_cast<std::ptrdiff_t>(pick));
    signal_earlier(block, wait.thread, wait.sequence);
    signal_mbarrier(block, wait.thread, wait.offset, wait.sequence);
  } else {
    const PendingBulk b = block.async.bulk[pick - waits.size()];
    block.async.bulk.erase(block.async.bulk.begin() + static_cast<std::ptrdiff_t>(pick - waits.size()));
    finish_bulk(block, b);
  }
  return true;
}

}  // namespace ptxsim
