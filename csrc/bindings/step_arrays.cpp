// SPDX-License-Identifier: Apache-2.0
//
// StepArrays for Python, and recordings of the ops that work on them.
#include "plan/step_arrays.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "bindings/bindings.h"
#include "bindings/dlpack.h"
#include "core/error.h"

namespace py = pybind11;

namespace fs {

namespace {

// Reads the items of a StepPlan: tuples (request, start, num_new_tokens, sample), whose requests have lists
// token_ids and block_ids. Straight from Python's objects: this runs for every request in every step.
class StepReader {
 public:
  explicit StepReader(const py::tuple& items) {
    for (const py::handle item : items) read(item.ptr());
  }

  std::vector<StepRequest> requests() const {
    std::vector<StepRequest> requests;
    requests.reserve(rows_.size());
    const std::span<const int32_t> tokens(tokens_), blocks(blocks_);
    size_t token = 0;
    size_t block = 0;
    for (const Row& row : rows_) {
      requests.push_back({tokens.subspan(token, row.num_tokens), row.start, row.samples,
                          blocks.subspan(block, row.num_blocks)});
      token += row.num_tokens;
      block += row.num_blocks;
    }
    return requests;
  }

 private:
  struct Row {
    int64_t start;
    size_t num_tokens, num_blocks;
    bool samples;
  };

  void read(PyObject* item) {
    static PyObject* const token_ids = PyUnicode_InternFromString("token_ids");
    static PyObject* const block_ids = PyUnicode_InternFromString("block_ids");
    FS_CHECK(PyTuple_Check(item) && PyTuple_GET_SIZE(item) == 4,
             "step arrays: items are tuples (request, start, num_new_tokens, sample)");
    const int64_t start = PyLong_AsLongLong(PyTuple_GET_ITEM(item, 1));
    const int64_t count = PyLong_AsLongLong(PyTuple_GET_ITEM(item, 2));
    const int samples = PyObject_IsTrue(PyTuple_GET_ITEM(item, 3));
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    const py::object tokens = list_of(PyTuple_GET_ITEM(item, 0), token_ids);
    const py::object blocks = list_of(PyTuple_GET_ITEM(item, 0), block_ids);
    FS_CHECK(start >= 0 && count > 0 && count <= PyList_GET_SIZE(tokens.ptr()) - start,
             "step arrays: tokens " << start << " to " << start + count << " are to be computed of "
                                    << PyList_GET_SIZE(tokens.ptr()));
    append(tokens.ptr(), start, start + count, &tokens_);
    append(blocks.ptr(), 0, PyList_GET_SIZE(blocks.ptr()), &blocks_);
    rows_.push_back({start, static_cast<size_t>(count), static_cast<size_t>(PyList_GET_SIZE(blocks.ptr())),
                     samples != 0});
  }

  static py::object list_of(PyObject* request, PyObject* name) {
    auto list = py::reinterpret_steal<py::object>(PyObject_GetAttr(request, name));
    if (!list) throw py::error_already_set();
    FS_CHECK(PyList_Check(list.ptr()), "step arrays: a request's token_ids and block_ids must be lists");
    return list;
  }

