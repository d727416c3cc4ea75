// SPDX-License-Identifier: Apache-2.0
#include "core/recording.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings/bindings.h"
#include "plan/step_arrays.h"

namespace py = pybind11;

namespace fs {

void bind_recording(py::module_& module) {
  py::class_<Recording>(module, "Recording",
                        R"(Ops on the CPU, written down instead of run, and run by one call.

    recording = Recording(arrays)
    with recording:
        ...  # ops that this thread calls here are checked and written down
    recording.run()

Arguments that are arrays of `arrays` (StepArrays, views of the memory that it has written) are taken from there at each
run, as they are then. The memory of all other arguments must outlive the recording.)")
      .def(py::init([](const StepArrays& arrays) { return std::make_unique<Recording>(arrays.arrays()); }),
           py::arg("arrays"), py::keep_alive<1, 2>())
      .def("__enter__",
           [](Recording& self) {
             self.begin();
             return &self;
           })
      .def("__exit__", [](Recording& self, const py::args&) { self.end(); })
      .def("run", &Recording::run, py::call_guard<py::gil_scoped_release>(),
           "Runs all ops in order. Raises ValueError if one refuses its arguments.")
      .def(
          "run_timed",
          [](Recording& self) {
            std::vector<double> seconds(self.num_ops());
            const py::gil_scoped_release release;
            self.run_timed(seconds.data());
            return seconds;
          },
          "The same; returns the seconds that each op took.")
      .def(
          "ops",
          [](const Recording& self) {
            py::list ops;
            for (size_t op = 0; op < self.num_ops(); ++op) {
              py::list shapes;
              for (const Tensor& tensor : self.tensors(op)) {
                py::tuple shape(tensor.defined() ? tensor.ndim : 0);
                for (size_t i = 0; i < shape.size(); ++i) shape[i] = tensor.shape[i];
                shapes.append(shape);
              }
              ops.append(py::make_tuple(self.name(op), shapes));
            }
            return ops;
          },
          "(name, shapes of its tensors in their order, () of absent ones) of each op.")
      .def_property_readonly("num_ops", &Recording::num_ops, "Ops that it holds.")
      .def_property_readonly("num_bytes", &Recording::num_bytes, "Memory that it takes.");
}

}  // namespace fs
