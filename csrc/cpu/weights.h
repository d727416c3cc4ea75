// SPDX-License-Identifier: Apache-2.0
//
// From a weight tensor's dtype to a C++ type, once per op call.
#pragma once

#include "core/simd.h"
#include "core/tensor.h"

namespace fs::FS_ISA {

// Calls f with a null pointer of the element type: visit_weights(w.dtype, [&](auto* tag) { using W = ...; }).
template <class F>
void visit_weights(DType dtype, const F& f) {
  if (dtype == DType::f32) {
    f(static_cast<float*>(nullptr));
  } else if (dtype == DType::bf16) {
    f(static_cast<bf16*>(nullptr));
  } else {
    f(static_cast<f16*>(nullptr));
  }
}

}  // namespace fs::FS_ISA
