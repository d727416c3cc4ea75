// SPDX-License-Identifier: Apache-2.0
// What every memory access goes through besides the fast path: address translation with bounds and alignment
// checks, and the observers (counters, uninitialised reads, races).
#include <cstdio>

#include "block.h"
#include "global_race.h"
#include "polling.h"
#include "race_detector.h"

namespace ptxsim {
namespace {

std::string hex(uint64_t v) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(v));
  return text;
}
const char* verb(Access a) {
  return a == Access::Read ? "reads" : a == Access::Write ? "writes" : "updates";
}

[[noreturn]] void bad_address(Warp& w, int lane, uint64_t address, uint32_t bytes, Access access,
                              const std::string& space, const std::string& why) {
  fault(w, lane, FaultKind::IllegalAddress,
        std::string(verb(access)) + " " + std::to_string(bytes) + " bytes at " + space + " address " +
            hex(address) + ": " + why);
}
void check_aligned(Warp& w, int lane, uint64_t address, uint32_t bytes, Access access) {
  if ((address & (bytes - 1)) != 0)
    fault(w, lane, FaultKind::Misaligned,
          std::string(verb(access)) + " " + std::to_string(bytes) + " bytes at the misaligned address " +
              hex(address));
}

uint64_t host_address(Warp& w, int lane, Space space, uint64_t address, uint32_t bytes, Access access) {
  if (space == Space::Generic) {
    switch (address & kWindowMask) {
      case kSharedWindow:
        space = Space::Shared, address &= ~kWindowMask;
        break;
      case kLocalWindow:
        space = Space::Local, address &= ~kWindowMask;
        break;
      case kParamWindow:
        space = Space::Param, address &= ~kWindowMask;
        break;
      default:
        space = Space::Global;
        break;
    }
  }
  check_aligned(w, lane, address, bytes, access);
  switch (space) {
    case Space::Shared:
      if (address + bytes > w.shared_bytes || address + bytes < address)
        bad_address(w, lane, address, bytes, access, "shared",
                    "the block has " + std::to_string(w.shared_bytes) + " bytes of shared memory");
      return reinterpret_cast<uint64_t>(w.shared) + address;
    case Space::Local:
      if (address + bytes > w.local_bytes || address + bytes < address)
        bad_address(w, lane, address, bytes, access, "local",
                    "a thread has " + std::to_string(w.local_bytes) + " bytes of local memory");
      return reinterpret_cast<uint64_t>(w.local) + static_cast<uint64_t>(lane) * w.local_bytes + address;
    case Space::Param:
      if (access != Access::Read)
        bad_address(w, lane, address, bytes, access, "parameter", "parameters cannot be written");
      if (address + bytes > w.params_bytes || address + bytes < address)
        bad_address(w, lane, address, bytes, access, "parameter",
                    "the kernel has " + std::to_string(w.params_bytes) + " bytes of parameters");
      return reinterpret_cast<uint64_t>(w.params) + address;
    default:
      break;
  }
  AllocationCache& c = w.cache[w.pc];
  if (address >= c.begin && address + bytes <= c.end) return address;
  Allocation* a = memory().find(address);
  if (a == nullptr || address + bytes > a->end)
    bad_address(w, lane, address, bytes, access, "global", memory().describe(address));
  c = {a->begin, a->end, a};
  return address;
}

// The active lanes of one access that go to shared or to global memory.
struct Split {
  uint32_t shared = 0, global = 0;
};
Split split(const Warp& w, const uint64_t* host, uint32_t lanes) {
  Split s;
  const uint64_t shared = reinterpret_cast<uint64_t>(w.shared), local = reinterpret_cast<uint64_t>(w.local);
  const uint64_t params = reinterpret_cast<uint64_t>(w.params);
  for (int l = 0; l < kLanes; ++l) {
    if (((lanes >> l) & 1) == 0) continue;
    if (host[l] - shared < w.shared_bytes)
      s.shared |= 1u << l;
    else if (host[l] - local >= w.local_bytes * kLanes && host[l] - params >= w.params_bytes)
      s.global |= 1u << l;
  }
  return s;
}

void observe_shared(Warp& w, const Inst& i, const uint64_t* host, uint32_t lanes, uint32_t bytes,
                    Access access) {
  uint64_t offset[kLanes];
  const uint64_t base = reinterpret_cast<uint64_t>(w.shared);
  for (int l = 0; l < kLanes; ++l) offset[l] = host[l] - base;
  Block& block = *w.block;
  LaunchCounters& counters = w.launch->counters;
  const bool rows = i.cls == InstClass::LoadMatrix;
  if (w.watch & kWatchCounters)
    LaunchCounters::shared(rows                     ? counters.ldmatrix
                           : access == Access::Read ? counters.shared_load
                                                    : counters.shared_store,
                           offset, lanes, bytes);
  if (w.watch & kWatchUninit) {
    for (uint32_t m = lanes; m != 0; m &= m - 1) {
      const int l = __builtin_ctz(m);
      const uint64_t mask = (bytes == 64 ? ~0ull : (1ull << bytes) - 1)
                            << (offset[l] % 64);  // aligned: within one word of 64 bits
      uint64_t& word = block.shared_written[offset[l] / 64];
      if (access == Access::Write)
        word |= mask;
      else if ((word & mask) != mask)
        fault(w, l, FaultKind::Uninitialised,
              std::string(verb(access)) + " " + std::to_string(bytes) + " bytes of shared memory at offset " +
                  std::to_string(offset[l]) + " that nobody has written");
    }
  }
  if ((w.watch & kWatchSharedRace) == 0) return;
  if (rows && access == Access::Read)
    block.race->read_rows(w, lanes, offset);
  else
    block.race->access(w, lanes, offset, bytes, access);
}

