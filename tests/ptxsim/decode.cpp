// SPDX-License-Identifier: Apache-2.0
// Turns each PTX instruction into a handler and the places of its operands. What has no handler is refused
// here.
#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

#include "atomics.h"
#include "memory.h"
#include "program.h"
#include "ptx_error.h"
#include "register_allocation.h"

namespace ptxsim {
namespace {

using Kind = Operand::Kind;
constexpr uint16_t kNoPredicate = 0xffff;

int bits_of(const std::string& type) {
  if (type == "pred") return 1;
  if (type == "f16x2" || type == "bf16x2" || type == "u16x2" || type == "s16x2" || type == "tf32") return 32;
  if (type == "f16" || type == "bf16") return 16;
  if (type.size() >= 2 && (type[0] == 'u' || type[0] == 's' || type[0] == 'b' || type[0] == 'f')) {
    const std::string digits = type.substr(1);
    for (const char* known : {"8", "16", "32", "64", "128"})
      if (digits == known) return std::stoi(digits);
  }
  return 0;
}
bool is_float(const std::string& t) {
  return t == "f32" || t == "f64" || t == "f16" || t == "bf16";
}

const std::map<std::string, SpecialRegister>& special_registers() {
  using S = SpecialRegister;
  static const std::map<std::string, SpecialRegister> map = {
      {"%ntid.x", S::NtidX},
      {"%ntid.y", S::NtidY},
      {"%ntid.z", S::NtidZ},
      {"%nctaid.x", S::NctaidX},
      {"%nctaid.y", S::NctaidY},
      {"%nctaid.z", S::NctaidZ},
      {"%nwarpid", S::Nwarpid},
      {"%nsmid", S::Nsmid},
      {"%gridid", S::Gridid},
      {"%envreg1", S::Envreg1},
      {"%envreg2", S::Envreg2},
      {"%dynamic_smem_size", S::DynamicSmemSize},
      {"%total_smem_size", S::TotalSmemSize},
      {"%reserved_smem_offset_begin", S::ReservedSmemBegin},
      {"%reserved_smem_offset_end", S::ReservedSmemEnd},
      {"%reserved_smem_offset_cap", S::ReservedSmemCap},
      {"%reserved_smem_offset_0", S::ReservedSmem0},
      {"%reserved_smem_offset_1", S::ReservedSmem1},
      {"%laneid", S::LaneId},
      {"%lanemask_eq", S::LanemaskEq},
      {"%lanemask_le", S::LanemaskLe},
      {"%lanemask_lt", S::LanemaskLt},
      {"%lanemask_ge", S::LanemaskGe},
      {"%lanemask_gt", S::LanemaskGt},
      {"%ctaid.x", S::CtaidX},
      {"%ctaid.y", S::CtaidY},
      {"%ctaid.z", S::CtaidZ},
      {"%smid", S::Smid},
      {"%tid.x", S::TidX},
      {"%tid.y", S::TidY},
      {"%tid.z", S::TidZ},
      {"%warpid", S::Warpid},
      {"%cluster_ctarank", S::Zero},
      {"%cluster_ctaid.x", S::Zero},
      {"%cluster_ctaid.y", S::Zero},
      {"%cluster_ctaid.z", S::Zero},
      {"%cluster_nctarank", S::One},
      {"%cluster_nctaid.x", S::One},
      {"%cluster_nctaid.y", S::One},
      {"%cluster_nctaid.z", S::One}};
  return map;
}

class Decoder {
 public:
  Decoder(std::shared_ptr<const Module> module, const Function& entry,
          const std::map<std::string, uint64_t>& globals)
      : globals_(globals), flat_(flatten(*module, entry)), out_(std::make_unique<Program>()) {
    out_->module = std::move(module);
  }

  std::unique_ptr<Program> run() {
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

 private:
  [[noreturn]] void refuse(const std::string& why) const {
    throw PtxError(in_->line, "'" + text() + "' " + why + " (kernel " + flat_.name + ")");
  }
  std::string text() const {
    std::string s = in_->op;
    for (const auto& m : in_->mods) s += "." + m;
    return s;
  }

  // ---- constants
  uint16_t constant_units(int bits) {
    const size_t at = out_->constants.size();
    out_->constants.resize(at + static_cast<size_t>(bits) / 16 * 64);
    if (at / 64 >= kConstantBit) throw PtxError(0, "the kernel has too many constants");
    return static_cast<uint16_t>(at / 64 | kConstantBit);
  }
  uint16_t constant(uint64_t bits, int width) {
    if (width < 64) bits &= (1ull << width) - 1;
    auto [it, fresh] = constants_.try_emplace({bits, width}, 0);
    if (fresh) {
      it->second = constant_units(width);
      uint8_t* at = out_->constants.data() + (it->second & 0x7fff) * 64;
      for (int l = 0; l < kLanes; ++l) std::memcpy(at + l * width / 8, &bits, static_cast<size_t>(width) / 8);
    }
    return it->second;
  }
  uint16_t param_constant(uint64_t offset, int bits) {
    auto [it, fresh] = param_units_.try_emplace({offset, bits}, 0);
    if (fresh) {
      it->second = constant_units(bits);
      out_->launch_constants.push_back({it->second & 0x7fffu, true, offset, bits, SpecialRegister::Zero});
    }
    return it->second;
  }
  // Unit of a special register; those of blocks and warps are numbered from 0 until the register count is
  // known.
  uint16_t special_unit(const std::string& name) {
    const auto known = special_registers().find(name);
    if (known == special_registers().end()) refuse("reads " + name + ", which is not simulated");
    const SpecialRegister s = known->second;
    auto [it, fresh] = special_units_.try_emplace(s, 0);
    if (fresh) {
      if (is_launch_constant(s)) {
        it->second = constant_units(32);
        out_->launch_constants.push_back({it->second & 0x7fffu, false, 0, 32, s});
      } else {
        it->second = static_cast<uint16_t>(out_->warp_specials.size() * 2);
        out_->warp_specials.push_back({it->second, s});
      }
    }
    return it->second;
  }
  static bool is_clock(const std::string& name) {
    return name == "%clock" || name == "%clock_hi" || name == "%clock64" || name == "%globaltimer" ||
           name == "%globaltimer_lo";
  }

  // A register written once, by a move of something constant, is replaced by that constant. Returns the
  // instructions this removes.
  std::vector<bool> fold_constants() {
    std::vector<int> writers(flat_.registers.size(), 0);
    for (const auto& f : flat_.code) {
      in_ = &f.in;
      for (int r : register_use(f.in).writes) ++writers[static_cast<size_t>(r)];
      collect_specials(f.in);
    }
    std::vector<bool> removed(flat_.code.size(), false);
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t i = 0; i < flat_.code.size(); ++i) {
        in_ = &flat_.code[i].in;
        if (removed[i] || in_->guard >= 0 || in_->operands.size() != 2 ||
            in_->operands[0].kind != Kind::Register)
          continue;
        const size_t r = static_cast<size_t>(in_->operands[0].reg);
        if (writers[r] != 1) continue;
        const int unit = constant_value(flat_.registers[r].bits);
        if (unit < 0) continue;
        constant_[r] = true;
        unit_of_[r] = unit;
        removed[i] = changed = true;
      }
    }
    return removed;
  }
  void collect_specials(const Instruction& in) {
    for (const Operand& o : in.operands)
      if (o.kind == Kind::Special && !is_clock(o.name) && o.name != "%pm0") special_unit(o.name);
  }
  int constant_value(int bits) {
    const Operand& from = in_->operands[1];
    if (bits != 16 && bits != 32 && bits != 64) return -1;
    if (in_->op == "mov" && in_->mods.size() == 1 && bits_of(in_->mods[0]) == bits) {
      if (from.kind == Kind::Immediate) return constant(immediate_bits(from, in_->mods[0]), bits);
      if (from.kind == Kind::Symbol) return constant(symbol(from).second, bits);
      if (from.kind == Kind::Special && bits == 32 && !is_clock(from.name)) {
        const SpecialRegister s = special_registers().at(from.name);
        return is_launch_constant(s) ? special_unit(from.name) : -1;
      }
    }
    const bool moves = in_->op == "mov" || (in_->op == "cvta" && in_->has("to") && in_->has("global"));
    if (moves && from.kind == Kind::Register && constant_[static_cast<size_t>(from.reg)] &&
        flat_.registers[static_cast<size_t>(from.reg)].bits == bits)
      return unit_of_[static_cast<size_t>(from.reg)];
    if (in_->op == "ld" && in_->has("param") && from.kind == Kind::Address && from.reg < 0 &&
        !in_->mods.empty() && bits_of(in_->mods.back()) == bits) {
      const auto it = flat_.variables.find(from.name);
      if (it == flat_.variables.end() || it->second.space != Space::Param) return -1;
      const uint64_t offset = it->second.offset + static_cast<uint64_t>(from.offset);
      if (offset + static_cast<uint64_t>(bits) / 8 > flat_.params_bytes) return -1;
      return param_constant(offset, bits);
    }
    return -1;
  }

