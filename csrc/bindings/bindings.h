// SPDX-License-Identifier: Apache-2.0
//
// The parts of the extension module, one function each.
#pragma once

#include <pybind11/pybind11.h>

namespace fs {

void bind_ops(pybind11::module_& module);          // ops and their table
void bind_cuda(pybind11::module_& module);         // the CUDA devices
void bind_kv(pybind11::module_& module);           // BlockPool, PrefixTree
void bind_plan(pybind11::module_& module);         // AttentionPlan
void bind_recording(pybind11::module_& module);    // Recording
void bind_step_arrays(pybind11::module_& module);  // StepArrays
void bind_linear(pybind11::module_& module);       // sizes that `linear` needs
void bind_quantized(pybind11::module_& module);    // sizes that `linear_int4` and `linear_int8` need

}  // namespace fs
