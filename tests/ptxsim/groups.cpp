// SPDX-License-Identifier: Apache-2.0
#include "groups.h"

#include "block.h"
#include "global_race.h"
#include "race_detector.h"

namespace ptxsim {

void park(Warp& w, uint32_t lanes, uint32_t pc, Wait wait, uint32_t argument) {
  w.others[w.num_others++] = {pc, lanes, wait, argument};
  w.active &= ~lanes;
  w.stop_pc = 0;
}

void suspend(Warp& w) {
  if (w.active != 0) w.others[w.num_others++] = {w.pc, w.active, Wait::None, 0};
  w.active = 0;
}

bool choose_group(Warp& w) {
  suspend(w);
  // Merge: a group that waits for its mates at a warp-wide instruction tries again when a mate arrives.
  for (uint32_t a = 0; a < w.num_others; ++a)
    for (uint32_t b = a + 1; b < w.num_others;) {
      Group &x = w.others[a], &y = w.others[b];
      const bool mergeable = x.pc == y.pc && (x.wait == Wait::None || x.wait == Wait::Collective) &&
                             (y.wait == Wait::None || y.wait == Wait::Collective);
      if (!mergeable) {
        ++b;
        continue;
      }
      if (x.wait != y.wait) x.wait = Wait::None;
      x.mask |= y.mask;
      y = w.others[--w.num_others];
    }
  int best = -1;
  for (uint32_t g = 0; g < w.num_others; ++g) {
    if (w.others[g].wait != Wait::None) continue;
    if (best < 0 || (w.others[g].pc < w.others[static_cast<uint32_t>(best)].pc) != w.run_last)
      best = static_cast<int>(g);
  }
  if (best < 0) return false;
  w.pc = w.others[best].pc;
  w.active = w.others[best].mask;
  w.others[best] = w.others[--w.num_others];
  w.stop_pc = kNever;
  for (uint32_t g = 0; g < w.num_others; ++g) {
    const Group& o = w.others[g];
    if ((o.wait == Wait::None || o.wait == Wait::Collective) && o.pc > w.pc && o.pc < w.stop_pc)
      w.stop_pc = o.pc;
  }
  return true;
}

void wake_barrier(Warp& w, uint32_t barrier) {
  for (uint32_t g = 0; g < w.num_others; ++g)
    if (w.others[g].wait == Wait::Barrier && w.others[g].argument == barrier) w.others[g].wait = Wait::None;
}

void wake_warp_sync(Warp& w) {
  for (uint32_t g = 0; g < w.num_others; ++g) {
    if (w.others[g].wait != Wait::WarpSync) continue;
    const uint32_t members = w.others[g].argument, needed = members & w.live;
    uint32_t arrived = 0;
    for (uint32_t k = 0; k < w.num_others; ++k)
      if (w.others[k].wait == Wait::WarpSync && w.others[k].argument == members) arrived |= w.others[k].mask;
    if ((arrived & needed) != needed) continue;
    if (w.block->race) w.block->race->warp_sync(w, arrived);
    if (w.launch->global_race) w.launch->global_race->warp_sync(w, arrived);
    for (uint32_t k = 0; k < w.num_others; ++k)
      if (w.others[k].wait == Wait::WarpSync && w.others[k].argument == members)
        w.others[k].wait = Wait::None;
  }
}

void lanes_exit(Warp& w, uint32_t lanes) {
  w.live &= ~lanes;
  w.active &= ~lanes;
  w.stop_pc = 0;
  w.block->live_threads -= static_cast<uint32_t>(__builtin_popcount(lanes));
  for (uint32_t g = 0; g < w.num_others; ++g)
    if (w.others[g].wait == Wait::Collective)
      w.others[g].wait = Wait::None;  // their member set may be complete now
  wake_warp_sync(w);
}

bool collective(Warp& w, uint32_t members) {
  const uint32_t needed = members & w.live;
  if (__builtin_expect((w.mask & needed) == needed, 1)) {
    if ((w.mask & ~members) != 0)
      fault(w, __builtin_ctz(w.mask & ~members), FaultKind::Other,
            "executes a warp-wide instruction whose member mask leaves it out");
    return true;
  }
  --w.class_counts[static_cast<size_t>(
      w.launch->program->code[w.pc].cls)];  // it runs again when its mates arrive
  park(w, w.mask, w.pc, Wait::Collective, members);
  return false;
}

}  // namespace ptxsim
