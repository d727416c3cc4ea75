// SPDX-License-Identifier: Apache-2.0
// Splits PTX text into tokens.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace ptxsim {

struct Token {
  enum class Kind : uint8_t { Word, Integer, Float32, Float64, String, Punctuation, End };
  Kind kind = Kind::End;
  std::string_view text;  // points into the PTX text
  uint64_t bits = 0;      // value of an Integer, bit pattern of a Float32 or Float64
  int line = 0;           // 1-based line in the PTX text

  bool is(std::string_view s) const { return kind != Kind::String && text == s; }
};

// A word keeps its dots and its "::", so `cp.async.cg.shared::cta.global` and `%tid.x` are one token each.
// Throws PtxError on a character that PTX does not have.
std::vector<Token> lex_ptx(std::string_view text);

}  // namespace ptxsim
