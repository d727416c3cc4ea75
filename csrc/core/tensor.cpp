// SPDX-License-Identifier: Apache-2.0
#include "core/tensor.h"

namespace fs {

std::string to_string(DTypes dtypes) {
  std::string text;
  for (int i = 0; i < kNumDTypes; ++i) {
    const auto dtype = static_cast<DType>(i);
    if (!dtypes.contains(dtype)) continue;
    if (!text.empty()) text += '|';
    text += name_of(dtype);
  }
  return text;
}

std::string describe(const Tensor& tensor) {
  if (!tensor.defined()) return "None";
  std::string text = "[";
  for (int d = 0; d < tensor.ndim; ++d) {
    if (d > 0) text += ", ";
    text += std::to_string(tensor.shape[d]);
  }
  return text + "] " + name_of(tensor.dtype) + " on " + name_of(tensor.device);
}

}  // namespace fs
