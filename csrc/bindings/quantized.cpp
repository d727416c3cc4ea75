// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "core/error.h"
#include "layout/quantized_panel.h"

namespace py = pybind11;

namespace fs {

namespace {

py::tuple shape_of(const char* function, const QuantizedPanels& panels) {
  FS_CHECK(panels.num_rows >= 0 && panels.depth >= 0,
           function << ": N is " << panels.num_rows << ", K is " << panels.depth);
  check_group_size(function, panels.depth, panels.group_size);
  return py::make_tuple(panels.num_panels(), panels.panel_bytes());
}

}  // namespace

void bind_quantized(py::module_& module) {
  module.def(
      "packed_int4_shape",
      [](int64_t num_rows, int64_t depth, int64_t group_size, int64_t form) {
        const bool has_offsets = int4_form("packed_int4_shape", form) != Int4Form::symmetric;
        return shape_of("packed_int4_shape", {num_rows, depth, group_size, 4, has_offsets});
      },
      py::arg("N"), py::arg("K"), py::arg("group_size"), py::arg("form"),
      "The shape, uint8 [P, B], of a weight [N, K] packed by `pack_int4` on the CPU. form: 0 symmetric, 1 "
      "zero\n"
      "points, 2 minimums.");
  module.def(
      "packed_int8_shape",
      [](int64_t num_rows, int64_t depth, int64_t group_size) {
        return shape_of("packed_int8_shape", {num_rows, depth, group_size, 8, false});
      },
      py::arg("N"), py::arg("K"), py::arg("group_size"),
      "The shape, uint8 [P, B], of a weight [N, K] packed by `pack_int8` on the CPU.");
  module.def(
      "quantized_workspace_bytes",
      [](int64_t max_tokens, int64_t depth, int64_t activation_bits) {
        FS_CHECK(max_tokens >= 0 && depth >= 0,
                 "quantized_workspace_bytes: max_tokens is " << max_tokens << ", K is " << depth);
        check_activation_bits("quantized_workspace_bytes", activation_bits);
        return quantized_workspace_bytes(max_tokens, depth, activation_bits);
      },
      py::arg("max_tokens"), py::arg("K"), py::arg("activation_bits"),
      "Bytes of workspace that `linear_int4` and `linear_int8` need on the CPU for at most max_tokens rows.");
}

}  // namespace fs
