// SPDX-License-Identifier: Apache-2.0
#include "ptx_lexer.h"

#include <cctype>
#include <cstdlib>
#include <cstring>

#include "ptx_error.h"

namespace ptxsim {
namespace {

bool starts_word(char c) {
  return std::isalpha(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}
bool continues_word(char c) {
  return starts_word(c) || std::isdigit(static_cast<unsigned char>(c));
}

class Lexer {
 public:
  explicit Lexer(std::string_view text) : text_(text) {}

  std::vector<Token> run() {
    while (skip_space()) tokens_.push_back(next());
    Token end;
    end.line = line_;
    tokens_.push_back(end);
    return std::move(tokens_);
  }

 private:
  char at(size_t i) const { return i < text_.size() ? text_[i] : '\0'; }

  bool skip_space() {
    while (pos_ < text_.size()) {
      const char c = text_[pos_];
      if (c == '\n') {
        ++line_;
        ++pos_;
      } else if (c == ' ' || c == '\t' || c == '\r' || c == '\0') {
        ++pos_;
      } else if (c == '/' && at(pos_ + 1) == '/') {
        while (pos_ < text_.size() && text_[pos_] != '\n') ++pos_;
      } else if (c == '/' && at(pos_ + 1) == '*') {
        pos_ += 2;
        while (pos_ < text_.size() && !(text_[pos_] == '*' && at(pos_ + 1) == '/'))
          line_ += text_[pos_++] == '\n';
        pos_ += 2;
      } else {
        return true;
      }
    }
    return false;
  }

  Token next() {
    const size_t begin = pos_;
    const char c = text_[pos_];
    if (starts_word(c)) {
      while (continues_word(at(pos_)) || (at(pos_) == ':' && at(pos_ + 1) == ':'))
        pos_ += at(pos_) == ':' ? 2 : 1;
      return make(Token::Kind::Word, begin);
    }
    if (std::isdigit(static_cast<unsigned char>(c))) return number();
    if (c == '"') {
      ++pos_;
      while (pos_ < text_.size() && text_[pos_] != '"') pos_ += text_[pos_] == '\\' ? 2 : 1;
      ++pos_;
      return make(Token::Kind::String, begin);
    }
    if (std::strchr(",;{}()[]<>=+-!|@:~*&?/^#", c) == nullptr)
      throw PtxError(line_, std::string("unexpected character '") + c + "'");
    ++pos_;
    return make(Token::Kind::Punctuation, begin);
  }

  Token number() {
    const size_t begin = pos_;
    if (at(pos_) == '0' &&
        (at(pos_ + 1) == 'f' || at(pos_ + 1) == 'F' || at(pos_ + 1) == 'd' || at(pos_ + 1) == 'D')) {
      const bool single = at(pos_ + 1) == 'f' || at(pos_ + 1) == 'F';
      const size_t digits = single ? 8 : 16;
      const std::string hex(text_.substr(pos_ + 2, digits));
      pos_ += 2 + digits;
      Token t = make(single ? Token::Kind::Float32 : Token::Kind::Float64, begin);
      t.bits = std::strtoull(hex.c_str(), nullptr, 16);
      return t;
    }
    size_t end = pos_;
    while (std::isalnum(static_cast<unsigned char>(at(end)))) ++end;
    if (at(end) == '.' && std::isdigit(static_cast<unsigned char>(at(end + 1)))) {
      const std::string decimal(text_.substr(pos_, 64));
      char* stop = nullptr;
      const double value = std::strtod(decimal.c_str(), &stop);
      pos_ += static_cast<size_t>(stop - decimal.c_str());
      Token t = make(Token::Kind::Float64, begin);
      std::memcpy(&t.bits, &value, 8);
      return t;
    }
    std::string digits(text_.substr(pos_, end - pos_));
    pos_ = end;
    int base = 0;  // 0x and leading 0 (octal) as in C
    size_t skip = 0;
    if (digits.size() > 2 && digits[0] == '0' && (digits[1] == 'b' || digits[1] == 'B')) {
      base = 2;
      skip = 2;
    }
    Token t = make(Token::Kind::Integer, begin);
    t.bits = std::strtoull(digits.c_str() + skip, nullptr, base);
    return t;
  }

  Token make(Token::Kind kind, size_t begin) const {
    Token t;
    t.kind = kind;
    t.text = text_.substr(begin, pos_ - begin);
    t.line = line_;
    return t;
  }

  std::string_view text_;
  size_t pos_ = 0;
  int line_ = 1;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> lex_ptx(std::string_view text) {
  return Lexer(text).run();
}

}  // namespace ptxsim
