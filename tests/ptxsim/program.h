// SPDX-License-Identifier: Apache-2.0
// A decoded kernel, ready to run.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "flatten.h"
#include "ptx_module.h"
#include "warp.h"

namespace ptxsim {

// Registers with a value that a launch, a block or a warp fixes.
enum class SpecialRegister : uint8_t {
  // the same for the whole launch
  NtidX,
  NtidY,
  NtidZ,
  NctaidX,
  NctaidY,
  NctaidZ,
  Nwarpid,
  Nsmid,
  Gridid,
  Envreg1,
  Envreg2,
  DynamicSmemSize,
  TotalSmemSize,
  ReservedSmemBegin,
  ReservedSmemEnd,
  ReservedSmemCap,
  ReservedSmem0,
  ReservedSmem1,
  Zero,
  One,
  LaneId,
  LanemaskEq,
  LanemaskLe,
  LanemaskLt,
  LanemaskGe,
  LanemaskGt,
  // of a block
  CtaidX,
  CtaidY,
  CtaidZ,
  Smid,
  // of a warp
  TidX,
  TidY,
  TidZ,
  Warpid
};
constexpr bool is_launch_constant(SpecialRegister s) {
  return s < SpecialRegister::CtaidX;
}

struct LaunchConstant {
  uint32_t unit;  // in the constants
  bool is_param;
  uint64_t offset;  // of the parameter
  int bits;
  SpecialRegister special;
};
struct WarpSpecial {
  uint32_t unit;  // in the registers
  SpecialRegister special;
};
struct DebugLine {
  int line = 0;  // in the PTX
  SourceLine source;
};

struct Program {
  std::string kernel;
  std::shared_ptr<const Module> module;
  std::vector<Inst> code;
  std::vector<DebugLine> debug;                      // by pc
  std::vector<std::vector<uint32_t>> branch_tables;  // of brx.idx
  std::vector<uint8_t> constants;
  std::vector<LaunchConstant> launch_constants;
  std::vector<WarpSpecial> warp_specials;
  uint32_t num_units = 0, num_predicates = 0;
  uint64_t static_shared_bytes = 0, local_bytes = 0, params_bytes = 0;
  std::vector<Placed> params;
  int max_threads = 0;

  // "line 12: ld.global.f32 %f1, [%rd4];   at file.cu:7"
  std::string where(uint32_t pc) const;
};

// `globals` gives the host address of each module variable. Throws PtxError.
std::unique_ptr<Program> decode(std::shared_ptr<const Module> module, const Function& entry,
                                const std::map<std::string, uint64_t>& globals);

// The handler for a key such as "add.f32" in the instruction set in use, or nullptr.
Handler find_handler(const std::string& key);
const char* isa_name();

}  // namespace ptxsim
