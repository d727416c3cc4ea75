// SPDX-License-Identifier: Apache-2.0
// Decodes what reads and writes memory: ld, st, atom, red and the asynchronous copies.
#include <algorithm>

#include "atomics.h"
#include "decoder.h"

namespace ptxsim {

Space Decoder::space_of() const {
  for (const auto& m : in_->mods) {
    if (m == "global") return Space::Global;
    if (m == "shared" || m == "shared::cta") return Space::Shared;
    if (m == "local") return Space::Local;
    if (m == "param" || m == "param::entry" || m == "param::func") return Space::Param;
    if (m == "const") return Space::Const;
  }
  return Space::Generic;
}

Decoder::Address Decoder::address(const Operand& o, Space space) {
  if (o.kind != Kind::Address) refuse("needs an address here");
  Address a;
  a.imm = o.offset;
  if (!o.name.empty()) {
    Operand base;
    base.name = o.name;
    const auto [symbol_space, offset] = symbol(base);
    const bool matches = space == symbol_space || (space == Space::Const && symbol_space == Space::Global) ||
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

void Decoder::apply(Inst& inst, const Address& a) {
  inst.imm = a.imm;
  inst.r[kAddress] = a.reg;
  inst.aux |= a.aux;
}

InstClass Decoder::load_class(uint32_t aux) {
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

InstClass Decoder::store_class(uint32_t aux) {
  switch (static_cast<Space>(aux & kSpaceMask)) {
    case Space::Shared:
      return InstClass::StoreShared;
    case Space::Local:
      return InstClass::StoreLocal;
    default:
      return InstClass::StoreGlobal;
  }
}

uint32_t Decoder::ordering() const {
  uint32_t aux = 0;
  if (in_->has("volatile") || in_->has("relaxed") || in_->has("acquire") || in_->has("release") ||
      in_->has("acq_rel"))
    aux |= kStrong;
  if (in_->has("acquire") || in_->has("acq_rel")) aux |= kAcquire;
  if (in_->has("release") || in_->has("acq_rel")) aux |= kRelease;
  if (in_->has("gpu") || in_->has("sys") || in_->has("cluster") || in_->has("volatile")) aux |= kScopeWide;
  return aux;
}

void Decoder::only_memory() const {
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

void Decoder::load() {
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

void Decoder::store() {
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

void Decoder::nothing() {
  emit("nop", InstClass::Other);
}

void Decoder::policy() {
  const uint16_t zero = constant(0, 64);
  Inst& inst = emit("mov.64", InstClass::Other);
  inst.r[0] = destination(op(0), "b64");
  inst.r[1] = zero;
}

void Decoder::atomic() {
  const std::string& t = last_type();
  const bool returns = in_->op == "atom";
  std::string operation;
  size_t vector = 1;
  for (const auto& m : in_->mods) {
    if (bits_of(m) != 0) continue;
    static const char* const ignored[] = {"global",  "shared",  "shared::cta",   "relaxed", "acquire",
                                          "release", "acq_rel", "cta",           "gpu",     "sys",
                                          "cluster", "noftz",   "L2::cache_hint"};
    if (std::any_of(std::begin(ignored), std::end(ignored), [&](const char* k) { return m == k; })) continue;
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

void Decoder::copy() {
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
  if (from.imm != static_cast<int32_t>(from.imm) && !(from.aux & kNoBase)) refuse("has too large an offset");
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

void Decoder::bulk_copy() {
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

}  // namespace ptxsim
