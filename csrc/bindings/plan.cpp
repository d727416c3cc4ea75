// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"

namespace fs {

void bind_plan(pybind11::module_&) {}

}  // namespace fs
