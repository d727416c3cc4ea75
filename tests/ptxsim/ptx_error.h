// SPDX-License-Identifier: Apache-2.0
// What is thrown when PTX cannot be read, or holds something that is not simulated.
#pragma once

#include <stdexcept>
#include <string>

namespace ptxsim {

class PtxError : public std::runtime_error {
 public:
  PtxError(int line, const std::string& message)
      : std::runtime_error("PTX line " + std::to_string(line) + ": " + message), line(line) {}
  int line;
};

}  // namespace ptxsim
