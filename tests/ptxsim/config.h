// SPDX-License-Identifier: Apache-2.0
// The configuration in force, first read from the environment.
#pragma once

#include <string>
#include <vector>

#include "ptxsim.h"

namespace ptxsim {

ptxsim_config& config();
std::vector<std::string>& race_suppressions();

// A small counter-based generator (splitmix64): all random choices of the device come from it.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return next() % n; }

 private:
  uint64_t state_;
};

}  // namespace ptxsim
