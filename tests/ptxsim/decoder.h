// SPDX-License-Identifier: Apache-2.0
// Turns each PTX instruction into a handler and the places of its operands. What has no handler is refused.
// One class; its instructions are decoded in decode_*.cpp, by family.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "flatten.h"
#include "program.h"

namespace ptxsim {

// Of a type such as "f16x2"; 0 if it is none.
int bits_of(const std::string& type);
bool is_float(const std::string& type);
constexpr uint16_t kNoPredicate = 0xffff;

class Decoder {
 public:
  Decoder(std::shared_ptr<const Module> module, const Function& entry,
          const std::map<std::string, uint64_t>& globals);
  std::unique_ptr<Program> run();

 private:
  using Kind = Operand::Kind;

  [[noreturn]] void refuse(const std::string& why) const;
  std::string text() const;
  void instruction();

  // ---- operands: constants, special registers, registers
  uint16_t constant_units(int bits);
  uint16_t constant(uint64_t bits, int width);
  uint16_t param_constant(uint64_t offset, int bits);
  // Unit of a special register; those of blocks and warps are numbered from 0 until the register count is
  // known.
  uint16_t special_unit(const std::string& name);
  static bool is_clock(const std::string& name);
  // A register written once, by a move of something constant, is replaced by that constant. Returns the
  // instructions this removes.
  std::vector<bool> fold_constants();
  void collect_specials(const Instruction& in);
  int constant_value(int bits);
  std::pair<Space, uint64_t> symbol(const Operand& o) const;
  static uint64_t immediate_bits(const Operand& o, const std::string& type);
  int register_bits(const Operand& o) const;
  uint16_t register_unit(int reg) const { return static_cast<uint16_t>(unit_of_[static_cast<size_t>(reg)]); }
  // A source of `type`.
  uint16_t source(const Operand& o, const std::string& type);
  uint16_t destination(const Operand& o, const std::string& type);
  uint16_t any_register(const Operand& o) const;
  uint16_t predicate(const Operand& o) const;
  // Scratch registers live within one PTX instruction.
  uint16_t scratch(uint16_t units);
  Inst& emit(const std::string& key, InstClass cls = InstClass::Other);
  // The usual shape: one result, all sources of one type.
  void simple(const std::string& key, const std::string& type, InstClass cls, size_t sources);
  const Operand& op(size_t i) const { return in_->operands.at(i); }
  const std::string& last_type() const;
  // The types among the modifiers, in order.
  std::vector<std::string> types() const;
  // Refuses modifiers outside `known` (types are always known), so that nothing is silently ignored.
  void only(std::initializer_list<const char*> known) const;
  static InstClass float_class(const std::string& t) {
    return t == "f32" ? InstClass::Float : t == "f64" ? InstClass::Double : InstClass::Half;
  }
  static bool is_half(const std::string& t) {
    return t == "f16" || t == "bf16" || t == "f16x2" || t == "bf16x2";
  }
  static std::string width(const std::string& type) { return std::to_string(bits_of(type)); }

  // ---- arithmetic
  // "add" + rounding (rn is the default) + ftz + sat + type
  std::string float_key(const std::string& op, const std::string& type) const;
  void arithmetic();
  void with_carry();
  void multiply();
  void wide(const std::string& key, const std::string& t, size_t narrow);
  void multiply24();
  void multiply_add();
  void fused();
  void divide();
  void typed_binary();
  void typed_ternary();
  void min_max();
  void sign();
  void count_bits();
  void bitwise();
  void shift();
  void funnel();
  void bit_field();
  void lop3();
  void permute();
  void dot();
  void bmsk();
  void compare();
  void select();
  void select_sign();
  void test_float();
  void copysign();
  void special_function();

  // ---- moves and conversions
  void move();
  void cvta();
  void isspacep();
  // Conversions: to an integer of 32 or 64 bits first where the source is a small integer, and from one where
  // the result is.
  void convert();
  // A register of any width at least `bits`, or an immediate.
  uint16_t any_source(const Operand& o, int bits);
  // How a small integer is read: its register may be wider than its type.
  std::string source_suffix(const Operand& o, const std::string& type) const;
  void integer_to_integer(const std::string& to, const std::string& from, bool saturate);

  // ---- memory
  Space space_of() const;
  // Fills imm, r[kAddress] and the space bits for an address operand.
  struct Address {
    int64_t imm = 0;
    uint16_t reg = 0;
    uint32_t aux = 0;
  };
  Address address(const Operand& o, Space space);
  static void apply(Inst& inst, const Address& a);
  static InstClass load_class(uint32_t aux);
  static InstClass store_class(uint32_t aux);
  uint32_t ordering() const;
  void only_memory() const;
  void load();
  void store();
  void nothing();
  void policy();
  void atomic();
  void copy();
  void bulk_copy();

  // ---- control and synchronisation
  void branch();
  void leave();
  void call();
  void sleep();
  void barrier();
  void fence();
  void vote();
  void match();
  void redux();
  void activemask();
  void elect();
  void shuffle();
  void mbarrier();

  // ---- matrices
  void ldmatrix();
  void movmatrix();
  void mma();

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

}  // namespace ptxsim
