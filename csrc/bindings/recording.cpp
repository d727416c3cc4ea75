// SPDX-License-Identifier: Apache-2.0
#include "core/recording.h"

#include <pybind11/pybind11.h>

#include <memory>

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
      .def_property_readonly("num_ops", &Recording::num_ops, "Ops that it holds.")
      .def_property_readonly("num_bytes", &Recording::num_bytes, "Memory that it takes.");
}

}  // namespace fs
