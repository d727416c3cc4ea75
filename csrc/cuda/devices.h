// SPDX-License-Identifier: Apache-2.0
//
// The CUDA devices of this machine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fs::cuda {

struct DeviceInfo {
  int index;
  std::string name;
  int capability_major, capability_minor;
  int multiprocessors;
  int64_t memory_bytes;
};

// Empty on a machine without a CUDA driver or device; never throws for that.
std::vector<DeviceInfo> list_devices();

}  // namespace fs::cuda
