// SPDX-License-Identifier: Apache-2.0
//
// How CPU kernels hand out rows.
#pragma once

#include <cstdint>

#include "cpu/shares.h"

namespace fs::FS_ISA {

// Calls f(begin, end, worker) over [0, count) in pieces of at most `grain`: a fixed cut, whatever the thread
// count. A worker's pieces follow one another, and are the same in all ops over the same rows.
template <class F>
void parallel_rows(int64_t count, int64_t grain, const F& f) {
  if (count <= grain) {
    if (count > 0) f(int64_t{0}, count, 0);
    return;
  }
  Shares shares((count + grain - 1) / grain);
  shares.run([&](int worker) {
    Span piece;
    while (shares.claim<Shares::kOne>(worker, &piece)) {
      const int64_t begin = piece.begin * grain;
      const int64_t end = begin + grain < count ? begin + grain : count;
      f(begin, end, worker);
    }
  });
}

}  // namespace fs::FS_ISA
