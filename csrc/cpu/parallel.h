// SPDX-License-Identifier: Apache-2.0
//
// How CPU kernels hand out rows.
#pragma once

#include <cstdint>

#include "core/thread_pool.h"

namespace fs::FS_ISA {

// Calls f(begin, end, worker) over [0, count) in pieces of at most `grain`: a fixed cut, whatever the thread
// count.
template <class F>
void parallel_rows(int64_t count, int64_t grain, const F& f) {
  const int64_t num_chunks = (count + grain - 1) / grain;
  if (num_chunks == 1) {
    f(int64_t{0}, count, 0);
    return;
  }
  pool().parallel_for(num_chunks, [&](int64_t chunk, int worker) {
    const int64_t begin = chunk * grain;
    const int64_t end = begin + grain < count ? begin + grain : count;
    f(begin, end, worker);
  });
}

}  // namespace fs::FS_ISA
