// SPDX-License-Identifier: Apache-2.0
//
// fastserve's CUDA ops on the simulated device, for tests. Faults that the device finds (races, out of
// bounds, uninitialised reads) are errors with the device's report.
//
// For one op: run("rms_norm", {...}) takes CPU tensors, copies each into an allocation of its own on the
// device (of exactly its extent, so that an access beyond it is found), runs the op there and copies back
// what it wrote.
//
// For an engine: the device's memory is the host's, so that `Memory` is a buffer which torch can view as a
// CPU tensor; launch(...) queues an op on such tensors, as a GPU would, and a Graph records and replays
// launches.
#include <cuda_runtime_api.h>
#include <ptxsim.h>
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "ops/ops.h"

namespace py = pybind11;

namespace {

using namespace fs;

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  throw Error(what + ": " + cudaGetErrorString(error) + "\n" + ptxsim_last_report());
}

// One tensor argument, from the host's memory to the device's and back.
class DeviceCopy {
 public:
  DeviceCopy(Tensor* tensor, const ArgSpec& spec, const char* op_name)
      : host_(static_cast<char*>(tensor->data)),
        label_(std::string(op_name) + ": " + spec.name),
        spec_(spec) {
    int64_t last = 0;
    bool dense = true;
    int64_t expected_stride = 1;
    for (int d = tensor->ndim - 1; d >= 0; --d) {
      last += (tensor->shape[d] - 1) * tensor->stride[d];
      dense = dense && (tensor->shape[d] <= 1 || tensor->stride[d] == expected_stride);
      expected_stride *= tensor->shape[d];
    }
    bytes_ = tensor->numel() == 0 ? 0 : static_cast<size_t>((last + 1) * size_of(tensor->dtype));
    if (bytes_ != 0) {
      check(cudaMalloc(&device_, bytes_), label_);
      ptxsim_name_buffer(device_, spec.name);
      // An output stays poisoned by the device; between its rows, if it is strided, lies what others own.
      if (spec.access != Access::write || !dense) {
        check(cudaMemcpy(device_, host_, bytes_, cudaMemcpyHostToDevice), label_);
      }
    }
    tensor->data = device_;
    tensor->device = Device::cuda;
  }
  DeviceCopy(const DeviceCopy&) = delete;
  DeviceCopy& operator=(const DeviceCopy&) = delete;
  ~DeviceCopy() { cudaFree(device_); }

  void copy_back() const {
    if (bytes_ == 0) return;
    std::vector<char> result(bytes_);
    check(cudaMemcpy(result.data(), device_, bytes_, cudaMemcpyDeviceToHost), label_);
    if (spec_.access != Access::read) {
      std::memcpy(host_, result.data(), bytes_);
    } else if (std::memcmp(host_, result.data(), bytes_) != 0) {
      throw Error(label_ + ": an input was written");
    }
  }

 private:
  char* host_;
  std::string label_;
  ArgSpec spec_;
  size_t bytes_ = 0;
  void* device_ = nullptr;
};

template <class Op, class Field>
void convert(const py::handle& given, Arg<Op, Field> arg, Op* op) {
  if constexpr (std::is_same_v<Field, Tensor>) {
    op->*(arg.member) = tensor_from_python(given.ptr(), Op::info.name, arg.spec.name);
  } else {
    op->*(arg.member) = given.cast<Field>();
  }
}

template <class Op>
void run_op(const py::dict& arguments) {
  ptxsim_clear_report();  // a fault of an earlier run is not this one's
  Op op{};
  std::vector<std::unique_ptr<DeviceCopy>> copies;
  const auto take = [&](const auto& arg) {
    if (!arguments.contains(arg.spec.name)) return;
    convert(arguments[arg.spec.name], arg, &op);
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(op.*(arg.member))>, Tensor>) {
      Tensor& tensor = op.*(arg.member);
      if (tensor.defined()) copies.push_back(std::make_unique<DeviceCopy>(&tensor, arg.spec, Op::info.name));
    }
  };
  std::apply([&](const auto&... arg) { (take(arg), ...); }, Op::args());
  ptxsim_reset_counters();
  run(op);
  check(cudaDeviceSynchronize(), Op::info.name);
  if (ptxsim_num_faults() != 0) throw Error(std::string(Op::info.name) + ":\n" + ptxsim_last_report());
  for (const auto& copy : copies) copy->copy_back();
}

// The stream of everything that is queued; a capture cannot be made on the default stream.
cudaStream_t stream() {
  static cudaStream_t created = [] {
    cudaStream_t made = nullptr;
    check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "stream");
    return made;
  }();
  return created;
}

void synchronize() {
  const cudaError_t error = cudaStreamSynchronize(stream());
  const bool faulty = ptxsim_num_faults() != 0;
  const std::string report = faulty ? ptxsim_last_report() : "";
  if (faulty) ptxsim_clear_report();
  if (error != cudaSuccess || faulty) throw Error(std::string(cudaGetErrorString(error)) + "\n" + report);
}

template <class Op>
void launch_op(const py::dict& arguments) {
  Op op{};
  const auto take = [&](const auto& arg) {
    if (!arguments.contains(arg.spec.name)) return;
    convert(arguments[arg.spec.name], arg, &op);
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(op.*(arg.member))>, Tensor>) {
      (op.*(arg.member)).device = Device::cuda;
    }
  };
  std::apply([&](const auto&... arg) { (take(arg), ...); }, Op::args());
  OpContext context;
  context.stream = stream();
  run(op, context);
}

template <class Op>
bool launch_if_named(const std::string& name, const py::dict& arguments) {
  if (name != Op::info.name) return false;
  launch_op<Op>(arguments);
  return true;
}

