// SPDX-License-Identifier: Apache-2.0
//
// Every op of ops/ops.h as a Python function of `fastserve._native.ops`, made from its declaration. The
// functions use Python's vectorcall convention directly: a pybind11 dispatch would cost more than the rest of
// the call.
#include "ops/ops.h"

#include <pybind11/pybind11.h>

#include <string>
#include <string_view>

#include "bindings/bindings.h"
#include "bindings/dlpack.h"
#include "core/recording.h"

namespace py = pybind11;

namespace fs {

namespace {

// The positions of the given arguments in declaration order; nullptr where an optional one is missing.
template <class Op>
std::array<PyObject*, OpTraits<Op>::kNumArgs> match_arguments(PyObject* const* values,
                                                              Py_ssize_t num_positional, PyObject* keywords) {
  constexpr size_t num_args = OpTraits<Op>::kNumArgs;
  static const auto specs = OpTraits<Op>::specs();
  FS_CHECK(static_cast<size_t>(num_positional) <= num_args,
           Op::info.name << ": " << num_positional << " arguments given; takes " << num_args);
  std::array<PyObject*, num_args> matched{};
  for (Py_ssize_t i = 0; i < num_positional; ++i) matched[static_cast<size_t>(i)] = values[i];
  const Py_ssize_t num_keywords = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
  for (Py_ssize_t i = 0; i < num_keywords; ++i) {
    const char* name = PyUnicode_AsUTF8(PyTuple_GET_ITEM(keywords, i));
    FS_CHECK(name != nullptr, Op::info.name << ": unreadable keyword");
    size_t index = 0;
    while (index < num_args && std::string_view(name) != specs[index].name) ++index;
    FS_CHECK(index < num_args, Op::info.name << ": no argument named '" << name << "'");
    FS_CHECK(matched[index] == nullptr, Op::info.name << ": argument '" << name << "' given twice");
    matched[index] = values[num_positional + i];
  }
  for (size_t i = 0; i < num_args; ++i) {
    FS_CHECK(matched[i] != nullptr || specs[i].optional,
             Op::info.name << ": argument '" << specs[i].name << "' is missing");
  }
  return matched;
}

void convert(PyObject* object, const char* op_name, const ArgSpec& spec, Tensor* tensor) {
  *tensor = object == nullptr ? Tensor{} : tensor_from_python(object, op_name, spec.name);
}

void convert(PyObject* object, const char* op_name, const ArgSpec& spec, float* value) {
  const double given = PyFloat_AsDouble(object);
  if (given == -1.0 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw Error(std::string(op_name) + ": argument '" + spec.name + "' must be a number");
  }
  *value = static_cast<float>(given);
}

[[maybe_unused]] void convert(PyObject* object, const char* op_name, const ArgSpec& spec, int64_t* value) {
  *value = PyLong_AsLongLong(object);
  if (*value == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw Error(std::string(op_name) + ": argument '" + spec.name + "' must be a whole number of 64 bits");
  }
}

template <class Op>
PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t num_positional, PyObject* keywords) {
  try {
    const auto given = match_arguments<Op>(values, num_positional, keywords);
    Op op{};
    OpContext context;
    size_t index = 0;
    std::apply(
        [&](const auto&... arg) {
          (convert(given[index++], Op::info.name, arg.spec, &(op.*(arg.member))), ...);
        },
        Op::args());
    if (Recording* recording = Recording::of_this_thread(); recording != nullptr) {
      recording->add(op);
      Py_RETURN_NONE;
    }
    constexpr auto first = std::get<0>(Op::args());  // every op writes its first argument
    context.stream = current_stream(given[0], op.*(first.member));
    const py::gil_scoped_release unlocked;
    run(op, context);
  } catch (const Error& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

template <class Op>
std::string help_text() {
  std::string names;
  std::string lines;
  for (const ArgSpec& spec : OpTraits<Op>::specs()) {
    names += (names.empty() ? "" : ", ") + std::string(spec.name);
    lines += "\n    " + std::string(spec.name) + ": ";
    if (spec.shape == nullptr) {
      lines += "number";
      continue;
    }
    lines += "[";
    for (const char* c = spec.shape; *c != '\0'; ++c)
      lines += *c == ' ' ? std::string(", ") : std::string(1, *c);
    lines += "] " + to_string(spec.dtypes);
    if (spec.access != Access::read)
      lines += spec.access == Access::write ? ", written" : ", updated in place";
    if (spec.strided) lines += ", rows may be strided";
    if (spec.optional) lines += ", or None";
  }
  return std::string(Op::info.name) + "(" + names + ")\n--\n\n" + Op::info.meaning + "\n" + lines;
}

template <class Op>
void add_op(py::module_& ops) {
  static const std::string doc = help_text<Op>();
  static PyMethodDef def = {Op::info.name,
                            reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<Op>)),
                            METH_FASTCALL | METH_KEYWORDS, doc.c_str()};
  PyObject* function = PyCFunction_NewEx(&def, nullptr, nullptr);
  if (function == nullptr) throw py::error_already_set();
  ops.attr(Op::info.name) = py::reinterpret_steal<py::object>(function);
}

// One row of the support table: {"op", "meaning", "variant", "cpu": {isa: dtypes}, "cuda": dtypes, "args"}
template <class Op>
py::dict describe_op() {
  py::dict row;
  row["op"] = Op::info.name;
  row["meaning"] = Op::info.meaning;
  row["variant"] = Op::info.variant;
  py::dict cpu;
  for (int isa = 0; isa < kNumIsas; ++isa) {
    const auto& entry = Slot<Op>::cpu[isa];
    if (entry.kernel != nullptr) cpu[name_of(static_cast<Isa>(isa))] = to_string(entry.variants);
  }
  row["cpu"] = cpu;
  row["cuda"] = to_string(Slot<Op>::cuda.variants);
  py::list args;
  for (const ArgSpec& spec : OpTraits<Op>::specs()) {
    py::dict arg;
    arg["name"] = spec.name;
    arg["shape"] = spec.shape;  // None for a number
    arg["dtypes"] = to_string(spec.dtypes);
    arg["access"] = spec.access == Access::read ? "read" : spec.access == Access::write ? "write" : "update";
    arg["optional"] = spec.optional;
    arg["strided"] = spec.strided;
    arg["activation"] = spec.activation;
    arg["operand"] = spec.operand;
    args.append(arg);
  }
  row["args"] = args;
  return row;
}

}  // namespace

void bind_ops(py::module_& module) {
  py::module_ ops = module.def_submodule("ops", "The native ops, as declared in csrc/ops/ops.h.");
  std::apply([&](auto... op) { (add_op<decltype(op)>(ops), ...); }, AllOps{});
  module.def(
      "op_table",
      [] {
        py::list rows;
        std::apply([&](auto... op) { (rows.append(describe_op<decltype(op)>()), ...); }, AllOps{});
        return rows;
      },
      "Every op with its meaning and the dtypes its kernels take on each device, as a list of dicts.");
}

}  // namespace fs
