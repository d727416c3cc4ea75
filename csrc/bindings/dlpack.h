// SPDX-License-Identifier: Apache-2.0
//
// Python tensors as fs::Tensor, through DLPack's C exchange table: no copy, no reference counting, about 20
// ns each. The view is valid while the Python object is alive and unchanged, which the caller of an op
// guarantees.
#pragma once

#include <Python.h>

#include "core/tensor.h"

namespace fs {

// Fills `out` from a tensor object whose type has `__dlpack_c_exchange_api__` (torch >= 2.10). Throws
// fs::Error with what was given otherwise. `label` names the argument in messages ("linear: argument 'x'").
Tensor tensor_from_python(PyObject* object, const char* op_name, const char* arg_name);

// The stream that the tensor's framework currently works on; null on the CPU.
void* current_stream(PyObject* object, const Tensor& tensor);

}  // namespace fs
