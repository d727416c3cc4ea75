// SPDX-License-Identifier: Apache-2.0
//
// What `linear`, `linear_int4` and `linear_int8` demand of their arguments on the CPU, beyond the declared
// shapes.
#pragma once

#include "layout/panel.h"
#include "layout/quantized_panel.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

inline void check_linear(const Linear& op) {
  const int64_t num_rows = op.out.shape[1], depth = op.x.shape[1];
  FS_CHECK(op.packed.shape[0] == num_panels(num_rows) && op.packed.shape[1] == padded_depth(depth),
           "linear: argument 'packed' is [" << op.packed.shape[0] << ", " << op.packed.shape[1]
                                            << ", 32]; with out [M, " << num_rows << "] and x [M, " << depth
                                            << "] it must be [" << num_panels(num_rows) << ", "
                                            << padded_depth(depth) << ", 32]");
  const int64_t needed = linear_workspace_bytes(op.x.shape[0], depth, op.packed.dtype);
  FS_CHECK(op.workspace.shape[0] >= needed, "linear: argument 'workspace' has "
                                                << op.workspace.shape[0] << " bytes; needs " << needed
                                                << " for " << op.x.shape[0] << " rows of " << depth);
}

inline void check_quantized(const char* op, const Tensor& packed, const QuantizedPanels& panels,
                            const Tensor& workspace, int64_t num_tokens, int64_t activation_bits) {
  check_group_size(op, panels.depth, panels.group_size);
  check_activation_bits(op, activation_bits);
  FS_CHECK(packed.shape[0] == panels.num_panels() && packed.shape[1] == panels.panel_bytes(),
           op << ": argument 'packed' is [" << packed.shape[0] << ", " << packed.shape[1]
              << "]; with out [M, " << panels.num_rows << "], x [M, " << panels.depth << "] and groups of "
              << panels.group_size << " it must be [" << panels.num_panels() << ", " << panels.panel_bytes()
              << "]");
  const int64_t needed = quantized_workspace_bytes(num_tokens, panels.depth, activation_bits);
  FS_CHECK(workspace.shape[0] >= needed, op << ": argument 'workspace' has " << workspace.shape[0]
                                            << " bytes; needs " << needed << " for " << num_tokens
                                            << " rows of " << panels.depth);
}

// The checked panels of an op's weight, and for int4 its form and order of inputs.
struct Int4Arguments {
  Int4Form form;
  QuantizedPanels panels;
  const int32_t* order;  // null: as they come
};

inline Int4Arguments check_int4(const LinearInt4& op) {
  const Int4Form form = int4_form("linear_int4", op.form);
  const QuantizedPanels panels{op.out.shape[1], op.x.shape[1], op.group_size, 4, form != Int4Form::symmetric};
  check_quantized("linear_int4", op.packed, panels, op.workspace, op.x.shape[0], op.activation_bits);
  const int32_t* order = op.input_order.defined() ? op.input_order.ptr<const int32_t>() : nullptr;
  for (int64_t k = 0; order != nullptr && k < panels.depth; ++k) {
    FS_CHECK(order[k] >= 0 && order[k] < panels.depth, "linear_int4: input_order[" << k << "] is " << order[k]
                                                                                   << "; inputs are 0 to "
                                                                                   << panels.depth - 1);
  }
  return {form, panels, order};
}

inline QuantizedPanels check_int8(const LinearInt8& op) {
  const QuantizedPanels panels{op.out.shape[1], op.x.shape[1], op.group_size, 8, false};
  check_quantized("linear_int8", op.packed, panels, op.workspace, op.x.shape[0], op.activation_bits);
  return panels;
}

}  // namespace fs::FS_ISA
