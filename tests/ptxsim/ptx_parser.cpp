// SPDX-License-Identifier: Apache-2.0
// Recursive descent over the tokens of a module. Names declared inside `{ }` of inline assembly shadow outer
// ones, for registers, labels and .param variables alike; each declaration therefore gets its own register
// number or unique name.
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "ptx_error.h"
#include "ptx_lexer.h"
#include "ptx_module.h"

namespace ptxsim {
namespace {

int type_bits(std::string_view type) {
  if (type == ".pred") return 1;
  if (type == ".f16x2" || type == ".bf16x2" || type == ".tf32") return 32;
  if (type == ".bf16") return 16;
  const size_t digits = type.find_first_of("0123456789");
  if (digits == std::string_view::npos) return 0;
  const int bits = std::atoi(std::string(type.substr(digits)).c_str());
  return bits == 8 || bits == 16 || bits == 32 || bits == 64 || bits == 128 ? bits : 0;
}

std::vector<std::string> split_opcode(std::string_view text) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t i = 0; i <= text.size(); ++i)
    if (i == text.size() || text[i] == '.') {
      if (i > begin) parts.emplace_back(text.substr(begin, i - begin));
      begin = i + 1;
    }
  return parts;
}

struct RegisterRange {  // `.reg .b32 %r<17>` declares %r0 .. %r16
  int first, count;
};

struct Scope {
  std::map<std::string, int, std::less<>> registers;
  std::map<std::string, RegisterRange, std::less<>> ranges;
  std::map<std::string, std::string, std::less<>> labels, variables;
};

class Parser {
 public:
  explicit Parser(std::string text) : module_(std::make_unique<Module>()) {
    module_->text = std::move(text);
    size_t begin = 0;
    for (size_t i = 0; i <= module_->text.size(); ++i)
      if (i == module_->text.size() || module_->text[i] == '\n') {
        module_->lines.push_back(module_->text.substr(begin, i - begin));
        begin = i + 1;
      }
    tokens_ = lex_ptx(module_->text);
  }

  std::unique_ptr<Module> run() {
    while (peek().kind != Token::Kind::End) module_item();
    return std::move(module_);
  }

 private:
  // ---- token access
  const Token& peek(size_t ahead = 0) const { return tokens_[std::min(pos_ + ahead, tokens_.size() - 1)]; }
  const Token& take() { return tokens_[std::min(pos_++, tokens_.size() - 1)]; }
  bool accept(std::string_view s) {
    if (!peek().is(s)) return false;
    ++pos_;
    return true;
  }
  void expect(std::string_view s) {
    if (!accept(s)) fail("expected '" + std::string(s) + "' before '" + std::string(peek().text) + "'");
  }
  [[noreturn]] void fail(const std::string& message) const { throw PtxError(peek().line, message); }
  uint64_t integer() {
    const bool negative = accept("-");
    if (peek().kind != Token::Kind::Integer)
      fail("expected a number before '" + std::string(peek().text) + "'");
    const uint64_t value = take().bits;
    return negative ? -value : value;
  }

  // ---- module level
  void module_item() {
    if (accept(".version")) {
      take();
    } else if (accept(".target")) {
      module_->target = take().text;
      while (accept(",")) take();
    } else if (accept(".address_size")) {
      if (integer() != 64) fail("only 64-bit addresses are simulated");
    } else if (accept(".file")) {
      file_directive();
    } else if (accept(".section")) {
      take();
      skip_braces();
    } else if (accept(".pragma") || accept(".alias")) {
      while (!accept(";")) take();
    } else if (accept(".visible") || accept(".weak") || accept(".common") || accept(";")) {
      // linkage makes no difference inside one module
    } else if (accept(".extern")) {
      extern_ = true;
    } else if (accept(".entry")) {
      function(true);
    } else if (accept(".func")) {
      function(false);
    } else if (peek().is(".global") || peek().is(".const") || peek().is(".shared")) {
      variables(module_->variables, nullptr);
    } else {
      fail("'" + std::string(peek().text) + "' is not simulated at module level");
    }
  }

