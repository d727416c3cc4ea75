// SPDX-License-Identifier: Apache-2.0
// Decodes moves between registers, of addresses between state spaces, and conversions.
#include <algorithm>

#include "decoder.h"
#include "memory.h"

namespace ptxsim {

void Decoder::move() {
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

void Decoder::cvta() {
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

void Decoder::isspacep() {
  only({"global", "shared", "local", "const", "param", "shared::cta", "shared::cluster"});
  const uint16_t a = source(op(1), "u64");
  Inst& inst = emit("isspacep", InstClass::Move);
  inst.r[0] = predicate(op(0));
  inst.r[1] = a;
  const std::string& m = in_->mods.at(0);
  if (m == "const") refuse("is not simulated");
  const auto bit = [](uint64_t window) { return int64_t{1} << (window >> 56); };
  inst.imm = m == "shared" || m == "shared::cta" || m == "shared::cluster" ? bit(kSharedWindow)
             : m == "local"                                                ? bit(kLocalWindow)
             : m == "param" ? bit(kParamWindow)
                            : bit(0) | bit(kParamWindow);  // the global window holds parameters
}

void Decoder::convert() {
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
      const uint16_t a = any_source(op(1), to == "tf32" ? 32 : from == "f16x2" || from == "bf16x2" ? 32 : 16);
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

uint16_t Decoder::any_source(const Operand& o, int bits) {
  if (o.kind == Kind::Register) {
    if (register_bits(o) < bits && !(bits == 8 && register_bits(o) >= 8))
      refuse("has a register that is too narrow");
    return unit_of_[static_cast<size_t>(o.reg)] < 0 ? zero_ : register_unit(o.reg);
  }
  return source(o, "b" + std::to_string(std::max(bits, 16)));
}

std::string Decoder::source_suffix(const Operand& o, const std::string& type) const {
  const int have = o.kind == Kind::Register  ? std::max(register_bits(o), 16)
                   : o.kind == Kind::Special ? 32
                                             : std::max(bits_of(type), 16);
  return have == std::max(bits_of(type), 16) && bits_of(type) != 8 ? "" : ".in" + std::to_string(have);
}

void Decoder::integer_to_integer(const std::string& to, const std::string& from, bool saturate) {
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
  Inst& out =
      emit("ext." + std::to_string(have) + "." + to + (bits_of(to) == 64 ? "" : ".in64"), InstClass::Convert);
  out.r[0] = any_register(op(0)), out.r[1] = wide;
}

}  // namespace ptxsim
