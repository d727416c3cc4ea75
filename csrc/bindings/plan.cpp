// SPDX-License-Identifier: Apache-2.0
//
// AttentionPlan for Python.
#include "plan/attention_plan.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "core/error.h"

namespace py = pybind11;

namespace fs {

namespace {

using Int32Array = py::array_t<int32_t, py::array::c_style>;

// Integers as a contiguous int32 array: no copy if they are one already. Values of wider types are checked.
Int32Array int32_array(const py::object& values, const char* name) {
  const py::array given = py::array::ensure(values);
  if (!given) PyErr_Clear();
  FS_CHECK(given && given.ndim() == 1, "attention plan: " << name << " must be a sequence of integers");
  if (py::isinstance<Int32Array>(given)) return given;
  const char kind = given.dtype().kind();
  FS_CHECK(kind == 'i' || kind == 'u' || given.size() == 0,
           "attention plan: " << name << " must hold integers");
  const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(given);
  Int32Array narrow(wide.size());
  int32_t* out = narrow.mutable_data();
  for (py::ssize_t i = 0; i < wide.size(); ++i) {
    const int64_t value = wide.data()[i];
    FS_CHECK(value >= INT32_MIN && value <= INT32_MAX,
             "attention plan: " << name << "[" << i << "] is " << value << "; must fit 32 bits");
    out[i] = static_cast<int32_t>(value);
  }
  return narrow;
}

// A view of one of the plan's vectors. `self`, the Python plan, is its base and so outlives it; a plan never
// changes.
template <class T>
py::array_t<int32_t> view(const std::vector<T>& rows, int fields, const py::object& self) {
  const auto count = static_cast<py::ssize_t>(rows.size());
  const auto* data = reinterpret_cast<const int32_t*>(rows.data());
  if (fields == 1) return py::array_t<int32_t>({count}, data, self);
  return py::array_t<int32_t>({count, static_cast<py::ssize_t>(fields)}, data, self);
}

}  // namespace

void bind_plan(py::module_& module) {
  py::class_<AttentionPlan>(module, "AttentionPlan", R"(One step's attention as a list of work items.

query_start: int32 [B + 1], cumulative query rows; request b has rows query_start[b] to query_start[b + 1].
seq_lens: int32 [B], tokens of each request with this step's included; its rows are the last of them.
block_size, span: tokens; span must be a multiple of block_size and be the one given to ops.attention.
group_size, num_kv_heads: query heads per KV head, KV heads.
window: a row sees its last `window` tokens, itself included; 0: all.
num_workers: threads that should have work at the same time; decides only how items are cut, never a result.
rows_per_item: packed rows (tokens x group_size) of an item.

A plan never changes. items, merges and parts are views into it that keep it alive; treat them as read-only.
Raises ValueError naming what was given and what is allowed.)")
      .def(py::init([](const py::object& query_start, const py::object& seq_lens, int block_size, int span,
                       int group_size, int num_kv_heads, int window, int num_workers, int rows_per_item) {
             const Int32Array starts = int32_array(query_start, "query_start");
             const Int32Array lens = int32_array(seq_lens, "seq_lens");
             AttentionPlanOptions options;
             options.block_size = block_size;
             options.span = span;
             options.group_size = group_size;
             options.num_kv_heads = num_kv_heads;
             options.window = window;
             options.num_workers = num_workers;
             options.rows_per_item = rows_per_item;
             return AttentionPlan({starts.data(), static_cast<size_t>(starts.size())},
                                  {lens.data(), static_cast<size_t>(lens.size())}, options);
           }),
           py::arg("query_start"), py::arg("seq_lens"), py::kw_only(), py::arg("block_size"), py::arg("span"),
           py::arg("group_size"), py::arg("num_kv_heads"), py::arg("window") = 0, py::arg("num_workers") = 1,
           py::arg("rows_per_item") = AttentionPlanOptions{}.rows_per_item)
      .def_property_readonly(
          "items",
          [](const py::object& self) {
            return view(self.cast<const AttentionPlan&>().items(), kItemFields, self);
          },
          "int32 [I, 10]: row_begin, num_rows, kv_begin, kv_end, position, request, slot, num_parts, "
          "merge_begin, "
          "num_merges; the most work first.")
      .def_property_readonly(
          "merges",
          [](const py::object& self) {
            return view(self.cast<const AttentionPlan&>().merges(), kMergeFields, self);
          },
          "int32 [J, 5]: row_begin, num_rows, parts_begin, parts_end, num_items; sorted by row.")
      .def_property_readonly(
          "parts",
          [](const py::object& self) { return view(self.cast<const AttentionPlan&>().parts(), 1, self); },
          "int32 [P]: workspace slots in the order in which merges fold them.")
      .def_property_readonly("num_slots", &AttentionPlan::num_slots,
                             "Partial results that the workspace holds, each for one row and all heads.")
      .def_property_readonly(
          "span", [](const AttentionPlan& plan) { return plan.options().span; }, "Tokens of a span.")
      .def("workspace_floats", &AttentionPlan::workspace_floats, py::arg("num_heads"), py::arg("head_dim"),
           "Size of the workspace in floats for num_heads query heads of head_dim.");
}

}  // namespace fs