// An allocation of the device; freed with the last view of it.
class Memory {
 public:
  Memory(size_t bytes, const std::string& name) : bytes_(bytes) {
    check(cudaMalloc(&data_, bytes == 0 ? 1 : bytes), "allocation of " + std::to_string(bytes) + " bytes");
    ptxsim_name_buffer(data_, name.c_str());
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(data_); }
  py::buffer_info buffer() { return {static_cast<uint8_t*>(data_), static_cast<py::ssize_t>(bytes_)}; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// Memory of the device that takes none of the machine's until it is touched: for offsets beyond 2^31
// elements. Zeros at first.
class ReservedMemory {
 public:
  explicit ReservedMemory(size_t bytes) : bytes_(bytes) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (data_ == MAP_FAILED) throw Error("cannot reserve " + std::to_string(bytes) + " bytes of addresses");
    check(cudaHostRegister(data_, bytes, 0), "reserved memory");
  }
  ReservedMemory(const ReservedMemory&) = delete;
  ReservedMemory& operator=(const ReservedMemory&) = delete;
  ~ReservedMemory() {
    cudaHostUnregister(data_);
    munmap(data_, bytes_);
  }
  py::buffer_info buffer() { return {static_cast<uint8_t*>(data_), static_cast<py::ssize_t>(bytes_)}; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// Launches, recorded from the constructor to end().
class Graph {
 public:
  Graph() { check(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeGlobal), "begin capture"); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    if (ready_ != nullptr) cudaGraphExecDestroy(ready_);
  }
  void end() {
    cudaGraph_t recorded = nullptr;
    check(cudaStreamEndCapture(stream(), &recorded), "end capture");
    check(cudaGraphInstantiate(&ready_, recorded, 0), "instantiate");
    check(cudaGraphDestroy(recorded), "destroy");
  }
  void replay() { check(cudaGraphLaunch(ready_, stream()), "graph launch"); }

 private:
  cudaGraphExec_t ready_ = nullptr;
};

template <class Op>
bool run_if_named(const std::string& name, const py::dict& arguments) {
  if (name != Op::info.name) return false;
  run_op<Op>(arguments);
  return true;
}

template <class Op>
void add_if_on_cuda(py::list* names) {
  if (Slot<Op>::cuda.kernel != nullptr) names->append(Op::info.name);
}

}  // namespace

PYBIND11_MODULE(_native_sim, m) {
  m.doc() = "The CUDA ops of fastserve on a simulated device.";
  py::register_local_exception<Error>(m, "NativeError", PyExc_ValueError);
  m.def(
      "run",
      [](const std::string& name, const py::dict& arguments) {
        const bool found = std::apply(
            [&](auto... op) { return (run_if_named<decltype(op)>(name, arguments) || ...); }, AllOps{});
        if (!found) throw Error("no op named '" + name + "'");
      },
      py::arg("op"), py::arg("arguments"), "Run an op on copies of CPU tensors; outputs are copied back.");
  m.def(
      "launch",
      [](const std::string& name, const py::dict& arguments) {
        const bool found = std::apply(
            [&](auto... op) { return (launch_if_named<decltype(op)>(name, arguments) || ...); }, AllOps{});
        if (!found) throw Error("no op named '" + name + "'");
      },
      py::arg("op"), py::arg("arguments"), "Queue an op on tensors that are views of Memory.");
  m.def("synchronize", &synchronize, "Wait for all that was queued; raises what the device found.");
  m.def(
      "num_multiprocessors",
      [] {
        ptxsim_config config;
        ptxsim_get_config(&config);
        return config.multiprocessors;
      },
      "What the device claims to have.");
  py::class_<Memory>(m, "Memory", py::buffer_protocol(), "An allocation of the device, as writable bytes.")
      .def(py::init<size_t, std::string>(), py::arg("num_bytes"), py::arg("name"))
      .def_buffer(&Memory::buffer);
  py::class_<ReservedMemory>(
      m, "ReservedMemory", py::buffer_protocol(),
      "Like Memory, but zeros, and the machine's memory is used only where it is touched.")
      .def(py::init<size_t>(), py::arg("num_bytes"))
      .def_buffer(&ReservedMemory::buffer);
  py::class_<Graph>(m, "Graph", "Records what is launched from its making until end().")
      .def(py::init<>())
      .def("end", &Graph::end)
      .def("replay", &Graph::replay);
  m.def(
      "ops",
      [] {
        py::list names;
        std::apply([&](auto... op) { (add_if_on_cuda<decltype(op)>(&names), ...); }, AllOps{});
        return names;
      },
      "The ops that have a CUDA kernel.");
  m.def(
      "configure",
      [](int async_mode, uint64_t seed, int multiprocessors, bool weak_memory, bool ignore_order) {
        ptxsim_config config;
        ptxsim_get_config(&config);
        config.multiprocessors = multiprocessors;
        config.async_mode = async_mode;
        config.seed = seed;
        config.check_uninit = 1;
        config.check_race = 1;
        config.check_global_race = 1;
        config.counters = 1;
        config.weak_memory = weak_memory ? 1 : 0;
        config.ignore_order = ignore_order ? 1 : 0;
        ptxsim_set_config(&config);
      },
      py::arg("async_mode"), py::arg("seed"), py::arg("multiprocessors") = 8, py::arg("weak_memory") = false,
      py::arg("ignore_order") = false,
      "Async copies land late (0), early (1) or at random (2); a seed other than 0 shuffles blocks and "
      "warps; the device has so many multiprocessors; stores stay private to a block until a fence; "
      "fences order nothing.");
  m.def("counters", [] { return std::string(ptxsim_counters_json()); }, "Counters of the last op, as JSON.");
}
