// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "layout/int4_fragment.h"
#include "layout/int8_fragment.h"
#include "layout/stripes.h"
#include "ops/ops.h"
#if defined(FS_CUDA)
#include "cuda/devices.h"
#endif

namespace py = pybind11;

namespace fs {

namespace {

void check_workspace_of(const char* function, int64_t max_tokens, int64_t depth, int num_multiprocessors) {
  FS_CHECK(max_tokens >= 0 && depth >= 0 && num_multiprocessors > 0,
           function << ": max_tokens is " << max_tokens << ", K is " << depth << ", num_multiprocessors is "
                    << num_multiprocessors);
}

}  // namespace

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
  module.def(
      "cuda_packed_int4_shape",
      [](int64_t num_rows, int64_t depth, int64_t group_size, int64_t form) {
        constexpr const char* name = "cuda_packed_int4_shape";
        FS_CHECK(num_rows >= 0 && depth >= 0, name << ": N is " << num_rows << ", K is " << depth);
        check_group_size(name, depth, group_size);
        const Int4Layout layout = int4_layout(num_rows, depth, group_size, int4_form(name, form));
        return py::make_tuple(layout.num_panels, layout.panel_bytes());
      },
      py::arg("N"), py::arg("K"), py::arg("group_size"), py::arg("form"),
      "The shape, uint8 [P, B], of a weight [N, K] packed by `pack_int4` on a CUDA device. form: 0 "
      "symmetric,\n"
      "1 zero points, 2 minimums.");
  module.def(
      "cuda_packed_int8_shape",
      [](int64_t num_rows, int64_t depth, int64_t group_size) {
        constexpr const char* name = "cuda_packed_int8_shape";
        FS_CHECK(num_rows >= 0 && depth >= 0, name << ": N is " << num_rows << ", K is " << depth);
        check_group_size(name, depth, group_size);
        return py::make_tuple(int8_num_panels(num_rows), int8_panel_bytes(depth));
      },
      py::arg("N"), py::arg("K"), py::arg("group_size"),
      "The shape, uint8 [P, B], of a weight [N, K] packed by `pack_int8` on a CUDA device.");
  module.attr("cuda_linear_counters") = kLinearCounters;
  module.def(
      "cuda_linear_workspace_bytes",
      [](int64_t max_tokens, int num_multiprocessors) {
        check_workspace_of("cuda_linear_workspace_bytes", max_tokens, 0, num_multiprocessors);
        return stripes_workspace_bytes(linear_tile_rows(max_tokens), num_multiprocessors);
      },
      py::arg("max_tokens"), py::arg("num_multiprocessors"),
      "Bytes of workspace that `linear` and `linear_int8` need on a CUDA device for at most max_tokens "
      "rows.");
  module.def(
      "cuda_int4_workspace_bytes",
      [](int64_t max_tokens, int64_t depth, int num_multiprocessors, bool reorders) {
        check_workspace_of("cuda_int4_workspace_bytes", max_tokens, depth, num_multiprocessors);
        return int4_workspace_bytes(max_tokens, depth, num_multiprocessors, reorders);
      },
      py::arg("max_tokens"), py::arg("K"), py::arg("num_multiprocessors"), py::arg("reorders"),
      "Bytes of workspace that `linear_int4` needs on a CUDA device for at most max_tokens rows of K "
      "inputs;\n"
      "`reorders`: with an input_order.");
}

}  // namespace fs
