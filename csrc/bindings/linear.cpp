// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/bindings.h"
#include "core/error.h"
#include "layout/panel.h"

namespace py = pybind11;

namespace fs {

namespace {

// From "bfloat16" or torch.bfloat16 to the dtype, among the weight dtypes.
DType weight_dtype(const py::handle& given) {
  std::string name = py::str(given);
  if (name.starts_with("torch.")) name.erase(0, 6);
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw Error("dtype is '" + name + "'; linear takes float32, bfloat16, float16");
}

}  // namespace

void bind_linear(py::module_& module) {
  module.def(
      "packed_linear_shape",
      [](int64_t num_rows, int64_t depth) {
        FS_CHECK(num_rows >= 0 && depth >= 0, "packed_linear_shape: N is " << num_rows << ", K is " << depth);
        return py::make_tuple(num_panels(num_rows), padded_depth(depth), kPanelRows);
      },
      py::arg("N"), py::arg("K"), "The shape of a weight [N, K] packed by `pack_linear`.");
  module.def(
      "linear_workspace_bytes",
      [](int64_t max_tokens, int64_t depth, const py::object& dtype) {
        FS_CHECK(max_tokens >= 0 && depth >= 0,
                 "linear_workspace_bytes: max_tokens is " << max_tokens << ", K is " << depth);
        return linear_workspace_bytes(max_tokens, depth, weight_dtype(dtype));
      },
      py::arg("max_tokens"), py::arg("K"), py::arg("dtype"),
      "Bytes of workspace that `linear` needs for at most max_tokens rows of K inputs and weights of dtype\n"
      "('bfloat16' or torch.bfloat16), whatever the instruction set and the number of threads.");
}

}  // namespace fs