  // ---- operands
  std::pair<Space, uint64_t> symbol(const Operand& o) const {
    if (const auto it = flat_.variables.find(o.name); it != flat_.variables.end())
      return {it->second.space, it->second.offset + static_cast<uint64_t>(o.offset)};
    if (const auto it = globals_.find(o.name); it != globals_.end())
      return {Space::Global, it->second + static_cast<uint64_t>(o.offset)};
    refuse("names the unknown symbol " + o.name);
  }
  static uint64_t immediate_bits(const Operand& o, const std::string& type) {
    if (type == "f32" && o.is_double) {  // a decimal literal
      const float f = static_cast<float>(std::bit_cast<double>(o.bits));
      return std::bit_cast<uint32_t>(f);
    }
    if (type == "f64" && o.is_single) {
      const double d = std::bit_cast<float>(static_cast<uint32_t>(o.bits));
      return std::bit_cast<uint64_t>(d);
    }
    return o.bits;
  }
  int register_bits(const Operand& o) const {
    return o.kind == Kind::Register ? flat_.registers[static_cast<size_t>(o.reg)].bits : 0;
  }
  uint16_t register_unit(int reg) const { return static_cast<uint16_t>(unit_of_[static_cast<size_t>(reg)]); }

  // A source of `type`.
  uint16_t source(const Operand& o, const std::string& type) {
    const int bits = std::max(bits_of(type), 16);
    switch (o.kind) {
      case Kind::Register: {
        if (o.negated) refuse("negates an operand that is not a predicate");
        const int have = std::max(register_bits(o), 16);
        if (have != bits)
          refuse("has a " + std::to_string(have) + "-bit register where " + type + " is expected");
        if (unit_of_[static_cast<size_t>(o.reg)] < 0) return zero_;
        return register_unit(o.reg);
      }
      case Kind::Immediate:
        return constant(immediate_bits(o, type), bits);
      case Kind::Symbol:
        return constant(symbol(o).second, bits);
      case Kind::Special: {
        if (is_clock(o.name)) refuse("reads a clock other than by mov");
        const uint16_t unit = special_unit(o.name);
        if (bits == 32) return unit & kConstantBit ? unit : static_cast<uint16_t>(unit + first_special_);
        // a wider or narrower read: extend through the scratch registers
        const uint16_t at = scratch(bits == 64 ? 4 : 1);
        Inst& x = emit(bits == 64 ? "ext.64.u32" : "ext.16.u32");
        x.r[0] = at;
        x.r[1] = unit & kConstantBit ? unit : static_cast<uint16_t>(unit + first_special_);
        return at;
      }
      default:
        refuse("has an operand of an unexpected kind");
    }
  }
  uint16_t destination(const Operand& o, const std::string& type) {
    if (o.kind == Kind::Sink) return scratch_;
    if (o.kind != Kind::Register) refuse("writes to something that is no register");
    const int bits = std::max(bits_of(type), 16), have = std::max(register_bits(o), 16);
    if (have != bits)
      refuse("has a " + std::to_string(have) + "-bit register where " + type + " is expected");
    return register_unit(o.reg);
  }
  uint16_t any_register(const Operand& o) const {
    if (o.kind == Kind::Sink) return scratch_;
    if (o.kind != Kind::Register) refuse("needs a register here");
    return register_unit(o.reg);
  }
  uint16_t predicate(const Operand& o) const {
    if (o.kind == Kind::Sink) return scratch_predicate_;
    if (o.kind != Kind::Register || register_bits(o) != 1) refuse("needs a predicate here");
    return unit_of_[static_cast<size_t>(o.reg)] < 0 ? scratch_predicate_ : register_unit(o.reg);
  }
  // Scratch registers live within one PTX instruction.
  uint16_t scratch(uint16_t units) {
    const uint16_t at = static_cast<uint16_t>(scratch_ + 4 + scratch_used_);
    scratch_used_ = static_cast<uint16_t>(scratch_used_ + units);
    if (scratch_used_ > 12) refuse("needs too many scratch registers");
    return at;
  }

  Inst& emit(const std::string& key, InstClass cls = InstClass::Other) {
    const Handler handler = find_handler(key);
    if (handler == nullptr) refuse("is not simulated [no handler " + key + "]");
    Inst inst;
    inst.fn = handler;
    inst.cls = cls;
    if (in_->guard >= 0)
      inst.guard = static_cast<uint16_t>((register_unit(in_->guard) + 1) | (in_->guard_negated ? 0x8000 : 0));
    out_->code.push_back(inst);
    out_->debug.push_back({in_->line, in_->source});
    return out_->code.back();
  }

  // The usual shape: one result, all sources of one type.
  void simple(const std::string& key, const std::string& type, InstClass cls, size_t sources) {
    uint16_t r[4] = {};
    for (size_t s = 0; s < sources; ++s) r[s + 1] = source(op(s + 1), type);
    Inst& inst = emit(key, cls);
    inst.r[0] = destination(op(0), type);
    for (size_t s = 1; s <= sources; ++s) inst.r[s] = r[s];
  }
  const Operand& op(size_t i) const { return in_->operands.at(i); }
  const std::string& last_type() const {
    if (in_->mods.empty() || (bits_of(in_->mods.back()) == 0)) refuse("has no type");
    return in_->mods.back();
  }
  // The types among the modifiers, in order.
  std::vector<std::string> types() const {
    std::vector<std::string> out;
    for (const auto& m : in_->mods)
      if (bits_of(m) != 0 || m == "e4m3" || m == "e5m2" || m == "e4m3x2" || m == "e5m2x2") out.push_back(m);
    return out;
  }
  // Refuses modifiers outside `known` (types are always known), so that nothing is silently ignored.
  void only(std::initializer_list<const char*> known) const {
    for (const auto& m : in_->mods) {
      if (bits_of(m) != 0) continue;
      if (std::none_of(known.begin(), known.end(), [&](const char* k) { return m == k; }))
        refuse("has the unknown modifier ." + m);
    }
  }
  static InstClass float_class(const std::string& t) {
    return t == "f32" ? InstClass::Float : t == "f64" ? InstClass::Double : InstClass::Half;
  }
  static bool is_half(const std::string& t) {
    return t == "f16" || t == "bf16" || t == "f16x2" || t == "bf16x2";
  }
  static std::string width(const std::string& type) { return std::to_string(bits_of(type)); }

