// SPDX-License-Identifier: Apache-2.0
// Operands of instructions: which constant, special register or register they are.
#include <algorithm>
#include <bit>
#include <cstring>

#include "decoder.h"
#include "ptx_error.h"
#include "register_allocation.h"

namespace ptxsim {

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

namespace {

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

}  // namespace

uint16_t Decoder::constant_units(int bits) {
  const size_t at = out_->constants.size();
  out_->constants.resize(at + static_cast<size_t>(bits) / 16 * 64);
  if (at / 64 >= kConstantBit) throw PtxError(0, "the kernel has too many constants");
  return static_cast<uint16_t>(at / 64 | kConstantBit);
}

uint16_t Decoder::constant(uint64_t bits, int width) {
  if (width < 64) bits &= (1ull << width) - 1;
  auto [it, fresh] = constants_.try_emplace({bits, width}, 0);
  if (fresh) {
    it->second = constant_units(width);
    uint8_t* at = out_->constants.data() + (it->second & 0x7fff) * 64;
    for (int l = 0; l < kLanes; ++l) std::memcpy(at + l * width / 8, &bits, static_cast<size_t>(width) / 8);
  }
  return it->second;
}

uint16_t Decoder::param_constant(uint64_t offset, int bits) {
  auto [it, fresh] = param_units_.try_emplace({offset, bits}, 0);
  if (fresh) {
    it->second = constant_units(bits);
    out_->launch_constants.push_back({it->second & 0x7fffu, true, offset, bits, SpecialRegister::Zero});
  }
  return it->second;
}

uint16_t Decoder::special_unit(const std::string& name) {
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

bool Decoder::is_clock(const std::string& name) {
  return name == "%clock" || name == "%clock_hi" || name == "%clock64" || name == "%globaltimer" ||
         name == "%globaltimer_lo";
}

std::vector<bool> Decoder::fold_constants() {
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

void Decoder::collect_specials(const Instruction& in) {
  for (const Operand& o : in.operands)
    if (o.kind == Kind::Special && !is_clock(o.name) && o.name != "%pm0") special_unit(o.name);
}

int Decoder::constant_value(int bits) {
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

std::pair<Space, uint64_t> Decoder::symbol(const Operand& o) const {
  if (const auto it = flat_.variables.find(o.name); it != flat_.variables.end())
    return {it->second.space, it->second.offset + static_cast<uint64_t>(o.offset)};
  if (const auto it = globals_.find(o.name); it != globals_.end())
    return {Space::Global, it->second + static_cast<uint64_t>(o.offset)};
  refuse("names the unknown symbol " + o.name);
}

uint64_t Decoder::immediate_bits(const Operand& o, const std::string& type) {
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

int Decoder::register_bits(const Operand& o) const {
  return o.kind == Kind::Register ? flat_.registers[static_cast<size_t>(o.reg)].bits : 0;
}

uint16_t Decoder::source(const Operand& o, const std::string& type) {
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

uint16_t Decoder::destination(const Operand& o, const std::string& type) {
  if (o.kind == Kind::Sink) return scratch_;
  if (o.kind != Kind::Register) refuse("writes to something that is no register");
  const int bits = std::max(bits_of(type), 16), have = std::max(register_bits(o), 16);
  if (have != bits) refuse("has a " + std::to_string(have) + "-bit register where " + type + " is expected");
  return register_unit(o.reg);
}

uint16_t Decoder::any_register(const Operand& o) const {
  if (o.kind == Kind::Sink) return scratch_;
  if (o.kind != Kind::Register) refuse("needs a register here");
  return register_unit(o.reg);
}

uint16_t Decoder::predicate(const Operand& o) const {
  if (o.kind == Kind::Sink) return scratch_predicate_;
  if (o.kind != Kind::Register || register_bits(o) != 1) refuse("needs a predicate here");
  return unit_of_[static_cast<size_t>(o.reg)] < 0 ? scratch_predicate_ : register_unit(o.reg);
}

uint16_t Decoder::scratch(uint16_t units) {
  const uint16_t at = static_cast<uint16_t>(scratch_ + 4 + scratch_used_);
  scratch_used_ = static_cast<uint16_t>(scratch_used_ + units);
  if (scratch_used_ > 12) refuse("needs too many scratch registers");
  return at;
}

Inst& Decoder::emit(const std::string& key, InstClass cls) {
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

void Decoder::simple(const std::string& key, const std::string& type, InstClass cls, size_t sources) {
  uint16_t r[4] = {};
  for (size_t s = 0; s < sources; ++s) r[s + 1] = source(op(s + 1), type);
  Inst& inst = emit(key, cls);
  inst.r[0] = destination(op(0), type);
  for (size_t s = 1; s <= sources; ++s) inst.r[s] = r[s];
}

const std::string& Decoder::last_type() const {
  if (in_->mods.empty() || (bits_of(in_->mods.back()) == 0)) refuse("has no type");
  return in_->mods.back();
}

std::vector<std::string> Decoder::types() const {
  std::vector<std::string> out;
  for (const auto& m : in_->mods)
    if (bits_of(m) != 0 || m == "e4m3" || m == "e5m2" || m == "e4m3x2" || m == "e5m2x2") out.push_back(m);
  return out;
}

void Decoder::only(std::initializer_list<const char*> known) const {
  for (const auto& m : in_->mods) {
    if (bits_of(m) != 0) continue;
    if (std::none_of(known.begin(), known.end(), [&](const char* k) { return m == k; }))
      refuse("has the unknown modifier ." + m);
  }
}

}  // namespace ptxsim
