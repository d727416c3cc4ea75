// SPDX-License-Identifier: Apache-2.0
// Divergence: the lanes of a warp that share a pc form a group. One group runs at a time, normally the one
// with the lowest pc, until it meets another group's pc; then they merge.
#pragma once

#include "warp.h"

namespace ptxsim {

// Parks the running lanes `lanes` at `pc`, waiting for `wait`; the rest of the running group goes on.
void park(Warp& w, uint32_t lanes, uint32_t pc, Wait wait, uint32_t argument);
// Merges groups at the same pc and chooses the one to run. False if none can.
bool choose_group(Warp& w);
// Puts the running group aside.
void suspend(Warp& w);
// Lets groups that wait for a barrier, or at a warp synchronisation, go on.
void wake_barrier(Warp& w, uint32_t barrier);
void wake_warp_sync(Warp& w);
void lanes_exit(Warp& w, uint32_t lanes);

}  // namespace ptxsim