  // ---- instructions
  void instruction() {
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

  // "add" + rounding (rn is the default) + ftz + sat + type
  std::string float_key(const std::string& op, const std::string& type) const {
    std::string key = op;
    for (const char* m : {"rz", "rm", "rp", "ftz", "sat", "relu", "NaN", "xorsign"})
      if (in_->has(m)) key += std::string(".") + m;
    return key + "." + type;
  }

  void arithmetic() {  // add, sub
    const std::string& t = last_type();
    only({"rn", "rz", "rm", "rp", "ftz", "sat", "cc"});
    if (in_->has("cc")) return with_carry();
    if (is_float(t) || is_half(t)) return simple(float_key(in_->op, t), t, float_class(t), 2);
    if (in_->has("sat")) return simple(in_->op + ".sat." + t, t, InstClass::Integer, 2);
    if (t == "u16x2" || t == "s16x2") return simple(in_->op + ".16x2", t, InstClass::Integer, 2);
    simple(in_->op + "." + width(t), t, InstClass::Integer, 2);
  }

  void with_carry() {  // add.cc, addc, sub.cc, subc
    const std::string& t = last_type();
    only({"cc"});
    const bool reads = in_->op == "addc" || in_->op == "subc";
    const std::string base = in_->op.substr(0, 3);
    uint16_t a = source(op(1), t), b = source(op(2), t);
    Inst& inst = emit(base + ".carry." + width(t), InstClass::Integer);
    inst.aux = (reads ? 1u : 0u) | (in_->has("cc") ? 2u : 0u);
    inst.r[0] = destination(op(0), t);
    inst.r[1] = a;
    inst.r[2] = b;
    inst.r[4] = carry_;
  }

  void multiply() {
    const std::string& t = last_type();
    if (is_float(t) || is_half(t)) {
      only({"rn", "rz", "rm", "rp", "ftz", "sat"});
      return simple(float_key("mul", t), t, float_class(t), 2);
    }
    only({"lo", "hi", "wide"});
    if (in_->has("wide")) return wide("mul.wide." + t, t, 2);
    if (in_->has("hi")) return simple("mul.hi." + t, t, InstClass::Integer, 2);
    simple("mul.lo." + width(t), t, InstClass::Integer, 2);
  }
  void wide(const std::string& key, const std::string& t, size_t narrow) {
    const std::string big = "b" + std::to_string(2 * bits_of(t));
    uint16_t r[4] = {};
    for (size_t s = 1; s <= narrow; ++s) r[s] = source(op(s), t);
    if (in_->operands.size() > narrow + 1) r[narrow + 1] = source(op(narrow + 1), big);
    Inst& inst = emit(key, InstClass::Integer);
    inst.r[0] = destination(op(0), big);
    for (int s = 1; s < 4; ++s) inst.r[s] = r[s];
  }
  void multiply24() {
    const std::string& t = last_type();
    only({"lo"});
    if (!in_->has("lo")) refuse("is not simulated");
    simple(in_->op + ".lo." + t, t, InstClass::Integer, in_->op == "mul24" ? 2 : 3);
  }
  void multiply_add() {  // mad, madc
    const std::string& t = last_type();
    if (is_float(t)) return fused();
    only({"lo", "hi", "wide", "cc"});
    if (in_->has("wide")) return wide("mad.wide." + t, t, 2);
    if (in_->op == "madc" || in_->has("cc")) {
      uint16_t r[4] = {0, source(op(1), t), source(op(2), t), source(op(3), t)};
      Inst& inst = emit(std::string("mad.carry.") + (in_->has("hi") ? "hi." + t : "lo." + width(t)),
                        InstClass::Integer);
      inst.aux = (in_->op == "madc" ? 1u : 0u) | (in_->has("cc") ? 2u : 0u);
      inst.r[0] = destination(op(0), t);
      for (int s = 1; s < 4; ++s) inst.r[s] = r[s];
      inst.r[4] = carry_;
      return;
    }
    simple(in_->has("hi") ? "mad.hi." + t : "mad.lo." + width(t), t, InstClass::Integer, 3);
  }
  void fused() {
    const std::string& t = last_type();
    only({"rn", "rz", "rm", "rp", "ftz", "sat", "relu"});
    simple(float_key("fma", t), t, float_class(t), 3);
  }
  void divide() {
    const std::string& t = last_type();
    if (!is_float(t)) return typed_binary();
    only({"rn", "rz", "rm", "rp", "ftz", "approx", "full"});
    simple(float_key("div", t), t, float_class(t), 2);
  }
  void typed_binary() {
    only({});
    simple(in_->op + "." + last_type(), last_type(), InstClass::Integer, 2);
  }
  void typed_ternary() {
    only({});
    simple(in_->op + "." + last_type(), last_type(), InstClass::Integer, 3);
  }
  void min_max() {
    const std::string& t = last_type();
    only({"ftz", "NaN", "relu", "xorsign", "abs"});
    if (in_->has("abs") || in_->has("relu")) refuse("is not simulated");
    if (is_float(t) || is_half(t)) {
      if (in_->operands.size() == 4) {  // three-input form of newer targets
        const uint16_t a = source(op(1), t), b = source(op(2), t), c = source(op(3), t), mid = scratch(2);
        Inst& first = emit(float_key(in_->op, t), float_class(t));
        first.r[0] = mid, first.r[1] = a, first.r[2] = b;
        Inst& second = emit(float_key(in_->op, t), float_class(t));
        second.r[0] = destination(op(0), t), second.r[1] = mid, second.r[2] = c;
        return;
      }
      return simple(float_key(in_->op, t), t, float_class(t), 2);
    }
    simple(in_->op + "." + t, t, InstClass::Integer, 2);
  }
  void sign() {  // abs, neg
    const std::string& t = last_type();
    only({"ftz"});
    if (is_float(t) || is_half(t)) return simple(float_key(in_->op, t), t, float_class(t), 1);
    simple(in_->op + "." + t, t, InstClass::Integer, 1);
  }
  void count_bits() {  // popc, clz, bfind: the result has 32 bits
    const std::string& t = last_type();
    only({"shiftamt"});
    const uint16_t a = source(op(1), t);
    std::string key =
        in_->op + (in_->has("shiftamt") ? ".shiftamt." : ".") + (in_->op == "bfind" ? t : width(t));
    Inst& inst = emit(key, InstClass::Integer);
    inst.r[0] = destination(op(0), "u32");
    inst.r[1] = a;
  }
  void bitwise() {
    const std::string& t = last_type();
    only({});
    const bool unary = in_->op == "not" || in_->op == "cnot" || in_->op == "brev";
    if (t == "pred") {
      Inst& inst = emit(in_->op + ".pred", InstClass::Integer);
      inst.r[0] = predicate(op(0));
      inst.r[1] = predicate(op(1));
      inst.aux = op(1).negated;
      if (!unary) {
        inst.r[2] = predicate(op(2));
        inst.aux |= op(2).negated ? 2 : 0;
      }
      return;
    }
    simple(in_->op + "." + width(t), t, InstClass::Integer, unary ? 1 : 2);
  }
  void shift() {
    const std::string& t = last_type();
    only({});
    const uint16_t a = source(op(1), t), by = source(op(2), "u32");
    Inst& inst =
        emit(in_->op == "shl" ? "shl." + width(t) : "shr." + std::string(t[0] == 's' ? "s" : "u") + width(t),
             InstClass::Integer);
    inst.r[0] = destination(op(0), t);
    inst.r[1] = a;
    inst.r[2] = by;
  }
  void funnel() {
    only({"l", "r", "wrap", "clamp"});
    simple(std::string("shf.") + (in_->has("l") ? "l" : "r") + (in_->has("wrap") ? ".wrap" : ".clamp"), "b32",
           InstClass::Integer, 3);
  }
  void bit_field() {
    const std::string& t = last_type();
    only({});
    const bool insert = in_->op == "bfi";
    uint16_t r[5] = {};
    for (size_t s = 1; s <= (insert ? 4u : 3u); ++s)
      r[s] = source(op(s), s <= (insert ? 2u : 1u) ? t : "u32");
    Inst& inst = emit(in_->op + "." + (insert ? width(t) : t), InstClass::Integer);
    inst.r[0] = destination(op(0), t);
    for (int s = 1; s < 5; ++s) inst.r[s] = r[s];
  }
  void lop3() {
    only({"or", "and"});
    const bool with_predicate = op(0).kind == Kind::Vector;
    if (with_predicate != (in_->has("or") || in_->has("and"))) refuse("is not simulated in this form");
    const uint16_t a = source(op(1), "b32"), b = source(op(2), "b32"), c = source(op(3), "b32");
    Inst& inst = emit("lop3", InstClass::Integer);
    inst.r[0] = destination(with_predicate ? op(0).parts[0] : op(0), "b32");
    inst.r[1] = a, inst.r[2] = b, inst.r[3] = c;
    inst.imm = static_cast<int64_t>(op(4).bits & 0xff);
    if (with_predicate) {
      const uint16_t result = inst.r[0];
      Inst& test = emit("lop3.test", InstClass::Integer);
      test.r[0] = predicate(op(0).parts[1]);
      test.r[1] = result;
      test.r[2] = predicate(op(5));
      test.aux = (in_->has("and") ? 1u : 0u) | (op(5).negated ? 2u : 0u);
    }
  }
  void permute() {
    std::string key = "prmt";
    only({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
    for (const char* mode : {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"})
      if (in_->has(mode)) key += std::string(".") + mode;
    if (key == "prmt" && op(3).kind == Kind::Immediate) {
      const uint16_t a = source(op(1), "b32"), b = source(op(2), "b32");
      Inst& inst = emit("prmt.imm", InstClass::Integer);
      inst.r[0] = destination(op(0), "b32"), inst.r[1] = a, inst.r[2] = b;
      inst.imm = static_cast<int64_t>(op(3).bits);
      return;
    }
    simple(key, "b32", InstClass::Integer, 3);
  }
  void dot() {
    const auto t = types();
    only({"lo", "hi"});
    std::string key = in_->op;
    if (in_->op == "dp2a") key += in_->has("lo") ? ".lo" : ".hi";
    simple(key + "." + t.at(0) + "." + t.at(1), "b32", InstClass::Integer, 3);
  }
  void bmsk() { refuse("is not simulated"); }

  void compare() {  // setp, set
    const bool to_register = in_->op == "set";
    const auto t = types();
    const std::string type = t.back();
    static const char* const comparisons[] = {"eq", "ne",  "lt",  "le",  "gt",  "ge",  "lo",  "ls",  "hi",
                                              "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
    std::string comparison, boolean;
    bool ftz = false;
    for (const auto& m : in_->mods) {
      if (bits_of(m) != 0) continue;
      const bool is_comparison =
          std::any_of(std::begin(comparisons), std::end(comparisons), [&](const char* c) { return m == c; });
      if (is_comparison && comparison.empty())
        comparison = m;
      else if (m == "and" || m == "or" || m == "xor")
        boolean = m;
      else if (m == "ftz")
        ftz = true;
      else
        refuse("has the unknown modifier ." + m);
    }
    if (comparison == "lo") comparison = "lt";
    if (comparison == "ls") comparison = "le";
    if (comparison == "hi") comparison = "gt";
    if (comparison == "hs") comparison = "ge";
    std::string key_type = type;
    if (type[0] == 'b' && !is_half(type)) key_type = "u" + type.substr(1);
    const uint16_t a = source(op(1), type), b = source(op(2), type);
    const bool packed = type == "f16x2" || type == "bf16x2";
    if (packed && to_register) refuse("is not simulated");
    Inst& inst = emit("setp." + comparison + (ftz ? ".ftz." : ".") + key_type, InstClass::Compare);
    inst.r[1] = a;
    inst.r[2] = b;
    inst.r[3] = kNoPredicate;
    inst.r[4] = kNoPredicate;
    inst.aux = boolean == "and" ? 1 : boolean == "or" ? 2 : boolean == "xor" ? 3 : 0;
    if (!boolean.empty()) {
      inst.r[4] = predicate(op(3));
      if (op(3).negated) inst.aux |= 256;
    }
    if (to_register) {
      inst.r[0] = scratch_predicate_;
      Inst& write = emit(t.front() == "f32"         ? "set.f32"
                         : bits_of(t.front()) == 16 ? "set.16." + t.front()
                                                    : "set.32",
                         InstClass::Compare);
      write.r[0] = destination(op(0), t.front());
      write.r[1] = scratch_predicate_;
    } else if (op(0).kind == Kind::Vector) {
      inst.r[0] = predicate(op(0).parts.at(0));
      inst.r[3] = predicate(op(0).parts.at(1));
    } else {
      inst.r[0] = predicate(op(0));
    }
  }
  void select() {
    const std::string& t = last_type();
    only({});
    const uint16_t a = source(op(1), t), b = source(op(2), t);
    Inst& inst = emit("selp." + width(t), InstClass::Compare);
    inst.r[0] = destination(op(0), t), inst.r[1] = a, inst.r[2] = b;
    inst.r[3] = predicate(op(3));
    inst.aux = op(3).negated;
  }
  void select_sign() {
    const auto t = types();
    only({"ftz"});
    const uint16_t a = source(op(1), t.at(0)), b = source(op(2), t.at(0)), c = source(op(3), t.at(1));
    Inst& inst = emit("slct." + width(t[0]) + "." + t[1], InstClass::Compare);
    inst.r[0] = destination(op(0), t[0]), inst.r[1] = a, inst.r[2] = b, inst.r[3] = c;
  }
  void test_float() {
    const std::string& t = last_type();
    only({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
    const uint16_t a = source(op(1), t);
    Inst& inst = emit("testp." + in_->mods.at(0) + "." + t, InstClass::Compare);
    inst.r[0] = predicate(op(0));
    inst.r[1] = a;
  }
  void copysign() {
    const std::string& t = last_type();
    only({});
    simple("copysign." + t, t, InstClass::Float, 2);
  }
  void special_function() {
    const std::string& t = last_type();
    only({"approx", "rn", "rz", "rm", "rp", "ftz"});
    std::string key = in_->op;
    if (in_->has("approx")) key += ".approx";
    simple(float_key(key, t), t, in_->has("approx") ? InstClass::Special : float_class(t), 1);
  }

  void move() {
    const std::string& t = last_type();
    only({});
    const Operand &to = op(0), &from = op(1);
    if (t == "pred") {
      if (from.kind == Kind::Immediate) {
        Inst& inst = emit("mov.pred.imm", InstClass::Move);
        inst.r[0] = predicate(to);
        inst.imm = from.bits != 0 ? -1 : 0;
        return;
      }
      Inst& inst = emit("mov.pred", InstClass::Move);
      inst.r[0] = predicate(to);
      inst.r[1] = predicate(from);
      inst.aux = from.negated;
      return;
    }
    if (from.kind == Kind::Vector || to.kind == Kind::Vector) {
      const bool pack = from.kind == Kind::Vector;
      const auto& parts = pack ? from.parts : to.parts;
      const int part_bits = parts.empty() ? 0 : bits_of(t) / static_cast<int>(parts.size());
      const std::string part = "b" + std::to_string(part_bits);
      uint16_t r[8] = {};
      for (size_t i = 0; i < parts.size() && i < 8; ++i)
        r[i] = pack                          ? source(parts[i], part)
               : parts[i].kind == Kind::Sink ? scratch(4)
                                             : destination(parts[i], part);
      const uint16_t whole = pack ? destination(to, t) : source(from, t);
      Inst& inst =
          emit((pack ? "pack." : "unpack.") + width(t) + "." + std::to_string(part_bits), InstClass::Move);
      inst.r[0] = whole;
      for (size_t i = 0; i < parts.size(); ++i) inst.r[1 + i] = r[i];
      return;
    }
    if (from.kind == Kind::Special && is_clock(from.name)) {
      Inst& inst = emit("clock." + width(t), InstClass::Move);
      inst.r[0] = destination(to, t);
      return;
    }
    simple("mov." + width(t), t, InstClass::Move, 1);
  }
  void cvta() {
    only({"to", "global", "shared", "local", "const", "param", "shared::cta"});
    const std::string& t = last_type();
    if (bits_of(t) != 64) refuse("is not simulated");
    const uint16_t a = source(op(1), t);
    const bool to = in_->has("to");
    const uint64_t window = in_->has("shared") || in_->has("shared::cta") ? kSharedWindow
                            : in_->has("local")                           ? kLocalWindow
                            : in_->has("param")                           ? kParamWindow
                                                                          : 0;
    Inst& inst = emit(window == 0 ? "mov.64" : to ? "cvta.to" : "cvta", InstClass::Move);
    inst.r[0] = destination(op(0), t);
    inst.r[1] = a;
    inst.imm = static_cast<int64_t>(window);
  }
  void isspacep() {
    only({"global", "shared", "local", "const", "param", "shared::cta", "shared::cluster"});
    const uint16_t a = source(op(1), "u64");
    Inst& inst = emit("isspacep", InstClass::Move);
    inst.r[0] = predicate(op(0));
    inst.r[1] = a;
    const std::string& m = in_->mods.at(0);
    if (m == "const") refuse("is not simulated");
    inst.imm =
        static_cast<int64_t>(m == "shared" || m == "shared::cta" || m == "shared::cluster" ? kSharedWindow
                             : m == "local"                                                ? kLocalWindow
                             : m == "param"                                                ? kParamWindow
                                                                                           : 0);
  }

  // Conversions: to an integer of 32 or 64 bits first where the source is a small integer, and from one where
  // the result is.
  void convert() {
    std::vector<std::string> t;
    uint32_t aux = 0;  // 0-3 rounding rn rz rm rp, 4 ftz, 8 sat, 16 relu, 32 to integral value, 64 satfinite,
                       // 3 bits used for rna: 128
    for (const auto& m : in_->mods) {
      if (bits_of(m) != 0 || m == "e4m3x2" || m == "e5m2x2")
        t.push_back(m);
      else if (m == "rn")
        aux |= 0;
      else if (m == "rz")
        aux |= 1;
      else if (m == "rm")
        aux |= 2;
      else if (m == "rp")
        aux |= 3;
      else if (m == "rna")
        aux |= 128;
      else if (m == "rni")
        aux |= 32;
      else if (m == "rzi")
        aux |= 32 | 1;
      else if (m == "rmi")
        aux |= 32 | 2;
      else if (m == "rpi")
        aux |= 32 | 3;
      else if (m == "ftz")
        aux |= 4;
      else if (m == "sat")
        aux |= 8;
      else if (m == "relu")
        aux |= 16;
      else if (m == "satfinite")
        aux |= 64;
      else
        refuse("has the unknown modifier ." + m);
    }
    if (t.size() != 2) refuse("needs two types");
    const std::string &to = t[0], &from = t[1];
    if (in_->operands.size() == 3) {  // two f32 into one packed pair
      const uint16_t a = source(op(1), "f32"), b = source(op(2), "f32");
      Inst& inst = emit("cvt.pair." + to, InstClass::Convert);
      inst.r[0] = any_register(op(0)), inst.r[1] = a, inst.r[2] = b;
      inst.aux = aux;
      return;
    }
    if (to == "tf32" || to.back() == '2' || from.back() == '2') {
      if (!(to == "tf32" || from == "e4m3x2" || from == "e5m2x2" || to == "e4m3x2" || to == "e5m2x2")) {
        // f32, u32 and the like end in 2 as well
        if (bits_of(to) == 0 || bits_of(from) == 0) refuse("is not simulated");
      } else {
        const uint16_t a = any_source(op(1), to == "tf32"                          ? 32
                                             : from == "f16x2" || from == "bf16x2" ? 32
                                                                                   : 16);
        Inst& inst = emit("cvt." + to + "." + from, InstClass::Convert);
        inst.r[0] = any_register(op(0)), inst.r[1] = a;
        inst.aux = aux;
        return;
      }
    }
    const bool float_in = is_float(from), float_out = is_float(to);
    if (!float_in && !float_out) return integer_to_integer(to, from, (aux & 8) != 0);
    std::string in_type = from;
    uint16_t a;
    if (!float_in && bits_of(from) < 32) {  // widen first
      in_type = from[0] == 's' ? "s32" : "u32";
      a = scratch(2);
      const uint16_t raw = any_source(op(1), bits_of(from));
      Inst& widen = emit("ext.32." + from + source_suffix(op(1), from), InstClass::Convert);
      widen.r[0] = a, widen.r[1] = raw;
    } else {
      a = float_in && bits_of(from) == 16 ? any_source(op(1), 16) : source(op(1), from);
    }
    const bool narrow_out = !float_out && register_bits(op(0)) != bits_of(to);
    const std::string key =
        float_in && float_out && from == to ? "cvt.same." + to : "cvt." + to + "." + in_type;
    if (narrow_out || (!float_out && bits_of(to) < 16)) {  // small results are extended to the register
      const uint16_t wide_result = scratch(4);
      Inst& inst = emit("cvt." + to + "." + in_type, InstClass::Convert);
      inst.r[0] = wide_result, inst.r[1] = a;
      inst.aux = aux;
      Inst& extend = emit("ext." + std::to_string(std::max(register_bits(op(0)), 16)) + "." + to +
                              (bits_of(to) == 8 ? ".in16" : ""),
                          InstClass::Convert);
      extend.r[0] = any_register(op(0)), extend.r[1] = wide_result;
      return;
    }
    Inst& inst = emit(key, InstClass::Convert);
    inst.r[0] = any_register(op(0)), inst.r[1] = a;
    inst.aux = aux;
  }
  // A register of any width at least `bits`, or an immediate.
  uint16_t any_source(const Operand& o, int bits) {
    if (o.kind == Kind::Register) {
      if (register_bits(o) < bits && !(bits == 8 && register_bits(o) >= 8))
        refuse("has a register that is too narrow");
      return unit_of_[static_cast<size_t>(o.reg)] < 0 ? zero_ : register_unit(o.reg);
    }
    return source(o, "b" + std::to_string(std::max(bits, 16)));
  }
  // How a small integer is read: its register may be wider than its type.
  std::string source_suffix(const Operand& o, const std::string& type) const {
    const int have = o.kind == Kind::Register  ? std::max(register_bits(o), 16)
                     : o.kind == Kind::Special ? 32
                                               : std::max(bits_of(type), 16);
    return have == std::max(bits_of(type), 16) && bits_of(type) != 8 ? "" : ".in" + std::to_string(have);
  }
  void integer_to_integer(const std::string& to, const std::string& from, bool saturate) {
    const int have = std::max(register_bits(op(0)), 16);
    uint16_t a = op(1).kind == Kind::Special ? source(op(1), "u32") : any_source(op(1), bits_of(from));
    const std::string from_key = from + source_suffix(op(1), from);
    if (saturate) {
      const uint16_t wide = scratch(4);
      Inst& widen = emit("ext.64." + from_key, InstClass::Convert);
      widen.r[0] = wide, widen.r[1] = a;
      Inst& clamp = emit("clamp." + std::string(from == "u64" ? "u64." : "s64.") + to, InstClass::Convert);
      clamp.r[0] = wide, clamp.r[1] = wide;
      Inst& out = emit("ext." + std::to_string(have) + ".u64", InstClass::Convert);
      out.r[0] = any_register(op(0)), out.r[1] = wide;
      return;
    }
    if (bits_of(to) == have ||
        bits_of(from) < bits_of(to)) {  // one step: the value already fits the result type
      if (bits_of(to) != have && from[0] == 's' && to[0] == 'u') {
        // sign-extended to `to`, then zero-extended: needs both steps
      } else {
        Inst& inst = emit("ext." + std::to_string(have) + "." + from_key, InstClass::Convert);
        inst.r[0] = any_register(op(0)), inst.r[1] = a;
        return;
      }
    }
    const uint16_t wide = scratch(4);
    Inst& widen = emit("ext.64." + from_key, InstClass::Convert);
    widen.r[0] = wide, widen.r[1] = a;
    Inst& out = emit("ext." + std::to_string(have) + "." + to + (bits_of(to) == 64 ? "" : ".in64"),
                     InstClass::Convert);
    out.r[0] = any_register(op(0)), out.r[1] = wide;
  }

  // ---- memory
  Space space_of() const {
    for (const auto& m : in_->mods) {
      if (m == "global") return Space::Global;
      if (m == "shared" || m == "shared::cta") return Space::Shared;
      if (m == "local") return Space::Local;
      if (m == "param" || m == "param::entry" || m == "param::func") return Space::Param;
      if (m == "const") return Space::Const;
    }
    return Space::Generic;
  }
  // Fills imm, r[kAddress] and the space bits for an address operand.
  struct Address {
    int64_t imm = 0;
    uint16_t reg = 0;
    uint32_t aux = 0;
  };
  Address address(const Operand& o, Space space) {
    if (o.kind != Kind::Address) refuse("needs an address here");
    Address a;
    a.imm = o.offset;
    if (!o.name.empty()) {
      Operand base;
      base.name = o.name;
      const auto [symbol_space, offset] = symbol(base);
      const bool matches = space == symbol_space ||
                           (space == Space::Const && symbol_space == Space::Global) ||
                           (space == Space::Param && symbol_space == Space::Local) ||
                           (space == Space::Generic && symbol_space == Space::Global);
      if (!matches) refuse("addresses " + o.name + " in another state space");
      space = symbol_space;
      a.imm += static_cast<int64_t>(offset);
      a.aux |= kNoBase;
    } else if (o.reg < 0) {
      a.aux |= kNoBase;
    } else {
      a.reg = register_unit(o.reg);
      if (unit_of_[static_cast<size_t>(o.reg)] < 0) a.reg = zero_;
      const int bits = flat_.registers[static_cast<size_t>(o.reg)].bits;
      if (bits == 32)
        a.aux |= kAddress32;
      else if (bits != 64)
        refuse("has an address register of " + std::to_string(bits) + " bits");
    }
    a.aux |= static_cast<uint32_t>(space == Space::Const ? Space::Global : space);
    return a;
  }
  static void apply(Inst& inst, const Address& a) {
    inst.imm = a.imm;
    inst.r[kAddress] = a.reg;
    inst.aux |= a.aux;
  }
  static InstClass load_class(uint32_t aux) {
    switch (static_cast<Space>(aux & kSpaceMask)) {
      case Space::Shared:
        return InstClass::LoadShared;
      case Space::Local:
        return InstClass::LoadLocal;
      case Space::Param:
        return InstClass::LoadParam;
      default:
        return InstClass::LoadGlobal;
    }
  }
  static InstClass store_class(uint32_t aux) {
    switch (static_cast<Space>(aux & kSpaceMask)) {
      case Space::Shared:
        return InstClass::StoreShared;
      case Space::Local:
        return InstClass::StoreLocal;
      default:
        return InstClass::StoreGlobal;
    }
  }
  uint32_t ordering() const {
    uint32_t aux = 0;
    if (in_->has("volatile") || in_->has("relaxed") || in_->has("acquire") || in_->has("release") ||
        in_->has("acq_rel"))
      aux |= kStrong;
    if (in_->has("acquire") || in_->has("acq_rel")) aux |= kAcquire;
    if (in_->has("release") || in_->has("acq_rel")) aux |= kRelease;
    if (in_->has("gpu") || in_->has("sys") || in_->has("cluster") || in_->has("volatile")) aux |= kScopeWide;
    return aux;
  }
  void only_memory() const {
    for (const auto& m : in_->mods) {
      if (bits_of(m) != 0 || m.rfind("L2::", 0) == 0 || m.rfind("L1::", 0) == 0) continue;
      static const char* const known[] = {
          "global", "shared", "shared::cta", "local",    "param",   "param::entry", "param::func", "const",
          "nc",     "ca",     "cg",          "cs",       "cv",      "lu",           "wb",          "wt",
          "v2",     "v4",     "v8",          "volatile", "relaxed", "acquire",      "release",     "weak",
          "cta",    "gpu",    "sys",         "cluster",  "unified", "mmio"};
      if (std::none_of(std::begin(known), std::end(known), [&](const char* k) { return m == k; }))
        refuse("has the unknown modifier ." + m);
    }
  }
  void load() {
    only_memory();
    const std::string& t = last_type();
    const Address a = address(op(1), space_of());
    std::vector<Operand> to = op(0).kind == Kind::Vector ? op(0).parts : std::vector<Operand>{op(0)};
    int have = 0;
    for (const auto& o : to) have = std::max(have, register_bits(o));
    const bool is_signed = t[0] == 's';
    const int bits = bits_of(t);
    if (bits == 128) refuse("is not simulated");
    if (have == 0) have = std::max(bits, 16);
    have = std::max(have, 16);
    const std::string memory_type = (is_signed && bits < have ? "s" : "u") + std::to_string(bits);
    Inst& inst = emit("ld." + memory_type + "." + std::to_string(have), load_class(a.aux));
    inst.n = static_cast<uint8_t>(to.size());
    for (size_t i = 0; i < to.size(); ++i) inst.r[i] = any_register(to[i]);
    inst.aux = ordering();
    apply(inst, a);
  }
  void store() {
    only_memory();
    const std::string& t = last_type();
    const Address a = address(op(0), space_of());
    std::vector<Operand> from = op(1).kind == Kind::Vector ? op(1).parts : std::vector<Operand>{op(1)};
    const int bits = bits_of(t);
    if (bits == 128) refuse("is not simulated");
    int have = std::max(bits, 16);
    for (const auto& o : from) have = std::max(have, register_bits(o));
    uint16_t r[8] = {};
    for (size_t i = 0; i < from.size() && i < 8; ++i) {
      if (from[i].kind == Kind::Register && std::max(register_bits(from[i]), 16) != have)
        refuse("mixes register widths");
      r[i] = from[i].kind == Kind::Register ? any_source(from[i], bits)
                                            : constant(immediate_bits(from[i], t), have);
    }
    Inst& inst = emit("st." + std::to_string(bits) + "." + std::to_string(have), store_class(a.aux));
    inst.n = static_cast<uint8_t>(from.size());
    for (size_t i = 0; i < from.size(); ++i) inst.r[i] = r[i];
    inst.aux = ordering();
    apply(inst, a);
  }
  void nothing() { emit("nop", InstClass::Other); }
  void policy() {
    const uint16_t zero = constant(0, 64);
    Inst& inst = emit("mov.64", InstClass::Other);
    inst.r[0] = destination(op(0), "b64");
    inst.r[1] = zero;
  }

  // ---- control
  void branch() {
    only({"uni", "idx"});
    if (in_->op == "bra") {
      emit("bra", InstClass::Control);
      return;
    }
    const uint16_t index = source(op(0), "u32");
    emit("brx", InstClass::Control).r[1] = index;
  }
  void leave() {
    only({"uni"});
    emit(in_->op == "trap" || in_->op == "brkpt" ? "trap" : "exit", InstClass::Control);
  }
  void call() {
    const auto& name = op(1).name;
    const auto& arguments = op(2).parts;
    Inst& inst = emit(name == "vprintf" ? "printf" : "assertfail", InstClass::Other);
    for (size_t i = 0; i < arguments.size() && i < 8; ++i) {
      const auto [space, offset] = symbol(arguments[i]);
      if (space != Space::Local) refuse("passes an argument that is not in .param space");
      inst.r[i] = static_cast<uint16_t>(offset);
      if (offset > 0xffff) refuse("has too large a local frame");
    }
    const auto& results = op(0).parts;
    inst.aux = results.empty() ? 0xffffffffu : static_cast<uint32_t>(symbol(results[0]).second);
  }
  void sleep() { emit("nanosleep", InstClass::Other); }

  // ---- synchronisation
  void barrier() {
    only({"sync", "cta", "aligned", "arrive", "red", "popc", "and", "or", "warp"});
    if (in_->has("warp")) {
      const uint16_t members = source(op(0), "b32");
      emit("bar.warp.sync", InstClass::Barrier).r[1] = members;
      return;
    }
    const bool reduce = in_->has("red");
    const size_t first = reduce ? 1 : 0;
    size_t num_numbers = in_->operands.size() - first - (reduce ? 1 : 0);
    const uint16_t number = source(op(first), "u32");
    const uint16_t count = num_numbers > 1 ? source(op(first + 1), "u32") : zero_;
    const std::string kind = reduce               ? (in_->has("popc")  ? "bar.red.popc"
                                                     : in_->has("and") ? "bar.red.and"
                                                                       : "bar.red.or")
                             : in_->has("arrive") ? "bar.arrive"
                                                  : "bar.sync";
    Inst& inst = emit(kind, InstClass::Barrier);
    inst.r[1] = number;
    inst.r[2] = count;
    inst.aux = num_numbers > 1;
    if (reduce) {
      const Operand& p = op(in_->operands.size() - 1);
      inst.r[3] = predicate(p);
      if (p.negated) inst.aux |= 2;
      inst.r[0] = in_->has("popc") ? destination(op(0), "u32") : predicate(op(0));
    }
  }
  void fence() {
    // membar.{cta,gl,sys}, fence[.sc|.acq_rel].scope, and proxy fences
    Inst& inst = emit("fence", InstClass::Fence);
    inst.aux = in_->has("cta") && !in_->has("gpu") ? 0 : kScopeWide;
    if (in_->has("proxy")) inst.aux |= 1;
  }
  void vote() {
    only({"sync", "all", "any", "uni", "ballot"});
    if (!in_->has("sync")) refuse("without .sync is not simulated");
    const bool ballot = in_->has("ballot");
    const uint16_t members = source(op(2), "b32");
    Inst& inst = emit(ballot            ? "vote.ballot"
                      : in_->has("all") ? "vote.all"
                      : in_->has("any") ? "vote.any"
                                        : "vote.uni",
                      InstClass::WarpVote);
    inst.r[0] = ballot ? destination(op(0), "b32") : predicate(op(0));
    if (op(1).kind == Kind::Immediate) {
      inst.r[1] = kNoPredicate;
      inst.aux = op(1).bits != 0;
    } else {
      inst.r[1] = predicate(op(1));
      inst.aux = op(1).negated;
    }
    inst.r[2] = members;
  }
  void match() {
    only({"sync", "any", "all"});
    const std::string& t = last_type();
    const uint16_t a = source(op(1), t), members = source(op(2), "b32");
    Inst& inst =
        emit(std::string("match.") + (in_->has("any") ? "any." : "all.") + width(t), InstClass::WarpVote);
    inst.r[3] = scratch_predicate_;
    if (op(0).kind == Kind::Vector) inst.r[3] = predicate(op(0).parts.at(1));
    inst.r[0] = destination(op(0).kind == Kind::Vector ? op(0).parts.at(0) : op(0), "b32");
    inst.r[1] = a;
    inst.r[2] = members;
  }
  void redux() {
    const std::string& t = last_type();
    only({"sync", "add", "min", "max", "and", "or", "xor"});
    const uint16_t a = source(op(1), t), members = source(op(2), "b32");
    Inst& inst = emit("redux." + in_->mods.at(1) + "." + t, InstClass::WarpVote);
    inst.r[0] = destination(op(0), t), inst.r[1] = a, inst.r[2] = members;
  }
  void activemask() {
    Inst& inst = emit("activemask", InstClass::WarpVote);
    inst.r[0] = destination(op(0), "b32");
  }
  void elect() {
    const uint16_t members = source(op(1), "b32");
    Inst& inst = emit("elect", InstClass::WarpVote);
    inst.r[0] = destination(op(0).parts.at(0), "b32");
    inst.r[3] = predicate(op(0).parts.at(1));
    inst.r[2] = members;
  }
  void shuffle() {
    only({"sync", "up", "down", "bfly", "idx"});
    if (!in_->has("sync")) refuse("without .sync is not simulated");
    const uint16_t a = source(op(1), "b32"), b = source(op(2), "b32"), c = source(op(3), "b32"),
                   members = source(op(4), "b32");
    Inst& inst = emit(std::string("shfl.") + (in_->has("up")     ? "up"
                                              : in_->has("down") ? "down"
                                              : in_->has("bfly") ? "bfly"
                                                                 : "idx"),
                      InstClass::WarpVote);
    const bool pair = op(0).kind == Kind::Vector;
    inst.r[0] = destination(pair ? op(0).parts.at(0) : op(0), "b32");
    inst.r[1] = a, inst.r[2] = b, inst.r[3] = c, inst.r[4] = members;
    inst.r[5] = pair ? predicate(op(0).parts.at(1)) : kNoPredicate;
  }

  void atomic() {
    const std::string& t = last_type();
    const bool returns = in_->op == "atom";
    std::string operation;
    size_t vector = 1;
    for (const auto& m : in_->mods) {
      if (bits_of(m) != 0) continue;
      static const char* const ignored[] = {"global",  "shared",  "shared::cta",   "relaxed", "acquire",
                                            "release", "acq_rel", "cta",           "gpu",     "sys",
                                            "cluster", "noftz",   "L2::cache_hint"};
      if (std::any_of(std::begin(ignored), std::end(ignored), [&](const char* k) { return m == k; }))
        continue;
      if (m == "v2" || m == "v4" || m == "v8")
        vector = static_cast<size_t>(m[1] - '0');
      else if (operation.empty())
        operation = m;
      else
        refuse("has the unknown modifier ." + m);
    }
    const size_t first = returns ? 1 : 0;
    const Address a = address(op(first), space_of());
    const int code = atomic_code(operation, t);
    if (code < 0) refuse("is not simulated");
    Inst proto;
    auto operands_of = [&](const Operand& o) {
      return o.kind == Kind::Vector ? o.parts : std::vector<Operand>{o};
    };
    const auto values = operands_of(op(first + 1));
    if (values.size() != vector || vector > 4) refuse("is not simulated");
    uint16_t value[4] = {}, compare = zero_;
    for (size_t i = 0; i < vector; ++i) value[i] = source(values[i], t);
    if (operation == "cas") {
      compare = value[0];
      value[0] = source(op(first + 2), t);
    }
    Inst& inst = emit("atomic." + width(t), InstClass::Atomic);
    inst.n = static_cast<uint8_t>(vector);
    inst.aux = (in_->has("acquire") || in_->has("acq_rel") ? kAcquire : 0u) |
               (in_->has("release") || in_->has("acq_rel") ? kRelease : 0u) | kStrong |
               (in_->has("cta") ? 0u : kScopeWide);
    apply(inst, a);
    inst.target = static_cast<uint32_t>(code);
    for (size_t i = 0; i < vector; ++i) {
      inst.r[i] = returns ? destination(operands_of(op(0)).at(i), t) : scratch_;
      inst.r[4 + i] = value[i];
    }
    inst.r[8] = compare;
    inst.r[9] = returns;
  }

  void copy() {
    if (!in_->has("async")) refuse("is not simulated");
    if (in_->has("mbarrier")) {  // cp.async.mbarrier.arrive[.noinc].shared.b64 [addr]
      const Address a = address(op(0), Space::Shared);
      Inst& inst = emit("cp.async.mbarrier.arrive", InstClass::AsyncCopy);
      apply(inst, a);
      if (in_->has("noinc")) inst.aux |= 1u << 16;
      return;
    }
    if (in_->has("bulk")) return bulk_copy();
    if (in_->has("commit_group")) {
      emit("cp.async.commit", InstClass::AsyncCopy);
      return;
    }
    if (in_->has("wait_all")) {
      emit("cp.async.wait_all", InstClass::AsyncCopy);
      return;
    }
    if (in_->has("wait_group")) {
      emit("cp.async.wait", InstClass::AsyncCopy).imm = static_cast<int64_t>(op(0).bits);
      return;
    }
    // cp.async.{ca,cg}.shared.global [dst], [src], size {, src-size | ignore} {, policy}
    const Address to = address(op(0), Space::Shared), from = address(op(1), Space::Global);
    if (from.imm != static_cast<int32_t>(from.imm) && !(from.aux & kNoBase))
      refuse("has too large an offset");
    const uint64_t size = op(2).bits;
    const bool hinted = in_->has("L2::cache_hint");
    const size_t extra = in_->operands.size() - 3 - (hinted ? 1 : 0);
    uint16_t source_size = 0;
    bool ignore = false;
    if (extra == 1) {
      ignore = op(3).kind == Kind::Register && register_bits(op(3)) == 1;
      source_size = ignore ? predicate(op(3)) : source(op(3), "u32");
    }
    Inst& inst = emit("cp.async", InstClass::AsyncCopy);
    apply(inst, to);
    inst.target = static_cast<uint32_t>(size);
    inst.r[0] = from.aux & kNoBase ? constant(static_cast<uint64_t>(from.imm), 64) : from.reg;
    inst.r[1] = from.aux & kNoBase ? zero_ : constant(static_cast<uint64_t>(from.imm), 64);
    inst.r[2] = source_size;
    inst.n = static_cast<uint8_t>(extra == 0 ? 0 : ignore ? 2 : 1);
    if (!(from.aux & kNoBase) && (from.aux & kAddress32)) refuse("has a 32-bit global address");
  }
  void bulk_copy() {
    if (in_->has("commit_group")) {
      emit("bulk.commit", InstClass::AsyncCopy);
      return;
    }
    if (in_->has("wait_group")) {
      Inst& inst = emit("bulk.wait", InstClass::AsyncCopy);
      inst.imm = static_cast<int64_t>(op(0).bits);
      inst.aux = in_->has("read");
      return;
    }
    if (in_->has("tensor") || in_->has("reduce") || in_->has("prefetch") || in_->has("multicast::cluster"))
      refuse("is not simulated");
    const bool to_shared = !in_->mods.empty() && std::find(in_->mods.begin(), in_->mods.end(),
                                                           "mbarrier::complete_tx::bytes") != in_->mods.end();
    const Address to = address(op(0), to_shared ? Space::Shared : Space::Global),
                  from = address(op(1), to_shared ? Space::Global : Space::Shared);
    const uint16_t size = source(op(2), "u32");
    Address barrier;
    if (to_shared) barrier = address(op(3), Space::Shared);
    auto full = [&](const Address& a) -> std::pair<uint16_t, uint16_t> {
      return {a.aux & kNoBase ? constant(static_cast<uint64_t>(a.imm), 64) : a.reg,
              a.aux & kNoBase ? zero_ : constant(static_cast<uint64_t>(a.imm), 64)};
    };
    const auto t = full(to), f = full(from), b = full(barrier);
    Inst& inst = emit(to_shared ? "bulk.to_shared" : "bulk.to_global", InstClass::AsyncCopy);
    inst.r[0] = t.first, inst.r[1] = t.second, inst.r[2] = f.first, inst.r[3] = f.second, inst.r[4] = b.first,
    inst.r[5] = b.second, inst.r[6] = size;
    inst.aux = (to.aux & kAddress32 ? 1u : 0u) | (from.aux & kAddress32 ? 2u : 0u) |
               (barrier.aux & kAddress32 ? 4u : 0u);
  }
  void mbarrier() {
    std::string key = "mbarrier";
    for (const char* m :
         {"init", "inval", "expect_tx", "complete_tx", "arrive", "arrive_drop", "test_wait", "try_wait"})
      if (in_->has(m)) {
        key = std::string("mbarrier.") + m;
        if (key == "mbarrier.expect_tx") break;
      }
    if (in_->has("arrive")) key = "mbarrier.arrive";
    if (in_->has("arrive_drop")) key = "mbarrier.arrive_drop";
    const bool arrive = in_->has("arrive") || in_->has("arrive_drop");
    if (in_->has("shared::cluster") && arrive && op(0).kind != Kind::Sink && op(0).kind != Kind::Register &&
        op(0).kind != Kind::Address)
      refuse("is not simulated");
    size_t at = 0;
    uint16_t result = scratch_;
    uint16_t result_predicate = scratch_predicate_;
    const bool wait = in_->has("test_wait") || in_->has("try_wait");
    if (op(0).kind != Kind::Address) {
      if (wait)
        result_predicate = predicate(op(0));
      else
        result = op(0).kind == Kind::Sink ? scratch_ : destination(op(0), "b64");
      at = 1;
    }
    const Address a = address(op(at), space_of());
    uint16_t value = zero_;
    bool has_value = false;
    if (in_->operands.size() > at + 1) {
      value = source(op(at + 1), wait && !in_->has("parity") ? "b64" : "u32");
      has_value = true;
    }
    if (in_->has("noComplete")) refuse("is not simulated");
    Inst& inst = emit(key, InstClass::Barrier);
    apply(inst, a);
    inst.r[0] = result;
    inst.r[1] = value;
    inst.r[2] = result_predicate;
    inst.n = static_cast<uint8_t>((has_value ? 1 : 0) | (in_->has("parity") ? 2 : 0) |
                                  (arrive && in_->has("expect_tx") ? 4 : 0));
  }

  // ---- matrices
  void ldmatrix() {
    only({"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"});
    const bool store = in_->op == "stmatrix";
    const int n = in_->has("x4") ? 4 : in_->has("x2") ? 2 : 1;
    if (!in_->has("m8n8") || last_type() != "b16") refuse("is not simulated");
    const Address a = address(op(store ? 0 : 1), space_of());
    const Operand& list = op(store ? 1 : 0);
    const auto parts = list.kind == Kind::Vector ? list.parts : std::vector<Operand>{list};
    if (static_cast<int>(parts.size()) != n) refuse("has the wrong number of registers");
    uint16_t r[4] = {};
    for (int i = 0; i < n; ++i)
      r[i] = store ? source(parts[static_cast<size_t>(i)], "b32")
                   : destination(parts[static_cast<size_t>(i)], "b32");
    Inst& inst = emit(in_->op + (in_->has("trans") ? ".trans" : ""), InstClass::LoadMatrix);
    apply(inst, a);
    inst.n = static_cast<uint8_t>(n);
    for (int i = 0; i < n; ++i) inst.r[i] = r[i];
  }
  void movmatrix() {
    only({"sync", "aligned", "m8n8", "trans"});
    simple("movmatrix", "b32", InstClass::LoadMatrix, 1);
  }
  void mma() {
    std::vector<std::string> t;
    std::string shape;
    for (const auto& m : in_->mods) {
      if (bits_of(m) != 0 || m == "e4m3" || m == "e5m2")
        t.push_back(m);
      else if (m[0] == 'm' && m.size() > 4)
        shape = m;
      else if (m != "sync" && m != "aligned" && m != "row" && m != "col" && m != "satfinite")
        refuse("has the unknown modifier ." + m);
    }
    if (t.size() != 4 || shape.empty()) refuse("is not simulated");
    std::string key = "mma." + shape + "." + t[0] + "." + t[1] + "." + t[2] + "." + t[3];
    if (in_->has("satfinite")) key += ".sat";
    uint16_t r[16] = {};
    int n = 0;
    for (size_t o = 0; o < 4; ++o) {
      const auto parts = op(o).kind == Kind::Vector ? op(o).parts : std::vector<Operand>{op(o)};
      for (const auto& part : parts) {
        if (n == 16) refuse("has too many registers");
        r[n++] = o == 0 ? destination(part, "b32") : source(part, "b32");
      }
    }
    Inst& inst = emit(key, InstClass::Mma);
    for (int i = 0; i < n; ++i) inst.r[i] = r[i];
  }

  const std::map<std::string, uint64_t>& globals_;
  FlatKernel flat_;
  std::unique_ptr<Program> out_;
  const Instruction* in_ = nullptr;
  std::vector<int> unit_of_;    // by virtual register: unit, or predicate number
  std::vector<bool> constant_;  // by virtual register: replaced by a constant
  std::map<std::pair<uint64_t, int>, uint16_t> constants_, param_units_;
  std::map<SpecialRegister, uint16_t> special_units_;
  uint16_t zero_ = 0, carry_ = 0, scratch_ = 0, scratch_used_ = 0, scratch_predicate_ = 0;
  uint32_t first_special_ = 0;
};

}  // namespace

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