  void file_directive() {
    const int index = static_cast<int>(integer());
    std::string_view name = take().text;
    if (name.size() >= 2) name = name.substr(1, name.size() - 2);
    module_->files[index] = name;
    while (accept(",")) take();
  }

  void skip_braces() {
    expect("{");
    for (int depth = 1; depth > 0;) {
      const Token& t = take();
      if (t.kind == Token::Kind::End) fail("unclosed '{'");
      depth += t.is("{") ? 1 : t.is("}") ? -1 : 0;
    }
  }

  static Space space_of(std::string_view s) {
    return s == ".shared"  ? Space::Shared
           : s == ".local" ? Space::Local
           : s == ".const" ? Space::Const
           : s == ".param" ? Space::Param
                           : Space::Global;
  }

  // [.space] [.align n] .type name [dims] [= init] {, name ...} ;   in_function gives unique names
  void variables(std::vector<Variable>& out, Function* in_function) {
    Variable proto;
    proto.space = space_of(take().text);
    proto.is_extern = std::exchange(extern_, false);
    int element_bits = 0;
    variable_type(proto, element_bits);
    do {
      Variable v = proto;
      declarator(v, element_bits);
      if (accept("=")) initialiser(v, element_bits / 8);
      if (in_function != nullptr) {
        const std::string unique = v.name + "#" + std::to_string(next_unique_++);
        scopes_.back().variables[v.name] = unique;
        v.name = unique;
      }
      out.push_back(std::move(v));
    } while (accept(","));
    expect(";");
  }

  void variable_type(Variable& v, int& element_bits) {
    v.align = 0;
    int vector = 1;
    while (true) {
      if (accept(".align")) {
        v.align = integer();
      } else if (accept(".attribute")) {
        expect("(");
        while (!accept(")")) take();
      } else if (accept(".ptr")) {
        // .ptr .global .align n on kernel parameters: a hint
      } else if (peek().is(".v2") || peek().is(".v4")) {
        vector = take().is(".v2") ? 2 : 4;
      } else if (peek().is(".global") || peek().is(".shared") || peek().is(".const") || peek().is(".local")) {
        take();
      } else if (peek().kind == Token::Kind::Word && type_bits(peek().text) != 0 && element_bits == 0) {
        element_bits = type_bits(take().text);
      } else {
        break;
      }
    }
    if (element_bits == 0) fail("the type '" + std::string(peek().text) + "' is not simulated");
    element_bits *= vector;
    if (v.align == 0) v.align = static_cast<uint64_t>(element_bits / 8);
  }

  void declarator(Variable& v, int element_bits) {
    v.name = take().text;
    uint64_t count = 1;
    while (accept("[")) {
      if (accept("]")) {
        count = 0;
      } else {
        count *= integer();
        expect("]");
      }
    }
    v.bytes = count * static_cast<uint64_t>(element_bits) / 8;
  }

  void initialiser(Variable& v, int element_bytes) {
    uint64_t at = 0;
    initialiser_value(v, element_bytes, at);
    if (v.bytes == 0) v.bytes = v.init.size();
    v.init.resize(v.bytes);
  }

  void initialiser_value(Variable& v, int bytes, uint64_t& at) {
    if (accept("{")) {
      while (!accept("}")) {
        initialiser_value(v, bytes, at);
        accept(",");
      }
      return;
    }
    uint64_t bits = 0;
    if (peek().kind == Token::Kind::Word) {
      const bool generic = accept("generic");
      if (generic) expect("(");
      v.relocations.push_back({at, std::string(take().text), generic});
      if (generic) expect(")");
      if (accept("+")) bits = integer();
    } else {
      const bool negative = accept("-");
      bits = take().bits;
      if (negative) bits = -bits;
    }
    if (v.init.size() < at + static_cast<uint64_t>(bytes)) v.init.resize(at + static_cast<uint64_t>(bytes));
    std::memcpy(v.init.data() + at, &bits, static_cast<size_t>(bytes));
    at += static_cast<uint64_t>(bytes);
  }

