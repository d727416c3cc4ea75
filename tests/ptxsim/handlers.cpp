// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set at run time and finds handlers by key.
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>

#include "program.h"
#include "warp_operations.h"

#define PTXSIM_DECLARE(isa)                                                                    \
  namespace ptxsim::isa {                                                                      \
  extern const HandlerTable integer_handlers, float_handlers, half_handlers, convert_handlers, \
      memory_handlers, matrix_handlers;                                                        \
  }
PTXSIM_DECLARE(portable)
PTXSIM_DECLARE(avx2)
#ifdef PTXSIM_HAVE_AVX512
PTXSIM_DECLARE(avx512)
#endif

namespace ptxsim {
namespace {

bool cpu_has(const std::string& isa) {
  __builtin_cpu_init();
  if (isa == "portable") return true;
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == "avx2") return avx2;
#ifdef PTXSIM_HAVE_AVX512
  if (isa == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return false;
}

const char* choose() {
  const char* forced = std::getenv("PTXSIM_ISA");
  for (const char* isa : {"avx512", "avx2", "portable"}) {
    if (forced != nullptr && *forced != '\0' && std::strcmp(forced, isa) != 0) continue;
    if (cpu_has(isa)) return isa;
  }
  std::fprintf(stderr, "ptxsim: PTXSIM_ISA=%s is not available on this machine or in this build\n", forced);
  std::exit(2);
}

using Map = std::unordered_map<std::string, Handler>;
void add(Map& map, const HandlerTable& table) {
  for (size_t i = 0; i < table.count; ++i) map[table.entries[i].key] = table.entries[i].fn;
}
#define PTXSIM_ADD(isa)                                                                                \
  for (const HandlerTable* t : {&isa::integer_handlers, &isa::float_handlers, &isa::half_handlers,     \
                                &isa::convert_handlers, &isa::memory_handlers, &isa::matrix_handlers}) \
  add(map, *t)

Map build() {
  Map map;
  const std::string isa = isa_name();
  if (isa == "portable") PTXSIM_ADD(portable);
  if (isa == "avx2") PTXSIM_ADD(avx2);
#ifdef PTXSIM_HAVE_AVX512
  if (isa == "avx512") PTXSIM_ADD(avx512);
#endif
  for (const HandlerTable* t :
       {&warp_operations, &atomic_operations, &async_operations, &mbarrier_operations, &print_operations})
    add(map, *t);
  return map;
}

}  // namespace

const char* isa_name() {
  static const char* const name = choose();
  return name;
}

Handler find_handler(const std::string& key) {
  static const Map map = build();
  const auto it = map.find(key);
  return it == map.end() ? nullptr : it->second;
}

}  // namespace ptxsim
