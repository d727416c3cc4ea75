// SPDX-License-Identifier: Apache-2.0
// A parsed PTX module: its variables, and its functions as lists of instructions.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ptxsim {

enum class Space : uint8_t { Generic, Global, Shared, Local, Param, Const };

struct Operand {
  // Vector also stands for the pair `a|b`; Sink is `_`.
  enum class Kind : uint8_t { None, Register, Immediate, Symbol, Special, Address, Vector, Sink };
  Kind kind = Kind::None;
  bool negated = false;        // !p
  bool is_double = false;      // Immediate written 0d...
  bool is_single = false;      // Immediate written 0f...
  int reg = -1;                // Register; base of an Address, or -1
  uint64_t bits = 0;           // Immediate
  int64_t offset = 0;          // Address, Symbol
  std::string name;            // Symbol, Special, symbol base of an Address
  std::vector<Operand> parts;  // Vector
};

struct SourceLine {
  int file = 0, line = 0;              // innermost
  int outer_file = 0, outer_line = 0;  // where it was inlined, 0 if nowhere
};

struct Instruction {
  std::string op;                 // "ld", "mma", ...
  std::vector<std::string> mods;  // "global", "v4", "u32"
  int guard = -1;                 // predicate register, -1 if unconditional
  bool guard_negated = false;
  std::vector<Operand> operands;
  int line = 0;  // PTX line
  SourceLine source;

  bool has(const char* mod) const {
    for (const auto& m : mods)
      if (m == mod) return true;
    return false;
  }
};

struct Register {
  std::string name;
  int bits = 0;  // 1 for a predicate
};

struct Variable {
  std::string name;
  Space space = Space::Global;
  bool is_extern = false;
  uint64_t align = 1, bytes = 0;  // bytes is 0 for `extern __shared__ x[]`
  std::vector<uint8_t> init;      // empty: zeros
  struct Relocation {             // init[offset..offset+8) += address of `symbol`
    uint64_t offset;
    std::string symbol;
    bool generic;
  };
  std::vector<Relocation> relocations;
};

struct Function {
  std::string name;
  bool is_entry = false, has_body = false;
  std::vector<Variable> params, results;
  std::vector<Variable> variables;  // declared in the body: shared, local, param
  std::vector<Register> registers;
  std::vector<Instruction> body;
  std::map<std::string, size_t> labels;                            // unique label -> instruction index
  std::map<std::string, std::vector<std::string>> branch_targets;  // of brx.idx
  int max_threads = 0;                                             // .maxntid, 0 if absent
};

struct Module {
  std::string text;  // the PTX, kept for messages
  std::string target;
  std::vector<std::string> lines;
  std::map<int, std::string> files;
  std::vector<Variable> variables;
  std::map<std::string, Function> functions;

  const std::string& line_text(int line) const;
};

// Throws PtxError.
std::unique_ptr<Module> parse_ptx(std::string text);

}  // namespace ptxsim