  // ---- functions
  void parameters(std::vector<Variable>& out) {
    while (!accept(")")) {
      Variable v;
      v.space = Space::Param;
      expect(".param");
      int bits = 0;
      variable_type(v, bits);
      declarator(v, bits);
      out.push_back(std::move(v));
      accept(",");
    }
  }

  void function(bool is_entry) {
    extern_ = false;
    Function f;
    f.is_entry = is_entry;
    if (!is_entry && accept("(")) parameters(f.results);
    f.name = take().text;
    if (accept("(")) parameters(f.params);
    while (!peek().is("{") && !peek().is(";")) {
      if (accept(".maxntid") || accept(".reqntid")) {
        int threads = static_cast<int>(integer());
        while (accept(",")) threads *= static_cast<int>(integer());
        f.max_threads = threads;
      } else if (accept(".minnctapersm") || accept(".maxnreg") || accept(".maxnctapersm")) {
        integer();
      } else if (!accept(".noreturn")) {
        fail("the directive '" + std::string(peek().text) + "' is not simulated");
      }
    }
    if (!accept(";")) {
      f.has_body = true;
      source_ = SourceLine();
      scopes_.clear();
      function_ = &f;
      block();
      resolve_labels(f);
    }
    Function& slot = module_->functions[f.name];
    if (!slot.has_body) slot = std::move(f);
  }

  // Labels may be used before they are declared: each use keeps the chain of scopes open at that point, and
  // is resolved to the innermost declaration at the end of the function.
  void block() {
    expect("{");
    if (!scopes_.empty()) scope_numbers_.push_back(next_unique_++ + 1);
    scopes_.emplace_back();
    while (!accept("}")) statement();
    scopes_.pop_back();
    if (!scopes_.empty()) scope_numbers_.pop_back();
  }

  void statement() {
    if (peek().is("{")) return block();
    if (accept(";")) return;
    if (accept(".reg")) return registers();
    if (peek().is(".local") || peek().is(".shared") || peek().is(".param") || peek().is(".const") ||
        peek().is(".global"))
      return variables(function_->variables, function_);
    if (accept(".loc")) return location();
    if (accept(".pragma")) {
      while (!accept(";")) take();
      return;
    }
    if (peek().kind == Token::Kind::Word && peek(1).is(":")) {
      const std::string name(take().text);
      take();
      if (accept(".branchtargets")) {
        auto& list = function_->branch_targets[name];
        do list.push_back(std::string(take().text));
        while (accept(","));
        expect(";");
        return;
      }
      if (accept(".callprototype")) fail("indirect calls are not simulated");
      const std::string unique = name + "#" + std::to_string(scope_id());
      function_->labels[unique] = function_->body.size();
      return;
    }
    instruction();
  }

  int scope_id() const { return scope_numbers_.empty() ? 0 : scope_numbers_.back(); }

  void registers() {
    const int bits = type_bits(take().text);
    if (bits == 0) fail("unknown register type");
    do {
      const std::string name(take().text);
      const int first = static_cast<int>(function_->registers.size());
      if (accept("<")) {
        const int count = static_cast<int>(integer());
        expect(">");
        for (int i = 0; i < count; ++i) function_->registers.push_back({name + std::to_string(i), bits});
        scopes_.back().ranges[name] = {first, count};
      } else {
        function_->registers.push_back({name, bits});
        scopes_.back().registers[name] = first;
      }
    } while (accept(","));
    expect(";");
  }

