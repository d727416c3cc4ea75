// SPDX-License-Identifier: Apache-2.0
//
// The shapes of this thread's eight AMX tile registers.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace fs::FS_ISA {

#if !defined(FS_SIMD_EMULATED)

class alignas(64) TileConfig {
 public:
  // Of a register: up to 16 rows of up to 64 bytes. Those not set are not used.
  void set(int tile, int num_rows, int row_bytes = 64) {
    rows_[tile] = static_cast<uint8_t>(num_rows);
    row_bytes_[tile] = static_cast<uint16_t>(num_rows == 0 ? 0 : row_bytes);
  }

  void load() const {
    // The intrinsics do not tell the compiler which memory they read.
    asm volatile("" ::"m"(*this) : "memory");
    _tile_loadconfig(this);
  }

 private:
  // As the processor reads it.
  uint8_t palette_ = 1;
  uint8_t start_row_ = 0;
  uint8_t reserved_[14] = {};
  uint16_t row_bytes_[16] = {};
  uint8_t rows_[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#endif

}  // namespace fs::FS_ISA
