// SPDX-License-Identifier: Apache-2.0
//
// Which CPU instruction set runs. Every CPU kernel file is compiled once per Isa; the best one that both the
// build and the machine have is chosen when the process starts. Tests may choose a lower one.
#pragma once

namespace fs {

// Ascending: a later one is preferred.
//   portable      plain C++ vectors of four floats (SSE2 on x86-64, NEON on aarch64)
//   *_emulated    test builds only: the AVX-512 sources on other instructions, so that tests execute them
//                 on machines without AVX-512
//   avx2          AVX2 + FMA + F16C
//   avx512        AVX-512 F/BW/VL/DQ
//   avx512bf16    the same with BF16 and VNNI: bf16 weights multiply bf16 activations
//   amxbf16       the same with AMX: they do so on matrix tiles. Only some ops have kernels of their own
//                 there; the others run those of avx512bf16
enum class Isa : int {
  portable,
  avx512_emulated,
  avx512bf16_emulated,
  amxbf16_emulated,
  avx2,
  avx512,
  avx512bf16,
  amxbf16
};
inline constexpr int kNumIsas = 8;

const char* name_of(Isa isa);

bool isa_runs(Isa isa);        // compiled into this build, and this machine executes it
Isa best_isa();                // the last one that runs
Isa active_isa();              // what ops use; best_isa() unless set
void set_active_isa(Isa isa);  // throws fs::Error if it does not run here

}  // namespace fs
