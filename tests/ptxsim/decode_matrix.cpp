// SPDX-License-Identifier: Apache-2.0
// Decodes the matrix instructions: ldmatrix, stmatrix, movmatrix, mma.

#include "decoder.h"

namespace ptxsim {

void Decoder::ldmatrix() {
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

void Decoder::movmatrix() {
  only({"sync", "aligned", "m8n8", "trans"});
  simple("movmatrix", "b32", InstClass::LoadMatrix, 1);
}

void Decoder::mma() {
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

}  // namespace ptxsim
