// SPDX-License-Identifier: Apache-2.0
// Strong memory accesses: what they mean for ordering, and for giving other blocks a turn.
#pragma once

#include "warp.h"

namespace ptxsim {

// Called for volatile, relaxed, acquire and release loads and stores, before the access. Reads count as
// polling: a warp that does little else gives way to others.
void strong_access(Warp& w, const Inst& i, const uint64_t* addresses, uint32_t bytes, Access access);
// Counts one polling instruction.
void poll(Warp& w);

}  // namespace ptxsim
