// SPDX-License-Identifier: Apache-2.0
//
// Weights [N, K] into panels (layout/panel.h). Runs once per weight at load. Bound: memory.
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/weights.h"
#include "layout/panel.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

// Rows are read forwards and scattered into the panel, which stays in the cache.
template <class W>
void pack_panel(W* panel, const W* weight, int64_t row_stride, int64_t num_rows, int64_t depth, bool paired) {
  for (int64_t row = 0; row < kPanelRows; ++row) {
    const W* source = weight + row * row_stride;
    for (int64_t k = 0; k < padded_depth(depth); ++k) {
      panel[panel_offset(row, k, depth, paired)] = row < num_rows && k < depth ? source[k] : W{};
    }
  }
}

void pack_linear(const PackLinear& op, const OpContext&) {
  const int64_t num_rows = op.weight.shape[0];
  const int64_t depth = op.weight.shape[1];
  FS_CHECK(op.packed.dtype == op.weight.dtype, "pack_linear: argument 'packed' is "
                                                   << name_of(op.packed.dtype) << " but 'weight' is "
                                                   << name_of(op.weight.dtype));
  FS_CHECK(op.packed.shape[0] == num_panels(num_rows) && op.packed.shape[1] == padded_depth(depth),
           "pack_linear: argument 'packed' is ["
               << op.packed.shape[0] << ", " << op.packed.shape[1] << ", 32]; a weight [" << num_rows << ", "
               << depth << "] needs [" << num_panels(num_rows) << ", " << padded_depth(depth) << ", 32]");
  visit_weights(op.weight.dtype, [&](auto* tag) {
    using W = std::remove_pointer_t<decltype(tag)>;
    const bool paired = is_paired(op.weight.dtype);
    parallel_rows(num_panels(num_rows), 1, [&](int64_t panel, int64_t, int) {
      const int64_t first = panel * kPanelRows;
      const int64_t rest = num_rows - first;
      pack_panel(op.packed.ptr<W>() + panel_offset(first, 0, depth, paired),
                 op.weight.ptr<const W>() + first * op.weight.stride[0], op.weight.stride[0],
                 rest < kPanelRows ? rest : kPanelRows, depth, paired);
    });
  });
}

}  // namespace

FS_REGISTER_CPU(PackLinear, pack_linear, kWeights)

}  // namespace fs::FS_ISA