  static void append(PyObject* list, Py_ssize_t begin, Py_ssize_t end, std::vector<int32_t>* numbers) {
    for (Py_ssize_t i = begin; i < end; ++i) {
      const long number = PyLong_AsLong(PyList_GET_ITEM(list, i));
      if (number == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
      FS_CHECK(number >= INT32_MIN && number <= INT32_MAX,
               "step arrays: " << number << " does not fit 32 bits");
      numbers->push_back(static_cast<int32_t>(number));
    }
  }

  std::vector<Row> rows_;
  std::vector<int32_t> tokens_, blocks_;
};

py::list layout(const StepArrays& self) {
  py::list arrays;
  for (size_t i = 0; i < self.arrays().size(); ++i) {
    const Tensor& array = self.arrays()[i];
    py::tuple shape(array.ndim);
    for (int d = 0; d < array.ndim; ++d) shape[static_cast<size_t>(d)] = py::int_(array.shape[d]);
    arrays.append(py::make_tuple(self.begin(i), shape));
  }
  return arrays;
}

py::object graph_key(const StepArrays& self) {
  if (!self.is_recordable()) return py::none();
  if (!self.fixed_shapes()) return py::int_(self.num_rows());
  std::string shapes;
  for (const Tensor& array : self.arrays()) {
    shapes.append(reinterpret_cast<const char*>(array.shape),
                  sizeof(int64_t) * static_cast<size_t>(array.ndim));
  }
  return py::bytes(shapes);
}

}  // namespace

void bind_step_arrays(py::module_& module) {
  py::class_<StepArrays>(module, "StepArrays",
                         R"(A step's integers as flat int32 arrays in one piece of memory.

In this order: token_ids [T], positions [T], slot_mapping [T], block_tables [B, MB], sample_rows [R], and for each of
`windows` the items [I, 10], merges [J, 5] and parts [P] of its AttentionPlan. Requests stand depth-first in the tree of
the prefixes that they share. See csrc/plan/step_arrays.h.

A step of at most max_decodes requests, all decodes, can be recorded; with fixed_shapes it is padded to few sizes.
The other arguments are those of AttentionPlan.)")
      .def(py::init([](const std::vector<int>& windows, int block_size, int span, int group_size,
                       int num_kv_heads, int rows_per_item, int rows_per_shared_item, int rows_per_warp,
                       int rows_per_token_read, int fold_levels, int64_t max_decodes, bool fixed_shapes) {
             StepArraysOptions options;
             options.attention.block_size = block_size;
             options.attention.span = span;
             options.attention.group_size = group_size;
             options.attention.num_kv_heads = num_kv_heads;
             options.attention.rows_per_item = rows_per_item;
             options.attention.rows_per_shared_item = rows_per_shared_item;
             options.attention.rows_per_warp = rows_per_warp;
             options.attention.rows_per_token_read = rows_per_token_read;
             options.attention.fold_levels = fold_levels;
             options.windows = windows;
             options.max_decodes = max_decodes;
             options.fixed_shapes = fixed_shapes;
             return std::make_unique<StepArrays>(std::move(options));
           }),
           py::arg("windows"), py::kw_only(), py::arg("block_size"), py::arg("span"), py::arg("group_size"),
           py::arg("num_kv_heads"), py::arg("rows_per_item"), py::arg("rows_per_shared_item"),
           py::arg("rows_per_warp"), py::arg("rows_per_token_read"), py::arg("fold_levels"),
           py::arg("max_decodes"), py::arg("fixed_shapes"))
      .def(
          "build",
          [](StepArrays& self, const py::tuple& items, int num_workers) {
            const StepReader reader(items);
            self.build(reader.requests(), num_workers);
            return py::make_tuple(graph_key(self), self.num_rows(), self.size(), self.num_slots(),
                                  self.num_merges());
          },
          py::arg("items"), py::arg("num_workers"),
          R"(Makes the arrays of a step. items: tuples (request, start, num_new_tokens, sample), as in a StepPlan.

Returns (graph_key, num_rows, size, num_slots, num_merges): what all steps have in common that one recording serves, or
None if the step cannot be recorded; its tokens, with padding; int32 numbers that `write` writes; partial results that
the attention workspace must hold; the most merges of a window. Raises ValueError naming what was given and what is
allowed.)")
      .def(
          "write",
          [](StepArrays& self, py::handle memory) {
            self.write(tensor_from_python(memory.ptr(), "StepArrays.write", "memory"));
          },
          py::arg("memory"), "Copies the arrays to `memory`, a host tensor of `size` int32 or more.")
      .def("layout", &layout, "Of each array where it begins in the memory, in int32 numbers, and its shape.")
      .def_property_readonly("row_starts", &StepArrays::row_starts, "The first row of each item.")
      .def_property_readonly("num_kv_tokens", &StepArrays::num_kv_tokens,
                             "KV tokens of all requests of all steps so far.")
      .def_property_readonly("num_kv_tokens_spared", &StepArrays::num_kv_tokens_spared,
                             "Of these, tokens of shared prefixes that need no second read.");
}

}  // namespace fs
