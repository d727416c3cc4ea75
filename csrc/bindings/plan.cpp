// SPDX-License-Identifier: Apache-2.0
//
// AttentionPlan, prefix_groups and PrefixAnalysis for Python.
#include "plan/attention_plan.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "bindings/bindings.h"
#include "core/error.h"
#include "plan/prefix_analysis.h"
#include "plan/prefix_groups.h"

namespace py = pybind11;

namespace fs {

namespace {

using Int32Array = py::array_t<int32_t, py::array::c_style>;

// Integers as a contiguous int32 array: no copy if they are one already. Values of wider types are checked.
// `columns` > 0: rows of so many of them.
Int32Array int32_array(const py::object& values, const char* name, int columns = 0) {
  const py::array given = py::array::ensure(values);
  if (!given) PyErr_Clear();
  if (columns == 0) {
    FS_CHECK(given && given.ndim() == 1, "attention plan: " << name << " must be a sequence of integers");
  } else {
    FS_CHECK(given && (given.size() == 0 || (given.ndim() == 2 && given.shape(1) == columns)),
             "attention plan: " << name << " must be rows of " << columns << " integers");
  }
  if (py::isinstance<Int32Array>(given)) return given;
  const char kind = given.dtype().kind();
  FS_CHECK(kind == 'i' || kind == 'u' || given.size() == 0,
           "attention plan: " << name << " must hold integers");
  const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(given);
  Int32Array narrow(std::vector<py::ssize_t>(wide.shape(), wide.shape() + wide.ndim()));
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

std::span<const int32_t> span_of(const Int32Array& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

py::tuple prefix_groups(const py::array_t<int32_t, py::array::c_style | py::array::forcecast>& block_tables,
                        const py::object& num_shareable, int block_size) {
  FS_CHECK(block_tables.ndim() == 2, "prefix groups: block_tables must be [requests, blocks]");
  const Int32Array counts = int32_array(num_shareable, "num_shareable");
  const PrefixGroups found =
      find_prefix_groups({block_tables.data(), static_cast<size_t>(block_tables.size())},
                         block_tables.shape(1), span_of(counts), block_size);
  const auto num_groups = static_cast<py::ssize_t>(found.groups.size());
  return py::make_tuple(Int32Array(static_cast<py::ssize_t>(found.order.size()), found.order.data()),
                        Int32Array({num_groups, py::ssize_t{kGroupFields}},
                                   reinterpret_cast<const int32_t*>(found.groups.data())));
}

using Int64Array = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Tokens = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

template <class T>
py::array_t<T> copied(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

void bind_prefix_analysis(py::module_& module) {
  py::class_<PrefixAnalysis>(module, "PrefixAnalysis",
                             R"(Which prompts of a batch begin alike, found before anything runs.

token_ids: int32, the prompts one after another; prompt i is token_ids[starts[i]:starts[i + 1]], not empty.
block_size: prefixes are shared in whole blocks; 1: token by token.
expected_output: int64 [N] or None, tokens that each prompt will probably generate: siblings in the trie go by
descending share of decodes. roots: int32 [N] or None; prompts share only with prompts of the same root.
Arrays are read in place where their types fit. The GIL is free meanwhile. Raises ValueError for lengths that do
not fit each other.)")
      .def(py::init([](const Tokens& token_ids, const Int64Array& starts, int block_size,
                       const std::optional<Int64Array>& expected_output, const std::optional<Tokens>& roots) {
             const auto span = [](const auto& array) {
               return std::span(array.data(), static_cast<size_t>(array.size()));
             };
             const auto expected = expected_output ? span(*expected_output) : std::span<const int64_t>();
             const auto parts = roots ? span(*roots) : std::span<const int32_t>();
             const auto tokens = span(token_ids);
             const auto begins = span(starts);
             py::gil_scoped_release release;
             return std::make_unique<PrefixAnalysis>(tokens, begins, block_size, expected, parts);
           }),
           py::arg("token_ids"), py::arg("starts"), py::kw_only(), py::arg("block_size"),
           py::arg("expected_output") = py::none(), py::arg("roots") = py::none())
      .def_property_readonly(
          "order", [](const PrefixAnalysis& self) { return copied(self.order()); },
          "int64 [N]: the prompts depth-first, so that those of every shared prefix are neighbours.")
      .def_property_readonly(
          "nodes",
          [](const PrefixAnalysis& self) {
            return py::array_t<int64_t>(
                {static_cast<py::ssize_t>(self.nodes().size()), py::ssize_t{kNodeFields}},
                reinterpret_cast<const int64_t*>(self.nodes().data()));
          },
          "int64 [M, 6]: parent (-1: none), begin, end, first_place, num_prompts, num_children. Tokens "
          "[begin, "
          "end) are shared by the prompts in places first_place to first_place + num_prompts of `order`; a "
          "parent comes before its children.")
      .def_property_readonly(
          "node_of", [](const PrefixAnalysis& self) { return copied(self.node_of()); },
          "int64 [N]: the innermost node of each prompt; -1: it shares nothing.")
      .def_property_readonly("num_tokens", &PrefixAnalysis::num_tokens, "Tokens of all prompts.")
      .def_property_readonly("num_computed", &PrefixAnalysis::num_computed,
                             "Tokens to compute when every prefix of whole blocks is computed once.")
      .def_property_readonly("min_computed", &PrefixAnalysis::min_computed,
                             "The least possible: every common token computed once, at least one per prompt.")
      .def(
          "single_level",
          [](const PrefixAnalysis& self) {
            const SingleLevelGroups groups = self.single_level();
            return py::make_tuple(copied(groups.group), copied(groups.prefix_length));
          },
          "BatchLLM's published groups with one level of sharing: (group of each prompt, -1 for none; prefix "
          "length of each group).");
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
rows_per_item, rows_per_shared_item: packed rows (tokens x group_size) of an item, and of one whose rows are of
several requests.
rows_per_warp: items of at most so many packed rows come after all others, as the CUDA kernel needs it; 0: no matter.
tokens_per_partial: what a partial result costs, in KV tokens read; 0: share whatever saves reads.
rows_per_token_read: packed rows that can be computed with a KV token while it is read.
fold_levels: partial results of 2^fold_levels spans fold in a binary tree, these from left to right. A kernel has its
own: 0 on the CPU, 2 on CUDA.
groups: int32 [G, 4], prefixes that requests share, as prefix_groups() returns them. Those that pay are read once
for all their readers; never changes a result.

A plan never changes. items, merges and parts are views into it that keep it alive; treat them as read-only.
Raises ValueError naming what was given and what is allowed.)")
      .def(py::init([](const py::object& query_start, const py::object& seq_lens, int block_size, int span,
                       int group_size, int num_kv_heads, int window, int num_workers, int rows_per_item,
                       int rows_per_shared_item, int rows_per_warp, int tokens_per_partial,
                       int rows_per_token_read, int fold_levels, const py::object& groups) {
             const Int32Array starts = int32_array(query_start, "query_start");
             const Int32Array lens = int32_array(seq_lens, "seq_lens");
             const Int32Array nodes =
                 groups.is_none() ? Int32Array(0) : int32_array(groups, "groups", kGroupFields);
             AttentionPlanOptions options;
             options.block_size = block_size;
             options.span = span;
             options.group_size = group_size;
             options.num_kv_heads = num_kv_heads;
             options.window = window;
             options.num_workers = num_workers;
             options.rows_per_item = rows_per_item;
             options.rows_per_shared_item = rows_per_shared_item;
             options.rows_per_warp = rows_per_warp;
             options.tokens_per_partial = tokens_per_partial;
             options.rows_per_token_read = rows_per_token_read;
             options.fold_levels = fold_levels;
             return AttentionPlan(span_of(starts), span_of(lens), options,
                                  {reinterpret_cast<const PrefixGroup*>(nodes.data()),
                                   static_cast<size_t>(nodes.size() / kGroupFields)});
           }),
           py::arg("query_start"), py::arg("seq_lens"), py::kw_only(), py::arg("block_size"), py::arg("span"),
           py::arg("group_size"), py::arg("num_kv_heads"), py::arg("window") = 0, py::arg("num_workers") = 1,
           py::arg("rows_per_item") = AttentionPlanOptions{}.rows_per_item,
           py::arg("rows_per_shared_item") = AttentionPlanOptions{}.rows_per_shared_item,
           py::arg("rows_per_warp") = AttentionPlanOptions{}.rows_per_warp,
           py::arg("tokens_per_partial") = AttentionPlanOptions{}.tokens_per_partial,
           py::arg("rows_per_token_read") = AttentionPlanOptions{}.rows_per_token_read,
           py::arg("fold_levels") = AttentionPlanOptions{}.fold_levels, py::arg("groups") = py::none())
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
      .def_property_readonly("num_tokens_read", &AttentionPlan::num_tokens_read,
                             "KV tokens that the items of one KV head read.")
      .def_property_readonly(
          "num_tokens_spared", &AttentionPlan::num_tokens_spared,
          "KV tokens that sharing spares one KV head: those of shared prefixes, for every reader but one.")
      .def_property_readonly("num_shared_items", &AttentionPlan::num_shared_items,
                             "Items that read KV for rows of several requests.")
      .def_property_readonly(
          "span", [](const AttentionPlan& plan) { return plan.options().span; }, "Tokens of a span.")
      .def("workspace_floats", &AttentionPlan::workspace_floats, py::arg("num_heads"), py::arg("head_dim"),
           "Size of the workspace in floats for num_heads query heads of head_dim.");
  bind_prefix_analysis(module);
  module.def("prefix_groups", &prefix_groups, py::arg("block_tables"), py::arg("num_shareable"),
             py::kw_only(), py::arg("block_size"),
             R"(Which requests of a step have which KV in the same blocks.

block_tables: int32 [B, MB]. num_shareable: int32 [B], leading blocks of each that it only reads in this step.
Returns (order, groups). order: int32 [B], the requests depth-first, so that the readers of every prefix are
neighbours; unchanged if nothing is shared. groups: int32 [G, 4], kv_begin, kv_end, request_begin, request_end: tokens
[kv_begin, kv_end) are shared by the requests in these places of `order`; a parent before its children.
Raises ValueError naming what was given and what is allowed.)");
}

}  // namespace fs