  void location() {
    SourceLine s;
    s.file = static_cast<int>(integer());
    s.line = static_cast<int>(integer());
    integer();
    while (accept(",")) {
      const std::string_view word = take().text;
      if (word == "function_name") {
        take();
        if (accept("+")) integer();
      } else if (word == "inlined_at") {
        s.outer_file = static_cast<int>(integer());
        s.outer_line = static_cast<int>(integer());
        integer();
      }
    }
    source_ = s;
  }

  int find_register(std::string_view name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (auto it = scope->registers.find(name); it != scope->registers.end()) return it->second;
      size_t digits = name.size();
      while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
      if (digits == name.size() || name.size() - digits > 8) continue;
      auto it = scope->ranges.find(name.substr(0, digits));
      if (it == scope->ranges.end()) continue;
      const int index = std::atoi(std::string(name.substr(digits)).c_str());
      if (index < it->second.count) return it->second.first + index;
    }
    return -1;
  }

  Operand name_operand(std::string_view name) const {
    Operand o;
    if (name == "_") {
      o.kind = Operand::Kind::Sink;
    } else if (const int reg = find_register(name); reg >= 0) {
      o.kind = Operand::Kind::Register;
      o.reg = reg;
    } else if (name[0] == '%') {
      o.kind = Operand::Kind::Special;
      o.name = name;
    } else if (name == "WARP_SZ") {
      o.kind = Operand::Kind::Immediate;
      o.bits = 32;
    } else {
      o.kind = Operand::Kind::Symbol;
      o.name = variable_name(name);
    }
    return o;
  }

  std::string variable_name(std::string_view name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (auto it = scope->variables.find(name); it != scope->variables.end()) return it->second;
    return std::string(name);
  }

  Operand operand() {
    Operand o;
    if (accept("!")) {
      o = operand();
      o.negated = true;
      return o;
    }
    if (accept("[")) {
      o.kind = Operand::Kind::Address;
      if (peek().kind == Token::Kind::Word) {
        const Operand base = name_operand(take().text);
        o.reg = base.reg;
        if (base.kind == Operand::Kind::Symbol) o.name = base.name;
        if (base.kind == Operand::Kind::Special) fail("a special register is not an address");
        if (accept("+"))
          o.offset = static_cast<int64_t>(integer());
        else if (peek().is("-"))
          o.offset = static_cast<int64_t>(integer());
      } else {
        o.offset = static_cast<int64_t>(integer());
      }
      if (peek().is(",")) fail("tensor addresses are not simulated");
      expect("]");
      return o;
    }
    if (accept("{")) {
      o.kind = Operand::Kind::Vector;
      while (!accept("}")) {
        o.parts.push_back(operand());
        accept(",");
      }
      return o;
    }
    if (accept("-")) {
      o = operand();
      o.bits = o.is_single ? o.bits ^ 0x80000000u : o.is_double ? o.bits ^ (1ull << 63) : -o.bits;
      return o;
    }
    if (accept("~")) {
      o = operand();
      o.bits = ~o.bits;
      return o;
    }
    const Token& t = take();
    if (t.kind == Token::Kind::Integer || t.kind == Token::Kind::Float32 || t.kind == Token::Kind::Float64) {
      o.kind = Operand::Kind::Immediate;
      o.bits = t.bits;
      o.is_single = t.kind == Token::Kind::Float32;
      o.is_double = t.kind == Token::Kind::Float64;
      return o;
    }
    if (t.kind != Token::Kind::Word) {
      --pos_;
      fail("'" + std::string(t.text) + "' is not an operand");
    }
    o = name_operand(t.text);
    if (o.kind == Operand::Kind::Symbol && accept("+")) o.offset = static_cast<int64_t>(integer());
    return o;
  }

  void instruction() {
    Instruction in;
    in.line = peek().line;
    in.source = source_;
    if (accept("@")) {
      in.guard_negated = accept("!");
      in.guard = find_register(take().text);
      if (in.guard < 0) fail("unknown guard predicate");
      in.line = peek().line;
    }
    if (peek().kind != Token::Kind::Word)
      fail("expected an instruction before '" + std::string(peek().text) + "'");
    in.mods = split_opcode(take().text);
    if (in.mods.empty()) fail("empty opcode");
    in.op = in.mods.front();
    in.mods.erase(in.mods.begin());
    if (in.op == "call") {
      call_operands(in);
    } else {
      while (!peek().is(";")) {
        Operand o = operand();
        if (accept("|")) {
          Operand pair;
          pair.kind = Operand::Kind::Vector;
          pair.parts.push_back(std::move(o));
          pair.parts.push_back(operand());
          o = std::move(pair);
        }
        in.operands.push_back(std::move(o));
        if (!accept(",") && !peek().is(";")) fail("expected ',' before '" + std::string(peek().text) + "'");
      }
    }
    expect(";");
    if (in.op == "bra" || in.op == "brx") {
      for (auto& o : in.operands)
        if (o.kind == Operand::Kind::Symbol)
          pending_labels_.push_back({function_->body.size(), open_scopes()});
    }
    function_->body.push_back(std::move(in));
  }

  // call [(results)] function [, (arguments)]: three operands, the lists as Vectors.
  void call_operands(Instruction& in) {
    Operand results, arguments;
    results.kind = arguments.kind = Operand::Kind::Vector;
    auto list = [&](Operand& to) {
      while (!accept(")")) {
        to.parts.push_back(operand());
        accept(",");
      }
    };
    if (accept("(")) {
      list(results);
      expect(",");
    }
    const std::string_view target = take().text;
    if (find_register(target) >= 0) fail("indirect calls are not simulated");
    Operand name;
    name.kind = Operand::Kind::Symbol;
    name.name = target;
    if (accept(",") && accept("(")) list(arguments);
    if (!peek().is(";")) fail("this form of call is not simulated");
    in.operands = {std::move(results), std::move(name), std::move(arguments)};
  }

  std::vector<int> open_scopes() const {
    std::vector<int> ids{0};
    ids.insert(ids.end(), scope_numbers_.begin(), scope_numbers_.end());
    return ids;
  }

  void resolve_labels(Function& f) {
    for (const auto& use : pending_labels_) {
      for (auto& o : f.body[use.instruction].operands) {
        if (o.kind != Operand::Kind::Symbol || f.branch_targets.count(o.name)) continue;
        o.name = label_in(f, o.name, use.scopes, f.body[use.instruction].line);
      }
    }
    for (auto& [name, list] : f.branch_targets)
      for (auto& target : list) target = label_in(f, target, {0}, 0);
    pending_labels_.clear();
  }

  static std::string label_in(const Function& f, const std::string& name, const std::vector<int>& scopes,
                              int line) {
    for (auto id = scopes.rbegin(); id != scopes.rend(); ++id) {
      std::string unique = name + "#" + std::to_string(*id);
      if (f.labels.count(unique)) return unique;
    }
    throw PtxError(line, "unknown label '" + name + "'");
  }

  struct LabelUse {
    size_t instruction;
    std::vector<int> scopes;
  };

  std::unique_ptr<Module> module_;
  std::vector<Token> tokens_;
  size_t pos_ = 0;
  bool extern_ = false;
  int next_unique_ = 0;
  Function* function_ = nullptr;
  std::vector<Scope> scopes_;
  std::vector<int> scope_numbers_;  // of the open inner scopes
  std::vector<LabelUse> pending_labels_;
  SourceLine source_;
};

}  // namespace

const std::string& Module::line_text(int line) const {
  static const std::string none;
  return line >= 1 && line <= static_cast<int>(lines.size()) ? lines[static_cast<size_t>(line) - 1] : none;
}

std::unique_ptr<Module> parse_ptx(std::string text) {
  return Parser(std::move(text)).run();
}

}  // namespace ptxsim
