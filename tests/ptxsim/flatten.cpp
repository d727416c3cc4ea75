// SPDX-License-Identifier: Apache-2.0
#include "flatten.h"

#include <algorithm>
#include <set>

#include "ptx_error.h"

namespace ptxsim {
namespace {

uint64_t round_up(uint64_t value, uint64_t to) {
  return to == 0 ? value : (value + to - 1) / to * to;
}

class Flattener {
 public:
  Flattener(const Module& module, const Function& entry) : module_(module), entry_(entry) {}

  FlatKernel run() {
    out_.name = entry_.name;
    out_.max_threads = entry_.max_threads;
    uint64_t offset = 0;
    for (const Variable& p : entry_.params) {
      offset = round_up(offset, p.align);
      const Placed placed{Space::Param, offset, p.bytes};
      out_.params.push_back(placed);
      out_.variables[p.name] = placed;
      offset += p.bytes;
    }
    out_.params_bytes = offset;
    append(entry_, {});
    place_module_shared();
    for (const Placed* placed : dynamic_shared_)
      out_.static_shared_bytes = round_up(out_.static_shared_bytes, placed->bytes);
    for (Placed* placed : dynamic_shared_) *placed = {Space::Shared, out_.static_shared_bytes, 0};
    return std::move(out_);
  }

 private:
  using Names = std::map<std::string, std::string>;

  void append(const Function& f, const Names& rename) {
    if (!active_.insert(f.name).second) throw PtxError(0, "recursion in '" + f.name + "' is not simulated");
    for (const Variable& v : f.variables) place(v);
    const int first_register = static_cast<int>(out_.registers.size());
    out_.registers.insert(out_.registers.end(), f.registers.begin(), f.registers.end());
    const bool inlined = &f != &entry_;

    std::vector<size_t> position(f.body.size() + 1);  // old index -> new index
    std::vector<size_t> branches, returns;
    for (size_t i = 0; i < f.body.size(); ++i) {
      position[i] = out_.code.size();
      Instruction in = f.body[i];
      if (in.guard >= 0) in.guard += first_register;
      for (Operand& o : in.operands) renumber(o, first_register, rename);
      if (in.op == "call" && !builtin(in.operands[1].name)) {
        if (in.guard >= 0) throw PtxError(in.line, "a predicated call is not simulated");
        call(in);
        continue;
      }
      if (in.op == "bra" || in.op == "brx") branches.push_back(out_.code.size());
      if (in.op == "ret" && inlined) returns.push_back(out_.code.size());
      out_.code.push_back({std::move(in), {}});
    }
    position[f.body.size()] = out_.code.size();
    for (size_t b : branches) resolve(f, out_.code[b], position);
    for (size_t r : returns) {
      out_.code[r].in.op = "bra";
      out_.code[r].targets = {out_.code.size()};
    }
    active_.erase(f.name);
  }

  static bool builtin(const std::string& name) { return name == "vprintf" || name == "__assertfail"; }

  void call(const Instruction& in) {
    const auto callee = module_.functions.find(in.operands[1].name);
    if (callee == module_.functions.end() || !callee->second.has_body)
      throw PtxError(in.line, "call of '" + in.operands[1].name + "', which is not defined in this module");
    Names rename;
    auto bind = [&](const std::vector<Variable>& formal, const std::vector<Operand>& actual) {
      if (formal.size() != actual.size())
        throw PtxError(in.line, "a call with the wrong number of arguments");
      for (size_t i = 0; i < formal.size(); ++i) {
        if (actual[i].kind != Operand::Kind::Symbol)
          throw PtxError(in.line, "a call argument outside .param space");
        rename[formal[i].name] = actual[i].name;
      }
    };
    bind(callee->second.results, in.operands[0].parts);
    bind(callee->second.params, in.operands[2].parts);
    append(callee->second, rename);
  }

  void resolve(const Function& f, FlatInstruction& branch, const std::vector<size_t>& position) {
    auto target = [&](const std::string& label) {
      const auto it = f.labels.find(label);
      if (it == f.labels.end()) throw PtxError(branch.in.line, "unknown label '" + label + "'");
      return position[it->second];
    };
    if (branch.in.op == "bra") {
      branch.targets = {target(branch.in.operands.at(0).name)};
      branch.in.operands.clear();
      return;
    }
    const auto list = f.branch_targets.find(branch.in.operands.at(1).name);
    if (list == f.branch_targets.end()) throw PtxError(branch.in.line, "brx.idx without .branchtargets");
    for (const auto& label : list->second) branch.targets.push_back(target(label));
    branch.in.operands.resize(1);
  }

  void renumber(Operand& o, int first_register, const Names& rename) {
    if (o.reg >= 0) o.reg += first_register;
    if (!o.name.empty()) {
      if (const auto it = rename.find(o.name); it != rename.end()) o.name = it->second;
      used_.insert(o.name);
    }
    for (Operand& part : o.parts) renumber(part, first_register, rename);
  }

  void place(const Variable& v) {
    if (out_.variables.count(v.name)) return;
    if (v.space == Space::Shared && v.is_extern && v.bytes == 0) {
      // `bytes` is the alignment until all static variables are placed.
      dynamic_shared_.push_back(
          &(out_.variables[v.name] = {Space::Shared, 0, std::max<uint64_t>(v.align, 16)}));
      return;
    }
    const bool shared = v.space == Space::Shared;
    if (!shared && v.space != Space::Local && v.space != Space::Param)
      throw PtxError(0, "a global variable inside a function is not simulated");
    uint64_t& end = shared ? out_.static_shared_bytes : out_.local_bytes;
    end = round_up(end, std::max<uint64_t>(v.align, v.space == Space::Param ? 8 : 1));
    out_.variables[v.name] = {shared ? Space::Shared : Space::Local, end, v.bytes};
    end += v.bytes;
  }

  // Dynamic shared memory begins after the static variables of the kernel and of all it calls.
  void place_module_shared() {
    for (const Variable& v : module_.variables)
      if (v.space == Space::Shared && used_.count(v.name)) place(v);
    out_.static_shared_bytes = round_up(out_.static_shared_bytes, 16);
  }

  const Module& module_;
  const Function& entry_;
  FlatKernel out_;
  std::set<std::string> active_, used_;
  std::vector<Placed*> dynamic_shared_;
};

}  // namespace

FlatKernel flatten(const Module& module, const Function& entry) {
  return Flattener(module, entry).run();
}

}  // namespace ptxsim
