// SPDX-License-Identifier: Apache-2.0
// Packs the virtual registers of a kernel (thousands) into few slots, so that a warp's register file stays in
// the cache.
#pragma once

#include <cstdint>
#include <vector>

#include "flatten.h"

namespace ptxsim {

struct RegisterSlots {
  // By virtual register: index of the first 64-byte unit, or the number of the predicate; -1 if never used.
  std::vector<int> slot;
  int num_units = 0, num_predicates = 0;
};

// Registers marked in `skip` (they became constants) get no slot.
//
// Liveness of scalars stays right when a warp diverges: slots are per lane, writes touch active lanes only,
// and each lane by itself follows one path of the control flow graph. A result never shares a slot with an
// operand of the same instruction.
RegisterSlots allocate_registers(const FlatKernel& kernel, const std::vector<bool>& skip);

// The registers an instruction writes and reads. Guarded writes keep the old value of inactive lanes, so they
// also read.
struct RegisterUse {
  std::vector<int> writes, reads;
};
RegisterUse register_use(const Instruction& in);

}  // namespace ptxsim
