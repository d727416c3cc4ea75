// SPDX-License-Identifier: Apache-2.0
//
// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011): 128 random bits as a pure function of a 128-bit
// counter and a 64-bit key. There is no state to keep: noise for one token of one request can be computed
// anywhere, in any order, and comes out the same.
#pragma once

#include <cstdint>

#include "layout/host_device.h"

namespace fs {

struct Philox4x32 {
  uint32_t word[4];
};

FS_HOST_DEVICE constexpr Philox4x32 philox_round(const Philox4x32& c, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = uint64_t{0xD2511F53u} * c.word[0];
  const uint64_t product1 = uint64_t{0xCD9E8D57u} * c.word[2];
  return {{static_cast<uint32_t>(product1 >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(product1),
           static_cast<uint32_t>(product0 >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(product0)}};
}

FS_HOST_DEVICE constexpr Philox4x32 philox4x32(Philox4x32 counter, uint32_t key0, uint32_t key1) {
  // Written out: the loop around this call is what the compiler shall vectorise.
  constexpr uint32_t weyl0 = 0x9E3779B9u;
  constexpr uint32_t weyl1 = 0xBB67AE85u;
  counter = philox_round(counter, key0, key1);
  counter = philox_round(counter, key0 + 1 * weyl0, key1 + 1 * weyl1);
  counter = philox_round(counter, key0 + 2 * weyl0, key1 + 2 * weyl1);
  counter = philox_round(counter, key0 + 3 * weyl0, key1 + 3 * weyl1);
  counter = philox_round(counter, key0 + 4 * weyl0, key1 + 4 * weyl1);
  counter = philox_round(counter, key0 + 5 * weyl0, key1 + 5 * weyl1);
  counter = philox_round(counter, key0 + 6 * weyl0, key1 + 6 * weyl1);
  counter = philox_round(counter, key0 + 7 * weyl0, key1 + 7 * weyl1);
  counter = philox_round(counter, key0 + 8 * weyl0, key1 + 8 * weyl1);
  return philox_round(counter, key0 + 9 * weyl0, key1 + 9 * weyl1);
}

// Where the noise of a token lies: word `token_id % 4` of the block with the counter
// (token_id / 4, position, 0, 0), under the request's seed as key.
FS_HOST_DEVICE constexpr Philox4x32 sampling_noise(uint32_t token_block, uint32_t position, uint64_t seed) {
  return philox4x32({{token_block, position, 0, 0}}, static_cast<uint32_t>(seed),
                    static_cast<uint32_t>(seed >> 32));
}

}  // namespace fs
