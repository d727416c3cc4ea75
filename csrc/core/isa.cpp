// SPDX-License-Identifier: Apache-2.0
#include "core/isa.h"

#include <array>
#include <atomic>

#include "core/error.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fs {

namespace {

#if defined(__x86_64__)
// Linux hands out the tile registers on request, to the whole process and to threads that it makes later.
bool may_use_amx() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22;  // cpuid 7.0, EDX
  constexpr unsigned kAmxTile = 1u << 24;
  constexpr unsigned kAmxInt8 = 1u << 25;
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kAll = kAmxBf16 | kAmxTile | kAmxInt8;
  if ((edx & kAll) != kAll) return false;
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool machine_has(Isa isa) {
  if (isa == Isa::portable) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    case Isa::amxbf16:
      return machine_has(Isa::avx512bf16) && may_use_amx();
    case Isa::avx512_emulated:
    case Isa::avx512bf16_emulated:
    case Isa::amxbf16_emulated:
#if defined(FS_EMULATE_AVX512)
      return avx2;
#endif
    default:
      return false;
  }
#else
  return false;
#endif
}

std::atomic<int> g_active{-1};

}  // namespace

const char* name_of(Isa isa) {
  constexpr const char* names[kNumIsas] = {
      "portable", "avx512_emulated", "avx512bf16_emulated", "amxbf16_emulated",
      "avx2",     "avx512",          "avx512bf16",          "amxbf16"};
  return names[static_cast<int>(isa)];
}

bool isa_runs(Isa isa) {
  static const std::array<bool, kNumIsas> runs = [] {
    std::array<bool, kNumIsas> found{};
    for (int i = 0; i < kNumIsas; ++i) found[static_cast<size_t>(i)] = machine_has(static_cast<Isa>(i));
    return found;
  }();
  return runs[static_cast<size_t>(isa)];
}

Isa best_isa() {
  int isa = kNumIsas - 1;
  while (!isa_runs(static_cast<Isa>(isa))) --isa;
  return static_cast<Isa>(isa);
}

Isa active_isa() {
  const int active = g_active.load(std::memory_order_relaxed);
  if (active >= 0) [[likely]]
    return static_cast<Isa>(active);
  const Isa best = best_isa();
  g_active.store(static_cast<int>(best), std::memory_order_relaxed);
  return best;
}

void set_active_isa(Isa isa) {
  FS_CHECK(isa_runs(isa), "instruction set " << name_of(isa)
                                             << " does not run on this machine; the best that does is "
                                             << name_of(best_isa()));
  g_active.store(static_cast<int>(isa), std::memory_order_relaxed);
}

}  // namespace fs
