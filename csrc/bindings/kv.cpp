// SPDX-License-Identifier: Apache-2.0
//
// BlockPool and PrefixTree for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "kv/block_pool.h"
#include "kv/prefix_tree.h"

namespace py = pybind11;

namespace fs {
namespace {

// A Python sequence of ints as a span of int32. A contiguous int32 buffer (array.array('i'), numpy.int32,
// ...) is read in place; anything else is converted item by item. Lives for one call; the buffer cannot be
// resized meanwhile.
class Int32Span {
 public:
  Int32Span(py::handle object, const char* name) {
    if (PyObject_CheckBuffer(object.ptr()) && take_buffer(object)) return;
    convert(object, name);
  }
  ~Int32Span() {
    if (view_.obj != nullptr) PyBuffer_Release(&view_);
  }
  Int32Span(const Int32Span&) = delete;
  Int32Span& operator=(const Int32Span&) = delete;

  operator std::span<const int32_t>() const { return span_; }

 private:
  bool take_buffer(py::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0) {
      PyErr_Clear();  // strided, for example: the sequence protocol will do
      view_.obj = nullptr;
      return false;
    }
    const std::string format = view_.format == nullptr ? "B" : view_.format;
    const bool is_int32 =
        view_.itemsize == 4 && (format == "i" || format == "l" || format == "=i" || format == "=l");
    if (!is_int32 || view_.ndim != 1) {
      PyBuffer_Release(&view_);  // clears view_.obj
      return false;
    }
    span_ = {static_cast<const int32_t*>(view_.buf), static_cast<size_t>(view_.shape[0])};
    return true;
  }

  void convert(py::handle object, const char* name) {
    const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(object.ptr(), ""));
    if (!items) {
      PyErr_Clear();
      throw py::type_error(std::string(name) + " must be a sequence of ints or an int32 buffer, got " +
                           Py_TYPE(object.ptr())->tp_name);
    }
    values_.reserve(static_cast<size_t>(PySequence_Fast_GET_SIZE(items.ptr())));
    // The size is read anew each time and the item held: an item's __index__ may be Python code that changes
    // the list.
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.ptr()); ++i) {
      const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(items.ptr(), i));
      int overflow = 0;
      const long value = PyLong_AsLongAndOverflow(item.ptr(), &overflow);
      if (value == -1 && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        throw py::type_error(std::string(name) + "[" + std::to_string(i) + "] must be an int, got " +
                             Py_TYPE(item.ptr())->tp_name);
      }
      using Limits = std::numeric_limits<int32_t>;
      FS_CHECK(overflow == 0 && value >= Limits::min() && value <= Limits::max(),
               name << "[" << static_cast<int64_t>(i) << "] must fit into 32 bits, got "
                    << py::str(item).cast<std::string>());
      values_.push_back(static_cast<int32_t>(value));
    }
    span_ = values_;
  }

  Py_buffer view_{};
  std::vector<int32_t> values_;
  std::span<const int32_t> span_;
};

std::pair<NodeId, std::vector<int32_t>> to_pair(Chain chain) {
  return {chain.node, std::move(chain.block_ids)};
}

void bind_block_pool(py::module_& module) {
  py::class_<BlockPool>(module, "BlockPool", R"(Who owns which block of the KV cache.

A block is *used* (ref_count > 0), *evictable* (unreferenced, but a PrefixTree still finds its content) or *free*.
Every operation is O(1). Misuse raises NativeError with the values. Not thread-safe.)")
      .def(py::init<int>(), py::arg("num_blocks"),
           "num_blocks > 0 free blocks with the ids 0 to num_blocks - 1.")
      .def("allocate", &BlockPool::allocate,
           "Take a free block; its ref_count is 1. Raises OutOfBlocks if num_free is 0: evictable blocks are "
           "not taken.")
      .def(
          "ref", &BlockPool::ref, py::arg("block_id"),
          "One more reference to a used or evictable block. Raises NativeError for a free block or a bad id.")
      .def("unref", &BlockPool::unref, py::arg("block_id"),
           "One reference less. The last one makes a cached block evictable and any other free.\n\n"
           "Raises NativeError for an unreferenced block or a bad id.")
      .def("ref_count", &BlockPool::ref_count, py::arg("block_id"), "Number of references to the block.")
      .def("is_cached", &BlockPool::is_cached, py::arg("block_id"),
           "Whether the prefix tree finds this block.")
      .def_property_readonly("num_blocks", &BlockPool::num_blocks,
                             "All blocks: num_used + num_evictable + num_free.")
      .def_property_readonly("num_used", &BlockPool::num_used, "Blocks with references.")
      .def_property_readonly("num_evictable", &BlockPool::num_evictable, "Cached blocks without references.")
      .def_property_readonly("num_free", &BlockPool::num_free, "Blocks that allocate() may take.")
      .def("check", &BlockPool::check,
           "Prove every invariant, O(num_blocks); raises NativeError with the values.")
      .def("__repr__", [](const BlockPool& pool) {
        return "BlockPool(num_blocks=" + std::to_string(pool.num_blocks()) +
               ", used=" + std::to_string(pool.num_used()) +
               ", evictable=" + std::to_string(pool.num_evictable()) +
               ", free=" + std::to_string(pool.num_free()) + ")";
      });
}

