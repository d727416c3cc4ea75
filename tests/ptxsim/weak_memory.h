// SPDX-License-Identifier: Apache-2.0
// Weak-memory mode: ordinary global stores of a block stay invisible to other blocks until a fence or a
// release publishes them. A fence publishes the stores of its own thread, and those its block had ordered
// before it with a barrier.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace ptxsim {

struct WeakStores {
  struct Store {
    uint64_t address;
    uint32_t bytes;
    uint32_t thread, barrier_phase;
    uint8_t data[32];
  };
  std::vector<Store> stores;  // in program order

  // The bytes at `address` as this block sees them.
  void read(uint64_t address, uint32_t bytes, void* out) const;
  void write(uint64_t address, uint32_t bytes, const void* in, uint32_t thread, uint32_t barrier_phase);
  // Publishes what a fence by `thread` in `barrier_phase` must make visible.
  void publish(uint32_t thread, uint32_t barrier_phase);
  void publish_all();
  // An atomic or strong access to these bytes: earlier stores to the same bytes come first (coherence).
  void publish_overlapping(uint64_t address, uint32_t bytes);

 private:
  static void apply(const Store& s);
};

}  // namespace ptxsim
