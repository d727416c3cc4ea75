// SPDX-License-Identifier: Apache-2.0
// Takes the PTX out of the fat binary that nvcc embeds in a host object.
#pragma once

#include <string>
#include <vector>

namespace ptxsim {

struct PtxImage {
  std::string text;
  unsigned arch = 0;  // 80 for sm_80
};

// `wrapper` is the argument of __cudaRegisterFatBinary. Machine code entries are skipped. Throws
// std::runtime_error.
std::vector<PtxImage> ptx_images(const void* wrapper);

// Exposed for tests: a whole zstd frame, or an LZ4 block. Throws std::runtime_error.
std::string decompress_zstd(const void* data, size_t size, size_t raw_size);
std::string decompress_lz4(const void* data, size_t size, size_t raw_size);

}  // namespace ptxsim
