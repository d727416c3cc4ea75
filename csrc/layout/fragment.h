// SPDX-License-Identifier: Apache-2.0
//
// Where `pack_linear` puts the weight of output row n and input k on a CUDA device.
//
// A weight [N, K] becomes ceil(N / 32) panels of 32 output rows, zero padded; the array has shape
// [ceil(N / 32), Kp, 32] with Kp = K rounded up to 16. A panel is a row of chunks, each 16 inputs of its 32
// rows: what one warp needs for four tensor-core products of 16 x 8. Inside a chunk lie, for two of the
// products at a time, 16 bytes for each lane in turn, so that a warp reads 512 contiguous bytes and no value
// has to be moved between lanes:
//
//   [chunk][product pair][lane = 4 g + t][product of the pair][k half][k low]
//   n % 32 = 16 pair + 8 product + g          k % 16 = 8 half + 2 t + low
#pragma once

#include <cstdint>

#include "layout/host_device.h"

namespace fs {

inline constexpr int64_t kFragmentRows = 32;
inline constexpr int64_t kFragmentDepth = 16;
inline constexpr int64_t kFragmentChunk = kFragmentRows * kFragmentDepth;  // elements

FS_HOST_DEVICE int64_t fragment_depth(int64_t depth) {
  return (depth + kFragmentDepth - 1) / kFragmentDepth * kFragmentDepth;
}

// Offset of (row n, input k) in the packed array, in elements; `depth` is K.
FS_HOST_DEVICE int64_t fragment_offset(int64_t n, int64_t k, int64_t depth) {
  const int64_t chunk = n / kFragmentRows * (fragment_depth(depth) / kFragmentDepth) + k / kFragmentDepth;
  const int64_t pair = n % 32 / 16, product = n % 16 / 8, g = n % 8;
  const int64_t half = k % 16 / 8, t = k % 8 / 2, low = k % 2;
  return chunk * kFragmentChunk + pair * 256 + (4 * g + t) * 8 + product * 4 + half * 2 + low;
}

}  // namespace fs
