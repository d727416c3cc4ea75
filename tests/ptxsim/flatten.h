// SPDX-License-Identifier: Apache-2.0
// Inlines every call of a kernel, lays out its variables and resolves its branches: what is left is one flat
// list.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "ptx_module.h"

namespace ptxsim {

struct Placed {  // a variable with its place
  Space space;
  uint64_t offset;  // within its space; for global and const the host address is found by name instead
  uint64_t bytes;
};

struct FlatInstruction {
  Instruction in;
  std::vector<size_t> targets;  // of bra (one) and brx (all)
};

struct FlatKernel {
  std::string name;
  std::vector<FlatInstruction> code;
  std::vector<Register> registers;
  std::map<std::string, Placed> variables;
  std::vector<Placed> params;  // in order
  uint64_t params_bytes = 0, static_shared_bytes = 0, local_bytes = 0;
  int max_threads = 0;
};

// Throws PtxError for recursion and for functions that are neither defined nor provided (vprintf,
// __assertfail).
FlatKernel flatten(const Module& module, const Function& entry);

}  // namespace ptxsim
