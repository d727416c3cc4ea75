// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace ptxsim {

// Number of an atomic operation such as ("add", "f16x2"), or -1 if there is none; the atomic handlers take it
// in Inst::target.
int atomic_code(const std::string& operation, const std::string& type);

}  // namespace ptxsim