void observe_global(Warp& w, const uint64_t* host, uint32_t lanes, uint32_t bytes, Access access) {
  LaunchCounters& counters = w.launch->counters;
  if (w.watch & kWatchCounters) {
    counters.global(access == Access::Read    ? counters.global_load
                    : access == Access::Write ? counters.global_store
                                              : counters.global_atomic,
                    host, lanes, bytes);
    if (Allocation* a = w.cache[w.pc].allocation; a != nullptr) {
      const uint64_t total = static_cast<uint64_t>(__builtin_popcount(lanes)) * bytes;
      if (access != Access::Write) a->read_bytes += total;
      if (access != Access::Read) a->written_bytes += total;
    }
  }
  if (w.watch & kWatchGlobalRace) w.launch->global_race->access(w, lanes, host, bytes, access);
}

}  // namespace

void slow_addresses(Warp& w, const Inst& i, uint64_t* addresses, uint32_t bytes, Access access) {
  const Space space = static_cast<Space>(i.aux & kSpaceMask);
  uint32_t lanes = w.mask;
  if (i.cls == InstClass::LoadMatrix) lanes &= i.n == 4 ? kAllLanes : (1u << (8 * i.n)) - 1;
  uint64_t any = 0;
  for (uint32_t m = lanes; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    any = addresses[l] = host_address(w, l, space, addresses[l], bytes, access);
  }
  for (int l = 0; l < kLanes; ++l)
    if (((lanes >> l) & 1) == 0) addresses[l] = any;
}

void observe(Warp& w, const Inst& i, const uint64_t* host, uint32_t bytes, Access access) {
  uint32_t lanes = w.mask;
  if (i.cls == InstClass::LoadMatrix) lanes &= i.n == 4 ? kAllLanes : (1u << (8 * i.n)) - 1;
  const Split s = split(w, host, lanes);
  if (s.shared != 0) observe_shared(w, i, host, s.shared, bytes, access);
  if (s.global != 0) observe_global(w, host, s.global, bytes, access);
}

void poll(Warp& w) {
  if (++w.polls >= 32) w.stop_pc = 0;
}

void strong_access(Warp& w, const Inst& i, const uint64_t* host, uint32_t bytes, Access access) {
  Block& block = *w.block;
  if (access == Access::Read) poll(w);
  const Split s = split(w, host, w.mask);
  const uint32_t order = config().ignore_order != 0 ? 0 : i.aux & (kAcquire | kRelease);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const uint32_t thread = thread_index(w, l);
    if ((w.watch & kWatchWeak) && ((s.global >> l) & 1)) {
      if (access == Access::Write && (order & kRelease) && (i.aux & kScopeWide))
        block.weak.publish(thread, block.barrier_phase);
      block.weak.publish_overlapping(host[l], bytes);
    }
    const bool in_shared = ((s.shared >> l) & 1) != 0;
    if (w.launch->global_race && !in_shared && order == 0)
      w.launch->global_race->relaxed(w, l, host[l], access);
    if (block.race && order != 0) {
      const uint64_t object = host[l];
      if (access == Access::Write && (order & kRelease)) {
        if (w.launch->global_race && !in_shared) w.launch->global_race->release(w, l, object);
        block.race->release(thread, object);
      }
      if (access == Access::Read && (order & kAcquire)) {
        block.race->acquire(thread, object);
        if (w.launch->global_race && !in_shared) w.launch->global_race->acquire(w, l, object);
      }
    }
  }
}

void weak_load(Warp& w, uint64_t address, uint32_t bytes, void* out) {
  w.block->weak.read(address, bytes, out);
}
void weak_store(Warp& w, uint64_t address, uint32_t bytes, const void* in) {
  const uint64_t shared = reinterpret_cast<uint64_t>(w.shared);
  const uint64_t local = reinterpret_cast<uint64_t>(w.local);
  if (address - shared < w.shared_bytes ||
      address - local < w.local_bytes * kLanes) {  // a generic store that is not global
    __builtin_memcpy(reinterpret_cast<void*>(address), in, bytes);
    return;
  }
  w.block->weak.write(address, bytes, in, w.index * kLanes, w.block->barrier_phase);
}

}  // namespace ptxsim
