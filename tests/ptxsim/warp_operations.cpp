// SPDX-License-Identifier: Apache-2.0
// Control flow, barriers, votes and shuffles: instructions that work on a warp or block as a whole.
#include "warp_operations.h"

#include <chrono>
#include <cstring>

#include "block.h"
#include "global_race.h"
#include "groups.h"
#include "polling.h"
#include "race_detector.h"

namespace ptxsim {
namespace {

constexpr uint16_t kNoPredicate = 0xffff;

void set_predicate(Warp& w, uint16_t p, uint32_t value) {
  w.pred[p] = (w.pred[p] & ~w.mask) | (value & w.mask);
}
template <class T>
T first_lane(Warp& w, uint16_t r) {
  return reg<T>(w, r)[__builtin_ctz(w.mask)];
}

// ---- control flow
void bra(Warp& w, const Inst& i) {
  const uint32_t stay = w.active & ~w.mask;
  if (stay == 0) {
    w.next = i.target;
    if (i.target <= w.pc && w.num_others != 0) w.stop_pc = 0;  // look again at groups that are now ahead
    return;
  }
  park(w, w.mask, i.target, Wait::None, 0);
}
void brx(Warp& w, const Inst& i) {
  const uint32_t* index = reg<uint32_t>(w, i.r[1]);
  const auto& table = w.launch->program->branch_tables[static_cast<size_t>(i.imm)];
  uint32_t lanes = w.mask;
  while (lanes != 0) {
    const int l = __builtin_ctz(lanes);
    if (index[l] >= table.size()) fault(w, l, FaultKind::Other, "branches by an index outside its table");
    uint32_t same = 0;
    for (int k = l; k < kLanes; ++k)
      if (((lanes >> k) & 1) && index[k] == index[l]) same |= 1u << k;
    park(w, same, table[index[l]], Wait::None, 0);
    lanes &= ~same;
  }
}

void release_barrier(Block& block, uint32_t id) {
  NamedBarrier& b = block.barriers[id];
  if (block.race) {
    std::vector<uint16_t> waiting;
    for (Warp& w : block.warps)
      for (uint32_t g = 0; g < w.num_others; ++g)
        if (w.others[g].wait == Wait::Barrier && w.others[g].argument == id)
          for (uint32_t m = w.others[g].mask; m != 0; m &= m - 1)
            waiting.push_back(
                static_cast<uint16_t>(w.index * kLanes + static_cast<uint32_t>(__builtin_ctz(m))));
    if (block.launch->global_race) block.launch->global_race->block_barrier(block, b.threads, waiting);
    block.race->barrier(b.threads, waiting);
  }
  b = NamedBarrier();
  ++block.barrier_phase;
  for (Warp& w : block.warps) wake_barrier(w, id);
}
void check_barrier(Block& block, uint32_t id) {
  NamedBarrier& b = block.barriers[id];
  if (b.arrived == 0) return;
  const uint32_t expected = b.expected != 0 ? b.expected : block.live_threads;
  if (b.arrived >= expected) release_barrier(block, id);
}
// The lanes of w arrive; they wait when `wait`.
NamedBarrier& arrive(Warp& w, const Inst& i, bool wait, uint32_t& id) {
  Block& block = *w.block;
  id = first_lane<uint32_t>(w, i.r[1]);
  const uint32_t count = (i.aux & 1) ? first_lane<uint32_t>(w, i.r[2]) : 0;
  const int lane = __builtin_ctz(w.mask);
  if (id >= 16) fault(w, lane, FaultKind::Other, "uses barrier " + std::to_string(id) + "; there are 16");
  if (count % kLanes != 0)
    fault(w, lane, FaultKind::Other,
          "gives a barrier a thread count of " + std::to_string(count) + ", which is no multiple of 32");
  NamedBarrier& b = block.barriers[id];
  if (b.arrived != 0 && b.expected != count)
    fault(w, lane, FaultKind::Other,
          "arrives at barrier " + std::to_string(id) + " with another thread count than those before it");
  b.expected = count;
  if (w.mask != w.live) ++w.launch->counters.divergent_barriers;
  b.arrived += static_cast<uint32_t>(__builtin_popcount(w.mask));
  if (block.race)
    for (uint32_t m = w.mask; m != 0; m &= m - 1)
      b.threads.push_back(static_cast<uint16_t>(thread_index(w, __builtin_ctz(m))));
  if (wait) park(w, w.mask, w.pc + 1, Wait::Barrier, id);
  return b;
}
void bar_sync(Warp& w, const Inst& i) {
  uint32_t id = 0;
  arrive(w, i, true, id);
  check_barrier(*w.block, id);
}
void bar_arrive(Warp& w, const Inst& i) {
  uint32_t id = 0;
  arrive(w, i, false, id);
  check_barrier(*w.block, id);
}
// The reduction is over all who arrive, so the result is written when the last one has.
template <int kOp>
void bar_red(Warp& w, const Inst& i) {
  const uint32_t lanes = w.mask;
  const uint32_t p = (w.pred[i.r[3]] ^ (i.aux & 2 ? kAllLanes : 0u)) & lanes;
  uint32_t id = 0;
  NamedBarrier& b = arrive(w, i, true, id);
  b.popc += static_cast<uint32_t>(__builtin_popcount(p));
  b.all &= p == lanes;
  b.any |= p != 0;
  const uint32_t expected = b.expected != 0 ? b.expected : w.block->live_threads;
  if (b.arrived < expected) return;
  const uint32_t value = kOp == 0 ? b.popc : kOp == 1 ? b.all : b.any;
  for (Warp& x : w.block->warps)
    for (uint32_t g = 0; g < x.num_others; ++g) {
      const Group& group = x.others[g];
      if (group.wait != Wait::Barrier || group.argument != id) continue;
      const Inst& own = w.launch->program->code[group.pc - 1];
      if (kOp == 0) {
        for (uint32_t m = group.mask; m != 0; m &= m - 1)
          reg<uint32_t>(x, own.r[0])[__builtin_ctz(m)] = value;
      } else {
        x.pred[own.r[0]] = (x.pred[own.r[0]] & ~group.mask) | (value ? group.mask : 0u);
      }
    }
  check_barrier(*w.block, id);
}
void bar_warp_sync(Warp& w, const Inst& i) {
  const uint32_t members = first_lane<uint32_t>(w, i.r[1]), needed = members & w.live;
  if ((w.mask & ~members) != 0)
    fault(w, __builtin_ctz(w.mask & ~members), FaultKind::Other,
          "executes a __syncwarp whose mask leaves it out");
  if ((w.mask & needed) == needed) {
    if (w.block->race) w.block->race->warp_sync(w, w.mask);
    if (w.launch->global_race) w.launch->global_race->warp_sync(w, w.mask);
    return;
  }
  park(w, w.mask, w.pc + 1, Wait::WarpSync, members);
  wake_warp_sync(w);
}
void exit_lanes(Warp& w, const Inst&) {
  const uint32_t lanes = w.mask;
  lanes_exit(w, lanes);
  for (uint32_t id = 0; id < 16; ++id) check_barrier(*w.block, id);
}
void trap(Warp& w, const Inst&) {
  fault(w, __builtin_ctz(w.mask), FaultKind::Trap, "executes a trap");
}
void fence(Warp& w, const Inst& i) {
  if ((i.aux & kScopeWide) == 0 || config().ignore_order != 0) return;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    if (w.watch & kWatchWeak) w.block->weak.publish(thread_index(w, l), w.block->barrier_phase);
  }
  if (w.launch->global_race) w.launch->global_race->fence(w, w.mask);
}
void nanosleep(Warp& w, const Inst&) {
  poll(w);
}

// ---- votes
uint32_t vote_predicate(Warp& w, const Inst& i) {
  const uint32_t p =
      i.r[1] == kNoPredicate ? (i.aux ? kAllLanes : 0u) : w.pred[i.r[1]] ^ (i.aux ? kAllLanes : 0u);
  return p & w.mask;
}
template <int kOp>
void vote(Warp& w, const Inst& i) {
  const uint32_t members = first_lane<uint32_t>(w, i.r[2]);
  if (!collective(w, members)) return;
  const uint32_t p = vote_predicate(w, i);
  if (kOp == 3) {
    for (uint32_t m = w.mask; m != 0; m &= m - 1) reg<uint32_t>(w, i.r[0])[__builtin_ctz(m)] = p;
    return;
  }
  const bool all = p == w.mask, any = p != 0;
  set_predicate(w, i.r[0], (kOp == 0 ? all : kOp == 1 ? any : all || !any) ? kAllLanes : 0u);
}
template <class T, bool kAll>
void match(Warp& w, const Inst& i) {
  if (!collective(w, first_lane<uint32_t>(w, i.r[2]))) return;
  T a[kLanes];
  std::memcpy(a, reg<T>(w, i.r[1]), sizeof(a));
  uint32_t* d = reg<uint32_t>(w, i.r[0]);
  bool all = true;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    uint32_t same = 0;
    for (int k = 0; k < kLanes; ++k)
      if (((w.mask >> k) & 1) && a[k] == a[l]) same |= 1u << k;
    all = all && same == w.mask;
    d[l] = same;
  }
  if (!kAll) return;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) d[__builtin_ctz(m)] = all ? w.mask : 0;
  set_predicate(w, i.r[3], all ? kAllLanes : 0u);
}
template <class T, class F>
void reduce(Warp& w, const Inst& i, F f) {
  if (!collective(w, first_lane<uint32_t>(w, i.r[2]))) return;
  const T* a = reg<T>(w, i.r[1]);
  T v = a[__builtin_ctz(w.mask)];
  for (uint32_t m = w.mask & (w.mask - 1); m != 0; m &= m - 1) v = f(v, a[__builtin_ctz(m)]);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) reg<T>(w, i.r[0])[__builtin_ctz(m)] = v;
}
void redux_add(Warp& w, const Inst& i) {
  reduce<uint32_t>(w, i, [](uint32_t a, uint32_t b) { return a + b; });
}
void redux_and(Warp& w, const Inst& i) {
  reduce<uint32_t>(w, i, [](uint32_t a, uint32_t b) { return a & b; });
}
void redux_or(Warp& w, const Inst& i) {
  reduce<uint32_t>(w, i, [](uint32_t a, uint32_t b) { return a | b; });
}
void redux_xor(Warp& w, const Inst& i) {
  reduce<uint32_t>(w, i, [](uint32_t a, uint32_t b) { return a ^ b; });
}
template <class T>
void redux_min(Warp& w, const Inst& i) {
  reduce<T>(w, i, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
void redux_max(Warp& w, const Inst& i) {
  reduce<T>(w, i, [](T a, T b) { return a < b ? b : a; });
}
void activemask(Warp& w, const Inst& i) {
  for (uint32_t m = w.mask; m != 0; m &= m - 1) reg<uint32_t>(w, i.r[0])[__builtin_ctz(m)] = w.mask;
}
void elect(Warp& w, const Inst& i) {
  if (!collective(w, first_lane<uint32_t>(w, i.r[2]))) return;
  const int leader = __builtin_ctz(w.mask);
  for (uint32_t m = w.mask; m != 0; m &= m - 1)
    reg<uint32_t>(w, i.r[0])[__builtin_ctz(m)] = static_cast<uint32_t>(leader);
  set_predicate(w, i.r[3], 1u << leader);
}

// ---- shuffles: 0 up, 1 down, 2 bfly, 3 idx. A lane that reads one outside the members gets an undefined
// value: here poison.
template <int kOp>
void shuffle(Warp& w, const Inst& i) {
  if (!collective(w, first_lane<uint32_t>(w, i.r[4]))) return;
  uint32_t a[kLanes], t[kLanes];
  std::memcpy(a, reg<uint32_t>(w, i.r[1]), sizeof(a));
  const uint32_t *b = reg<uint32_t>(w, i.r[2]), *c = reg<uint32_t>(w, i.r[3]);
  uint32_t valid = 0;
  for (uint32_t l = 0; l < kLanes; ++l) {
    const uint32_t by = b[l] & 31, clamp = c[l] & 31, segment = (c[l] >> 8) & 31;
    const uint32_t highest = (l & segment) | (clamp & ~segment), lowest = l & segment;
    uint32_t from;
    bool in_range;
    if (kOp == 0) {
      from = l - by;
      in_range =
          static_cast<int32_t>(from) >= static_cast<int32_t>(highest);  // for up the clamp is the lowest lane
    } else if (kOp == 1) {
      from = l + by;
      in_range = from <= highest;
    } else if (kOp == 2) {
      from = l ^ by;
      in_range = from <= highest;
    } else {
      from = lowest | (by & ~segment);
      in_range = from <= highest;
    }
    if (!in_range) from = l;
    valid |= static_cast<uint32_t>(in_range) << l;
    t[l] = (w.mask >> from) & 1 ? a[from] : 0xffffffffu;
  }
  uint32_t* d = reg<uint32_t>(w, i.r[0]);
  if (w.mask == kAllLanes)
    std::memcpy(d, t, sizeof(t));
  else
    for (uint32_t m = w.mask; m != 0; m &= m - 1) d[__builtin_ctz(m)] = t[__builtin_ctz(m)];
  if (i.r[5] != kNoPredicate) set_predicate(w, i.r[5], valid);
}

template <class T>
void clock_register(Warp& w,
                    const Inst& i) {  // counts instructions, so that results do not depend on the machine
  const T now = static_cast<T>(w.launch->executed * 8 + (w.launch->random.next() & 7));
  for (uint32_t m = w.mask; m != 0; m &= m - 1) reg<T>(w, i.r[0])[__builtin_ctz(m)] = now;
  poll(w);
}

const HandlerEntry kEntries[] = {{"bra", bra},
                                 {"brx", brx},
                                 {"exit", exit_lanes},
                                 {"trap", trap},
                                 {"fence", fence},
                                 {"nanosleep", nanosleep},
                                 {"bar.sync", bar_sync},
                                 {"bar.arrive", bar_arrive},
                                 {"bar.red.popc", bar_red<0>},
                                 {"bar.red.and", bar_red<1>},
                                 {"bar.red.or", bar_red<2>},
                                 {"bar.warp.sync", bar_warp_sync},
                                 {"vote.all", vote<0>},
                                 {"vote.any", vote<1>},
                                 {"vote.uni", vote<2>},
                                 {"vote.ballot", vote<3>},
                                 {"match.any.32", match<uint32_t, false>},
                                 {"match.any.64", match<uint64_t, false>},
                                 {"match.all.32", match<uint32_t, true>},
                                 {"match.all.64", match<uint64_t, true>},
                                 {"redux.add.u32", redux_add},
                                 {"redux.add.s32", redux_add},
                                 {"redux.and.b32", redux_and},
                                 {"redux.or.b32", redux_or},
                                 {"redux.xor.b32", redux_xor},
                                 {"redux.min.u32", redux_min<uint32_t>},
                                 {"redux.max.u32", redux_max<uint32_t>},
                                 {"redux.min.s32", redux_min<int32_t>},
                                 {"redux.max.s32", redux_max<int32_t>},
                                 {"activemask", activemask},
                                 {"elect", elect},
                                 {"shfl.up", shuffle<0>},
                                 {"shfl.down", shuffle<1>},
                                 {"shfl.bfly", shuffle<2>},
                                 {"shfl.idx", shuffle<3>},
                                 {"clock.32", clock_register<uint32_t>},
                                 {"clock.64", clock_register<uint64_t>}};

}  // namespace

const HandlerTable warp_operations = {kEntries, std::size(kEntries)};

}  // namespace ptxsim
