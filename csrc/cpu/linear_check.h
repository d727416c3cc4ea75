// SPDX-License-Identifier: Apache-2.0
//
// What `linear`, `linear_int4`, `linear_int8` and their gated forms demand of their arguments on the CPU,
// beyond the declared shapes.
#pragma once

#include <type_traits>

#include "layout/panel.h"
#include "layout/quantized_panel.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

// How many rows the weight of an op has.
template <class Op>
int64_t weight_rows(const Op& op) {
  return op.out.shape[1];
}
template <class Op>
  requires(std::is_same_v<Op, LinearGated> || std::is_same_v<Op, LinearInt4Gated> ||
           std::is_same_v<Op, LinearInt8Gated>)
int64_t weight_rows(const Op& op) {
  const int64_t width = op.out.shape[1];
  FS_CHECK(width % kGatedRows == 0, Op::info.name << ": argument 'out' is [M, " << width << "]; multiples of "
                                                  << kGatedRows << " are allowed: compute gate and up apart");
  return 2 * width;
}

// For instruction sets that do not multiply in bfloat16.
template <class Op>
void check_float32(const Op& op) {
  for (const Tensor* tensor : {&op.out, &op.x}) {
    FS_CHECK(tensor->dtype == DType::f32, Op::info.name
                                              << ": argument '" << (tensor == &op.x ? "x" : "out")
                                              << "' is bfloat16; such weights and activation_bits take "
                                                 "float32 on this instruction set");
  }
}

template <class Op>
void check_linear(const Op& op) {
  const int64_t num_rows = weight_rows(op), depth = op.x.shape[1];
  const char* name = Op::info.name;
  FS_CHECK(op.packed.shape[0] == num_panels(num_rows) && op.packed.shape[1] == padded_depth(depth),
           name << ": argument 'packed' is [" << op.packed.shape[0] << ", " << op.packed.shape[1]
                << ", 32]; with out [M, " << op.out.shape[1] << "] and x [M, " << depth << "] it must be ["
                << num_panels(num_rows) << ", " << padded_depth(depth) << ", 32]");
  const int64_t needed = linear_workspace_bytes(op.x.shape[0], depth, op.packed.dtype);
  FS_CHECK(op.workspace.shape[0] >= needed, name << ": argument 'workspace' has " << op.workspace.shape[0]
                                                 << " bytes; needs " << needed << " for " << op.x.shape[0]
                                                 << " rows of " << depth);
}

inline void check_quantized(const char* op, const Tensor& packed, const QuantizedPanels& panels,
                            const Tensor& workspace, int64_t num_tokens, int64_t activation_bits) {
  check_group_size(op, panels.depth, panels.group_size);
  check_activation_bits(op, activation_bits);
  FS_CHECK(packed.shape[0] == panels.num_panels() && packed.shape[1] == panels.panel_bytes(),
           op << ": argument 'packed' is [" << packed.shape[0] << ", " << packed.shape[1] << "]; with "
              << panels.num_rows << " rows of weights, x [M, " << panels.depth << "] and groups of "
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

template <class Op>
Int4Arguments check_int4(const Op& op) {
  const char* name = Op::info.name;
  const Int4Form form = int4_form(name, op.form);
  const QuantizedPanels panels{weight_rows(op), op.x.shape[1], op.group_size, 4, form != Int4Form::symmetric};
  check_quantized(name, op.packed, panels, op.workspace, op.x.shape[0], op.activation_bits);
  const int32_t* order = op.input_order.defined() ? op.input_order.template ptr<const int32_t>() : nullptr;
  for (int64_t k = 0; order != nullptr && k < panels.depth; ++k) {
    FS_CHECK(order[k] >= 0 && order[k] < panels.depth, name << ": input_order[" << k << "] is " << order[k]
                                                            << "; inputs are 0 to " << panels.depth - 1);
  }
  return {form, panels, order};
}

template <class Op>
QuantizedPanels check_int8(const Op& op) {
  const QuantizedPanels panels{weight_rows(op), op.x.shape[1], op.group_size, 8, false};
  check_quantized(Op::info.name, op.packed, panels, op.workspace, op.x.shape[0], op.activation_bits);
  return panels;
}

}  // namespace fs::FS_ISA
