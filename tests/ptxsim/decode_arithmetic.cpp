// SPDX-License-Identifier: Apache-2.0
// Decodes arithmetic: on integers and floats, bits, comparisons, special functions.
#include <algorithm>

#include "decoder.h"

namespace ptxsim {

std::string Decoder::float_key(const std::string& op, const std::string& type) const {
  std::string key = op;
  for (const char* m : {"rz", "rm", "rp", "ftz", "sat", "relu", "NaN", "xorsign"})
    if (in_->has(m)) key += std::string(".") + m;
  return key + "." + type;
}

void Decoder::arithmetic() {  // add, sub
  const std::string& t = last_type();
  only({"rn", "rz", "rm", "rp", "ftz", "sat", "cc"});
  if (in_->has("cc")) return with_carry();
  if (is_float(t) || is_half(t)) return simple(float_key(in_->op, t), t, float_class(t), 2);
  if (in_->has("sat")) return simple(in_->op + ".sat." + t, t, InstClass::Integer, 2);
  if (t == "u16x2" || t == "s16x2") return simple(in_->op + ".16x2", t, InstClass::Integer, 2);
  simple(in_->op + "." + width(t), t, InstClass::Integer, 2);
}

void Decoder::with_carry() {  // add.cc, addc, sub.cc, subc
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

void Decoder::multiply() {
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

void Decoder::wide(const std::string& key, const std::string& t, size_t narrow) {
  const std::string big = "b" + std::to_string(2 * bits_of(t));
  uint16_t r[4] = {};
  for (size_t s = 1; s <= narrow; ++s) r[s] = source(op(s), t);
  if (in_->operands.size() > narrow + 1) r[narrow + 1] = source(op(narrow + 1), big);
  Inst& inst = emit(key, InstClass::Integer);
  inst.r[0] = destination(op(0), big);
  for (int s = 1; s < 4; ++s) inst.r[s] = r[s];
}

void Decoder::multiply24() {
  const std::string& t = last_type();
  only({"lo"});
  if (!in_->has("lo")) refuse("is not simulated");
  simple(in_->op + ".lo." + t, t, InstClass::Integer, in_->op == "mul24" ? 2 : 3);
}

void Decoder::multiply_add() {  // mad, madc
  const std::string& t = last_type();
  if (is_float(t)) return fused();
  only({"lo", "hi", "wide", "cc"});
  if (in_->has("wide")) return wide("mad.wide." + t, t, 2);
  if (in_->op == "madc" || in_->has("cc")) {
    uint16_t r[4] = {0, source(op(1), t), source(op(2), t), source(op(3), t)};
    Inst& inst =
        emit(std::string("mad.carry.") + (in_->has("hi") ? "hi." + t : "lo." + width(t)), InstClass::Integer);
    inst.aux = (in_->op == "madc" ? 1u : 0u) | (in_->has("cc") ? 2u : 0u);
    inst.r[0] = destination(op(0), t);
    for (int s = 1; s < 4; ++s) inst.r[s] = r[s];
    inst.r[4] = carry_;
    return;
  }
  simple(in_->has("hi") ? "mad.hi." + t : "mad.lo." + width(t), t, InstClass::Integer, 3);
}

void Decoder::fused() {
  const std::string& t = last_type();
  only({"rn", "rz", "rm", "rp", "ftz", "sat", "relu"});
  simple(float_key("fma", t), t, float_class(t), 3);
}

void Decoder::divide() {
  const std::string& t = last_type();
  if (!is_float(t)) return typed_binary();
  only({"rn", "rz", "rm", "rp", "ftz", "approx", "full"});
  simple(float_key("div", t), t, float_class(t), 2);
}

void Decoder::typed_binary() {
  only({});
  simple(in_->op + "." + last_type(), last_type(), InstClass::Integer, 2);
}

void Decoder::typed_ternary() {
  only({});
  simple(in_->op + "." + last_type(), last_type(), InstClass::Integer, 3);
}

void Decoder::min_max() {
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

void Decoder::sign() {  // abs, neg
  const std::string& t = last_type();
  only({"ftz"});
  if (is_float(t) || is_half(t)) return simple(float_key(in_->op, t), t, float_class(t), 1);
  simple(in_->op + "." + t, t, InstClass::Integer, 1);
}

void Decoder::count_bits() {  // popc, clz, bfind: the result has 32 bits
  const std::string& t = last_type();
  only({"shiftamt"});
  const uint16_t a = source(op(1), t);
  std::string key =
      in_->op + (in_->has("shiftamt") ? ".shiftamt." : ".") + (in_->op == "bfind" ? t : width(t));
  Inst& inst = emit(key, InstClass::Integer);
  inst.r[0] = destination(op(0), "u32");
  inst.r[1] = a;
}

void Decoder::bitwise() {
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

void Decoder::shift() {
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

void Decoder::funnel() {
  only({"l", "r", "wrap", "clamp"});
  simple(std::string("shf.") + (in_->has("l") ? "l" : "r") + (in_->has("wrap") ? ".wrap" : ".clamp"), "b32",
         InstClass::Integer, 3);
}

void Decoder::bit_field() {
  const std::string& t = last_type();
  only({});
  const bool insert = in_->op == "bfi";
  uint16_t r[5] = {};
  for (size_t s = 1; s <= (insert ? 4u : 3u); ++s) r[s] = source(op(s), s <= (insert ? 2u : 1u) ? t : "u32");
  Inst& inst = emit(in_->op + "." + (insert ? width(t) : t), InstClass::Integer);
  inst.r[0] = destination(op(0), t);
  for (int s = 1; s < 5; ++s) inst.r[s] = r[s];
}

void Decoder::lop3() {
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

void Decoder::permute() {
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

void Decoder::dot() {
  const auto t = types();
  only({"lo", "hi"});
  std::string key = in_->op;
  if (in_->op == "dp2a") key += in_->has("lo") ? ".lo" : ".hi";
  simple(key + "." + t.at(0) + "." + t.at(1), "b32", InstClass::Integer, 3);
}

void Decoder::bmsk() {
  refuse("is not simulated");
}

void Decoder::compare() {  // setp, set
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

void Decoder::select() {
  const std::string& t = last_type();
  only({});
  const uint16_t a = source(op(1), t), b = source(op(2), t);
  Inst& inst = emit("selp." + width(t), InstClass::Compare);
  inst.r[0] = destination(op(0), t), inst.r[1] = a, inst.r[2] = b;
  inst.r[3] = predicate(op(3));
  inst.aux = op(3).negated;
}

void Decoder::select_sign() {
  const auto t = types();
  only({"ftz"});
  const uint16_t a = source(op(1), t.at(0)), b = source(op(2), t.at(0)), c = source(op(3), t.at(1));
  Inst& inst = emit("slct." + width(t[0]) + "." + t[1], InstClass::Compare);
  inst.r[0] = destination(op(0), t[0]), inst.r[1] = a, inst.r[2] = b, inst.r[3] = c;
}

void Decoder::test_float() {
  const std::string& t = last_type();
  only({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  const uint16_t a = source(op(1), t);
  Inst& inst = emit("testp." + in_->mods.at(0) + "." + t, InstClass::Compare);
  inst.r[0] = predicate(op(0));
  inst.r[1] = a;
}

void Decoder::copysign() {
  const std::string& t = last_type();
  only({});
  simple("copysign." + t, t, InstClass::Float, 2);
}

void Decoder::special_function() {
  const std::string& t = last_type();
  only({"approx", "rn", "rz", "rm", "rp", "ftz"});
  std::string key = in_->op;
  if (in_->has("approx")) key += ".approx";
  simple(float_key(key, t), t, in_->has("approx") ? InstClass::Special : float_class(t), 1);
}

}  // namespace ptxsim
