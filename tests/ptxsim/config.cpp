// SPDX-License-Identifier: Apache-2.0
#include "config.h"

#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace ptxsim {
namespace {

// The value of a variable as one of `words`, or as a number; anything else ends the program, for a misspelt
// setting would otherwise pass for a test that ran.
long long setting(const char* name, long long otherwise, std::vector<std::string_view> words = {}) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return otherwise;
  for (size_t i = 0; i < words.size(); ++i)
    if (words[i] == value) return static_cast<long long>(i);
  char* end = nullptr;
  const long long number = std::strtoll(value, &end, 0);
  if (*end != '\0' || number < 0) {
    std::fprintf(stderr, "ptxsim: %s=%s is not understood\n", name, value);
    std::exit(2);
  }
  return number;
}

ptxsim_config from_environment() {
  ptxsim_config c{};
  c.seed = static_cast<uint64_t>(setting("PTXSIM_SEED", 0));
  c.async_mode = static_cast<int>(setting("PTXSIM_ASYNC", PTXSIM_ASYNC_LATE, {"late", "early", "random"}));
  c.check_uninit = static_cast<int>(setting("PTXSIM_UNINIT", 1));
  c.check_race = static_cast<int>(setting("PTXSIM_RACE", 0));
  c.check_global_race = static_cast<int>(setting("PTXSIM_GLOBAL_RACE", 0));
  c.weak_memory = static_cast<int>(setting("PTXSIM_WEAK", 0));
  c.ignore_order = static_cast<int>(setting("PTXSIM_IGNORE_ORDER", 0));
  c.random_streams = static_cast<int>(setting("PTXSIM_STREAMS", 0, {"ordered", "random"}));
  c.counters = static_cast<int>(setting("PTXSIM_COUNTERS", 1));
  c.multiprocessors = static_cast<int>(setting("PTXSIM_SMS", 8));
  c.verbose = static_cast<int>(setting("PTXSIM_VERBOSE", 0));
  c.max_reports = static_cast<int>(setting("PTXSIM_MAX_REPORTS", 8));
  if (c.multiprocessors < 1) c.multiprocessors = 1;
  return c;
}

}  // namespace

ptxsim_config& config() {
  static ptxsim_config c = from_environment();
  return c;
}

std::vector<std::string>& race_suppressions() {
  static std::vector<std::string> list = [] {
    std::vector<std::string> out;
    const char* value = std::getenv("PTXSIM_SUPPRESS");
    std::string rest = value != nullptr ? value : "";
    while (!rest.empty()) {
      const size_t semicolon = rest.find(';');
      if (semicolon != 0) out.push_back(rest.substr(0, semicolon));
      rest = semicolon == std::string::npos ? "" : rest.substr(semicolon + 1);
    }
    return out;
  }();
  return list;
}

}  // namespace ptxsim
