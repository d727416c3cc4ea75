// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#if defined(FS_CUDA)
#include "cuda/devices.h"
#endif

namespace py = pybind11;

namespace fs {

void bind_cuda(py::module_& module) {
#if defined(FS_CUDA)
  module.attr("built_with_cuda") = true;
#else
  module.attr("built_with_cuda") = false;
#endif
  module.def(
      "cuda_devices",
      [] {
        py::list devices;
#if defined(FS_CUDA)
        for (const cuda::DeviceInfo& info : cuda::list_devices()) {
          py::dict device;
          device["index"] = info.index;
          device["name"] = info.name;
          device["capability"] = py::make_tuple(info.capability_major, info.capability_minor);
          device["multiprocessors"] = info.multiprocessors;
          device["memory_bytes"] = info.memory_bytes;
          devices.append(device);
        }
#endif
        return devices;
      },
      "The CUDA devices that ops can run on, as dicts; empty without a driver, a device or CUDA kernels.");
}

}  // namespace fs
