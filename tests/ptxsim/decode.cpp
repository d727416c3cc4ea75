// SPDX-License-Identifier: Apache-2.0
// Turns each PTX instruction into a handler and the places of its operands.
#include <algorithm>

#include "decoder.h"
#include "ptx_error.h"
#include "register_allocation.h"

namespace ptxsim {

Decoder::Decoder(std::shared_ptr<const Module> module, const Function& entry,
                 const std::map<std::string, uint64_t>& globals)
    : globals_(globals), flat_(flatten(*module, entry)), out_(std::make_unique<Program>()) {
  out_->module = std::move(module);
}

std::unique_ptr<Program> Decoder::run() {
  out_->kernel = flat_.name;
  out_->static_shared_bytes = flat_.static_shared_bytes;
  out_->local_bytes = (flat_.local_bytes + 15) / 16 * 16;
  out_->params = flat_.params;
  out_->params_bytes = flat_.params_bytes;
  out_->max_threads = flat_.max_threads;

  unit_of_.assign(flat_.registers.size(), -1);
  constant_.assign(flat_.registers.size(), false);
  zero_ = constant(0, 64);
  std::vector<bool> removed = fold_constants();
  RegisterSlots slots = allocate_registers(flat_, constant_);
  for (size_t r = 0; r < slots.slot.size(); ++r)
    if (!constant_[r]) unit_of_[r] = slots.slot[r];
  carry_ = static_cast<uint16_t>(slots.num_predicates);
  scratch_predicate_ = static_cast<uint16_t>(slots.num_predicates + 1);
  out_->num_predicates = static_cast<uint32_t>(slots.num_predicates) + 3;
  const uint32_t first_special = static_cast<uint32_t>(slots.num_units);
  scratch_ = static_cast<uint16_t>(first_special + static_cast<uint32_t>(out_->warp_specials.size()) * 2);
  out_->num_units = scratch_ + 16;
  if (out_->num_units >= kConstantBit) throw PtxError(0, "the kernel needs too many registers");
  for (auto& s : out_->warp_specials) s.unit += first_special;
  first_special_ = first_special;

  std::vector<uint32_t> pc_of(flat_.code.size() + 1);
  std::vector<std::pair<size_t, size_t>> branches;  // pc, flat index
  for (size_t i = 0; i < flat_.code.size(); ++i) {
    pc_of[i] = static_cast<uint32_t>(out_->code.size());
    if (removed[i]) continue;
    in_ = &flat_.code[i].in;
    if (!flat_.code[i].targets.empty()) branches.emplace_back(out_->code.size(), i);
    try {
      instruction();
    } catch (const std::out_of_range&) {
      refuse("has too few operands");
    }
  }
  pc_of[flat_.code.size()] = static_cast<uint32_t>(out_->code.size());
  Instruction exit;
  exit.op = "exit";
  exit.line = flat_.code.empty() ? 0 : flat_.code.back().in.line;
  in_ = &exit;
  instruction();
  for (auto [pc, flat] : branches) {
    Inst& inst = out_->code[pc];
    const auto& targets = flat_.code[flat].targets;
    inst.target = pc_of[targets[0]];
    if (flat_.code[flat].in.op == "brx") {
      std::vector<uint32_t> table;
      for (size_t t : targets) table.push_back(pc_of[t]);
      inst.imm = static_cast<int64_t>(out_->branch_tables.size());
      out_->branch_tables.push_back(std::move(table));
    }
  }
  return std::move(out_);
}

void Decoder::refuse(const std::string& why) const {
  throw PtxError(in_->line, "'" + text() + "' " + why + " (kernel " + flat_.name + ")");
}

std::string Decoder::text() const {
  std::string s = in_->op;
  for (const auto& m : in_->mods) s += "." + m;
  return s;
}

void Decoder::instruction() {
  scratch_used_ = 0;
  static const std::map<std::string, void (Decoder::*)()> table = {{"add", &Decoder::arithmetic},
                                                                   {"sub", &Decoder::arithmetic},
                                                                   {"mul", &Decoder::multiply},
                                                                   {"mul24", &Decoder::multiply24},
                                                                   {"mad24", &Decoder::multiply24},
                                                                   {"mad", &Decoder::multiply_add},
                                                                   {"fma", &Decoder::fused},
                                                                   {"addc", &Decoder::with_carry},
                                                                   {"subc", &Decoder::with_carry},
                                                                   {"madc", &Decoder::multiply_add},
                                                                   {"div", &Decoder::divide},
                                                                   {"rem", &Decoder::typed_binary},
                                                                   {"min", &Decoder::min_max},
                                                                   {"max", &Decoder::min_max},
                                                                   {"abs", &Decoder::sign},
                                                                   {"neg", &Decoder::sign},
                                                                   {"sad", &Decoder::typed_ternary},
                                                                   {"popc", &Decoder::count_bits},
                                                                   {"clz", &Decoder::count_bits},
                                                                   {"bfind", &Decoder::count_bits},
                                                                   {"brev", &Decoder::bitwise},
                                                                   {"and", &Decoder::bitwise},
                                                                   {"or", &Decoder::bitwise},
                                                                   {"xor", &Decoder::bitwise},
                                                                   {"not", &Decoder::bitwise},
                                                                   {"cnot", &Decoder::bitwise},
                                                                   {"shl", &Decoder::shift},
                                                                   {"shr", &Decoder::shift},
                                                                   {"shf", &Decoder::funnel},
                                                                   {"bfe", &Decoder::bit_field},
                                                                   {"bfi", &Decoder::bit_field},
                                                                   {"lop3", &Decoder::lop3},
                                                                   {"prmt", &Decoder::permute},
                                                                   {"dp4a", &Decoder::dot},
                                                                   {"dp2a", &Decoder::dot},
                                                                   {"setp", &Decoder::compare},
                                                                   {"set", &Decoder::compare},
                                                                   {"selp", &Decoder::select},
                                                                   {"slct", &Decoder::select_sign},
                                                                   {"testp", &Decoder::test_float},
                                                                   {"copysign", &Decoder::copysign},
                                                                   {"rcp", &Decoder::special_function},
                                                                   {"sqrt", &Decoder::special_function},
                                                                   {"rsqrt", &Decoder::special_function},
                                                                   {"ex2", &Decoder::special_function},
                                                                   {"lg2", &Decoder::special_function},
                                                                   {"sin", &Decoder::special_function},
                                                                   {"cos", &Decoder::special_function},
                                                                   {"tanh", &Decoder::special_function},
                                                                   {"mov", &Decoder::move},
                                                                   {"cvta", &Decoder::cvta},
                                                                   {"isspacep", &Decoder::isspacep},
                                                                   {"cvt", &Decoder::convert},
                                                                   {"ld", &Decoder::load},
                                                                   {"ldu", &Decoder::load},
                                                                   {"st", &Decoder::store},
                                                                   {"prefetch", &Decoder::nothing},
                                                                   {"prefetchu", &Decoder::nothing},
                                                                   {"createpolicy", &Decoder::policy},
                                                                   {"discard", &Decoder::nothing},
                                                                   {"applypriority", &Decoder::nothing},
                                                                   {"griddepcontrol", &Decoder::nothing},
                                                                   {"bra", &Decoder::branch},
                                                                   {"brx", &Decoder::branch},
                                                                   {"ret", &Decoder::leave},
                                                                   {"exit", &Decoder::leave},
                                                                   {"trap", &Decoder::leave},
                                                                   {"brkpt", &Decoder::leave},
                                                                   {"call", &Decoder::call},
                                                                   {"nanosleep", &Decoder::sleep},
                                                                   {"pmevent", &Decoder::nothing},
                                                                   {"bar", &Decoder::barrier},
                                                                   {"barrier", &Decoder::barrier},
                                                                   {"membar", &Decoder::fence},
                                                                   {"fence", &Decoder::fence},
                                                                   {"vote", &Decoder::vote},
                                                                   {"match", &Decoder::match},
                                                                   {"redux", &Decoder::redux},
                                                                   {"activemask", &Decoder::activemask},
                                                                   {"elect", &Decoder::elect},
                                                                   {"shfl", &Decoder::shuffle},
                                                                   {"atom", &Decoder::atomic},
                                                                   {"red", &Decoder::atomic},
                                                                   {"cp", &Decoder::copy},
                                                                   {"mbarrier", &Decoder::mbarrier},
                                                                   {"ldmatrix", &Decoder::ldmatrix},
                                                                   {"stmatrix", &Decoder::ldmatrix},
                                                                   {"movmatrix", &Decoder::movmatrix},
                                                                   {"mma", &Decoder::mma},
                                                                   {"bmsk", &Decoder::bmsk},
                                                                   {"szext", &Decoder::bmsk}};
  const auto it = table.find(in_->op);
  if (it == table.end()) refuse("is not simulated");
  (this->*it->second)();
}

std::unique_ptr<Program> decode(std::shared_ptr<const Module> module, const Function& entry,
                                const std::map<std::string, uint64_t>& globals) {
  return Decoder(std::move(module), entry, globals).run();
}

std::string Program::where(uint32_t pc) const {
  if (pc >= debug.size()) return "";
  const DebugLine& d = debug[pc];
  std::string text = module->line_text(d.line);
  const size_t first = text.find_first_not_of(" \t");
  text = first == std::string::npos ? "" : text.substr(first);
  std::replace(text.begin(), text.end(), '\t', ' ');
  std::string out = "PTX line " + std::to_string(d.line) + ": " + text;
  auto file = [&](int index) {
    const auto it = module->files.find(index);
    return it == module->files.end() ? std::string("?") : it->second;
  };
  if (d.source.line != 0) out += "\n      at " + file(d.source.file) + ":" + std::to_string(d.source.line);
  if (d.source.outer_line != 0)
    out += ", inlined at " + file(d.source.outer_file) + ":" + std::to_string(d.source.outer_line);
  return out;
}

}  // namespace ptxsim
