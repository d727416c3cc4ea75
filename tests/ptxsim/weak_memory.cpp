// SPDX-License-Identifier: Apache-2.0
#include "weak_memory.h"

#include <algorithm>
#include <cstring>

namespace ptxsim {
namespace {
bool overlap(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes) {
  return a < b + b_bytes && b < a + a_bytes;
}
}  // namespace

void WeakStores::apply(const Store& s) {
  std::memcpy(reinterpret_cast<void*>(s.address), s.data, s.bytes);
}

void WeakStores::read(uint64_t address, uint32_t bytes, void* out) const {
  std::memcpy(out, reinterpret_cast<const void*>(address), bytes);
  for (const Store& s : stores) {
    if (!overlap(address, bytes, s.address, s.bytes)) continue;
    const uint64_t begin = std::max(address, s.address), end = std::min(address + bytes, s.address + s.bytes);
    std::memcpy(static_cast<uint8_t*>(out) + (begin - address), s.data + (begin - s.address), end - begin);
  }
}

void WeakStores::write(uint64_t address, uint32_t bytes, const void* in, uint32_t thread,
                       uint32_t barrier_phase) {
  if (stores.size() >= 4096)
    publish_all();  // hardware does not hold them back for ever either, and reads stay cheap
  Store s;
  s.address = address;
  s.bytes = bytes;
  s.thread = thread;
  s.barrier_phase = barrier_phase;
  std::memcpy(s.data, in, bytes);
  stores.push_back(s);
}

void WeakStores::publish(uint32_t thread, uint32_t barrier_phase) {
  std::erase_if(stores, [&](const Store& s) {
    const bool covered = s.thread / 32 == thread / 32 || s.barrier_phase < barrier_phase;
    if (covered) apply(s);
    return covered;
  });
}

void WeakStores::publish_all() {
  for (const Store& s : stores) apply(s);
  stores.clear();
}

void WeakStores::publish_overlapping(uint64_t address, uint32_t bytes) {
  std::erase_if(stores, [&](const Store& s) {
    const bool same = overlap(address, bytes, s.address, s.bytes);
    if (same) apply(s);
    return same;
  });
}

}  // namespace ptxsim
