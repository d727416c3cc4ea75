// SPDX-License-Identifier: Apache-2.0
#include "cuda/devices.h"

#include <cuda_runtime.h>

namespace fs::cuda {

std::vector<DeviceInfo> list_devices() {
  std::vector<DeviceInfo> devices;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver is an answer, not an error to be found by the next launch
    return devices;
  }
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) continue;
    devices.push_back({index, properties.name, properties.major, properties.minor,
                       properties.multiProcessorCount, static_cast<int64_t>(properties.totalGlobalMem)});
  }
  return devices;
}

}  // namespace fs::cuda
