// SPDX-License-Identifier: Apache-2.0
// Decodes branches and what threads do together: barriers, fences, votes, shuffles.

#include "decoder.h"

namespace ptxsim {

void Decoder::branch() {
  only({"uni", "idx"});
  if (in_->op == "bra") {
    emit("bra", InstClass::Control);
    return;
  }
  const uint16_t index = source(op(0), "u32");
  emit("brx", InstClass::Control).r[1] = index;
}

void Decoder::leave() {
  only({"uni"});
  emit(in_->op == "trap" || in_->op == "brkpt" ? "trap" : "exit", InstClass::Control);
}

void Decoder::call() {
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

void Decoder::sleep() {
  emit("nanosleep", InstClass::Other);
}

void Decoder::barrier() {
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

void Decoder::fence() {
  // membar.{cta,gl,sys}, fence[.sc|.acq_rel].scope, and proxy fences
  Inst& inst = emit("fence", InstClass::Fence);
  inst.aux = in_->has("cta") && !in_->has("gpu") ? 0 : kScopeWide;
  if (in_->has("proxy")) inst.aux |= 1;
}

void Decoder::vote() {
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

void Decoder::match() {
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

void Decoder::redux() {
  const std::string& t = last_type();
  only({"sync", "add", "min", "max", "and", "or", "xor"});
  const uint16_t a = source(op(1), t), members = source(op(2), "b32");
  Inst& inst = emit("redux." + in_->mods.at(1) + "." + t, InstClass::WarpVote);
  inst.r[0] = destination(op(0), t), inst.r[1] = a, inst.r[2] = members;
}

void Decoder::activemask() {
  Inst& inst = emit("activemask", InstClass::WarpVote);
  inst.r[0] = destination(op(0), "b32");
}

void Decoder::elect() {
  const uint16_t members = source(op(1), "b32");
  Inst& inst = emit("elect", InstClass::WarpVote);
  inst.r[0] = destination(op(0).parts.at(0), "b32");
  inst.r[3] = predicate(op(0).parts.at(1));
  inst.r[2] = members;
}

void Decoder::shuffle() {
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

void Decoder::mbarrier() {
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

}  // namespace ptxsim