void bind_prefix_tree(py::module_& module) {
  py::class_<PrefixTree>(module, "PrefixTree",
                         R"(Which token sequences have their KV in blocks of a BlockPool.

A node is one full block of block_size token ids; each salt has a root of its own, so different salts share nothing.
Nodes are named by int handles. The handle of a node is valid while its block is referenced; a request that references
a node references all its ancestors. A stale handle, or one of another tree, raises NativeError.

token_ids and block_ids are sequences of ints; a contiguous int32 buffer is read without a copy. Not thread-safe.)")
      .def(py::init<BlockPool&, int, int>(), py::keep_alive<1, 2>(), py::arg("pool"), py::arg("block_size"),
           py::kw_only(), py::arg("hash_bits") = 64,
           "The one tree of `pool`, with block_size > 0 tokens per block. hash_bits < 64 makes collisions "
           "common, for\n"
           "tests: results do not depend on it.")
      .def(
          "match",
          [](PrefixTree& tree, py::handle token_ids, const std::string& salt) {
            const Int32Span tokens(token_ids, "token_ids");
            return to_pair(tree.match(tokens, salt));
          },
          py::arg("token_ids"), py::arg("salt") = "",
          R"(The longest chain of cached full blocks that begins token_ids: (node, block_ids).

Every returned block is ref()ed for the caller. `node` is the last one matched, or the root of `salt`.)")
      .def(
          "insert",
          [](PrefixTree& tree, NodeId node, py::handle token_ids, py::handle block_ids) {
            const Int32Span tokens(token_ids, "token_ids");
            const Int32Span blocks(block_ids, "block_ids");
            return to_pair(tree.insert(node, tokens, blocks));
          },
          py::arg("node"), py::arg("token_ids"), py::arg("block_ids"),
          R"(Cache full blocks that continue `node`: (last node, block_ids to use from now on).

len(token_ids) == len(block_ids) * block_size. Where an equal node exists, the caller's block is unref()ed and the
node's block ref()ed and returned in its place. Raises NativeError, and changes nothing, for a stale node, wrong lengths,
or blocks that are repeated, unreferenced or cached under other tokens.)")
      .def("evict", &PrefixTree::evict, py::arg("num_blocks"),
           R"(Free up to num_blocks unreferenced blocks and return how many.

The next to go is always, among those without cached children, the one unreferenced for longest.)")
      .def(
          "discard", &PrefixTree::discard, py::arg("node"), py::arg("num_blocks"),
          R"(Forget the last num_blocks nodes of the chain ending in `node`; returns the node that is now the last.

For inserts whose KV was never computed. References stay with their holders. Raises NativeError, and changes nothing, if
one of the nodes has children outside the chain: undo the latest insert first.)")
      .def("clear", &PrefixTree::clear, "Forget all nodes that no request references; returns how many.")
      .def("depth", &PrefixTree::depth, py::arg("node"),
           "Blocks from the root to `node`, itself included; 0 for a root.")
      .def("num_tokens", &PrefixTree::num_tokens, py::arg("node"), "depth(node) * block_size.")
      .def("parent", &PrefixTree::parent, py::arg("node"),
           "The parent's handle. Raises NativeError for a root.")
      .def("block_id", &PrefixTree::block_id, py::arg("node"),
           "The node's block. Raises NativeError for a root.")
      .def_property_readonly("num_cached", &PrefixTree::num_cached, "Number of nodes, roots not counted.")
      .def_property_readonly("block_size", &PrefixTree::block_size, "Tokens per block.")
      .def("check", &PrefixTree::check,
           "Prove every invariant of the tree and its pool, O(num_blocks); raises NativeError with the "
           "values.")
      .def("__repr__", [](const PrefixTree& tree) {
        return "PrefixTree(block_size=" + std::to_string(tree.block_size()) +
               ", num_cached=" + std::to_string(tree.num_cached()) + ")";
      });
}

}  // namespace

void bind_kv(py::module_& module) {
  py::register_local_exception<OutOfBlocks>(module, "OutOfBlocks", PyExc_RuntimeError).doc() =
      "BlockPool.allocate() found no free block: evict cached blocks or preempt a request, then try again.";
  bind_block_pool(module);
  bind_prefix_tree(module);
}

}  // namespace fs
