// SPDX-License-Identifier: Apache-2.0
//
// fastserve._native: the extension module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "core/error.h"
#include "core/isa.h"
#include "core/thread_pool.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels, block allocator and attention planner of fastserve.";
  py::register_local_exception<fs::Error>(m, "NativeError", PyExc_ValueError);

  m.def(
      "num_threads", [] { return fs::pool().num_threads(); },
      "Threads of the native pool, the caller included.");
  m.def("set_num_threads", &fs::set_num_threads, py::arg("num_threads"),
        "Replace the native pool by one of num_threads (1 to 256). Not while an op runs.");
  m.def("num_physical_cores", &fs::num_physical_cores, "Physical cores that this process may use.");

  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (int isa = 0; isa < fs::kNumIsas; ++isa) {
          if (fs::isa_runs(static_cast<fs::Isa>(isa)))
            names.emplace_back(fs::name_of(static_cast<fs::Isa>(isa)));
        }
        return names;
      },
      "Instruction sets that run here, the preferred one last.");
  m.def("isa", [] { return fs::name_of(fs::active_isa()); }, "The instruction set that CPU ops use.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        for (int isa = 0; isa < fs::kNumIsas; ++isa) {
          if (name == fs::name_of(static_cast<fs::Isa>(isa)))
            return fs::set_active_isa(static_cast<fs::Isa>(isa));
        }
        throw fs::Error("unknown instruction set '" + name + "'; see isas()");
      },
      py::arg("name"), "Use another instruction set of isas(), for tests and measurements.");

  fs::bind_ops(m);
  fs::bind_kv(m);
  fs::bind_cuda(m);
  fs::bind_plan(m);
  fs::bind_step_arrays(m);
  fs::bind_recording(m);
  fs::bind_linear(m);
  fs::bind_quantized(m);
}
