// SPDX-License-Identifier: Apache-2.0
#include "runtime_state.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <ctime>

#include "fatbin.h"
#include "global_race.h"
#include "ptx_error.h"
#include "race_detector.h"

namespace ptxsim {

Runtime& runtime() {
  static Runtime* r = new Runtime;  // never destroyed: programs call the runtime from static destructors
  return *r;
}

cudaError_t result(cudaError_t error) {
  Runtime& r = runtime();
  if (error == cudaSuccess) error = r.sticky;
  if (error != cudaSuccess) r.last_error = error;
  return error;
}
cudaError_t synchronised() {
  Runtime& r = runtime();
  if (r.fault != cudaSuccess) r.sticky = r.fault;
  return result(r.sticky);
}

namespace {

void record_fault(const std::string& text, cudaError_t error) {
  Runtime& r = runtime();
  std::fprintf(stderr, "ptxsim: %s\n", text.c_str());
  r.report += text + "\n";
  ++r.num_faults;
  if (r.fault == cudaSuccess) r.fault = error;
}

std::map<std::string, uint64_t> place_variables(const Module& module) {
  std::map<std::string, uint64_t> at;
  for (const Variable& v : module.variables) {
    if (v.space != Space::Global && v.space != Space::Const) continue;
    if (v.is_extern)
      throw PtxError(0, "the variable " + v.name +
                            " is defined in another module; separate compilation is not simulated");
    void* storage = memory().allocate(std::max<uint64_t>(v.bytes, 1), false, false);
    std::memset(storage, 0, v.bytes);
    std::memcpy(storage, v.init.data(), std::min<size_t>(v.init.size(), v.bytes));
    memory().find(reinterpret_cast<uint64_t>(storage))->name = v.name;
    at[v.name] = reinterpret_cast<uint64_t>(storage);
  }
  for (const Variable& v : module.variables)
    for (const auto& relocation : v.relocations) {
      const auto target = at.find(relocation.symbol);
      if (target == at.end())
        throw PtxError(
            0, "the initial value of " + v.name + " names " + relocation.symbol + ", which is not simulated");
      uint64_t value;
      std::memcpy(&value, reinterpret_cast<uint8_t*>(at[v.name]) + relocation.offset, 8);
      value += target->second;
      std::memcpy(reinterpret_cast<uint8_t*>(at[v.name]) + relocation.offset, &value, 8);
    }
  return at;
}

uint32_t launch_value(const Launch& l, SpecialRegister s, int lane) {
  const uint64_t workspace =
      l.grid_workspace.empty() ? 0 : reinterpret_cast<uint64_t>(l.grid_workspace.data());
  const uint32_t user_shared = static_cast<uint32_t>(l.program->static_shared_bytes + l.dynamic_shared);
  const uint32_t reserved = (user_shared + 127) / 128 * 128;
  switch (s) {
    case SpecialRegister::NtidX:
      return l.block.x;
    case SpecialRegister::NtidY:
      return l.block.y;
    case SpecialRegister::NtidZ:
      return l.block.z;
    case SpecialRegister::NctaidX:
      return l.grid.x;
    case SpecialRegister::NctaidY:
      return l.grid.y;
    case SpecialRegister::NctaidZ:
      return l.grid.z;
    case SpecialRegister::Nwarpid:
      return 64;
    case SpecialRegister::Nsmid:
      return static_cast<uint32_t>(config().multiprocessors);
    case SpecialRegister::Gridid:
      return 1;
    case SpecialRegister::Envreg1:
      return static_cast<uint32_t>(workspace >> 32);
    case SpecialRegister::Envreg2:
      return static_cast<uint32_t>(workspace);
    case SpecialRegister::DynamicSmemSize:
      return static_cast<uint32_t>(l.dynamic_shared);
    case SpecialRegister::TotalSmemSize:
      return user_shared;
    case SpecialRegister::ReservedSmemBegin:
    case SpecialRegister::ReservedSmem0:
    case SpecialRegister::ReservedSmem1:
      return reserved;
    case SpecialRegister::ReservedSmemEnd:
    case SpecialRegister::ReservedSmemCap:
      return reserved + 1024;
    case SpecialRegister::One:
      return 1;
    case SpecialRegister::LaneId:
      return static_cast<uint32_t>(lane);
    case SpecialRegister::LanemaskEq:
      return 1u << lane;
    case SpecialRegister::LanemaskLt:
      return (1u << lane) - 1;
    case SpecialRegister::LanemaskLe:
      return ((1u << lane) - 1) | 1u << lane;
    case SpecialRegister::LanemaskGe:
      return ~((1u << lane) - 1);
    case SpecialRegister::LanemaskGt:
      return ~(((1u << lane) - 1) | 1u << lane);
    default:
      return 0;
  }
}

bool uses_reserved_shared(const Program& p) {
  return std::any_of(p.launch_constants.begin(), p.launch_constants.end(), [](const LaunchConstant& c) {
    return !c.is_param && c.special >= SpecialRegister::ReservedSmemBegin &&
           c.special <= SpecialRegister::ReservedSmem1;
  });
}

cudaError_t code_of(FaultKind kind) {
  switch (kind) {
    case FaultKind::IllegalAddress:
      return cudaErrorIllegalAddress;
    case FaultKind::Misaligned:
      return cudaErrorMisalignedAddress;
    case FaultKind::Assert:
      return cudaErrorAssert;
    case FaultKind::Trap:
      return cudaErrorLaunchFailure;
    case FaultKind::Deadlock:
      return cudaErrorLaunchTimeout;
    default:
      return cudaErrorLaunchFailure;
  }
}

// Of this thread: other processes on the machine do not count.
double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

uint8_t* align64(std::vector<uint8_t>& v) {
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(v.data()) + 63) & ~uintptr_t{63});
}

}  // namespace

Binary* add_binary(const void* wrapper) {
  auto b = std::make_unique<Binary>();
  b->wrapper = wrapper;
  runtime().binaries.push_back(std::move(b));
  return runtime().binaries.back().get();
}

Binary* add_ptx(std::string text) {
  auto b = std::make_unique<Binary>();
  b->modules.push_back(parse_ptx(std::move(text)));
  b->globals.push_back(place_variables(*b->modules.back()));
  b->loaded = true;
  runtime().binaries.push_back(std::move(b));
  return runtime().binaries.back().get();
}

cudaError_t load(Binary& b) {
  if (b.loaded) return b.load_error.empty() ? cudaSuccess : cudaErrorInvalidPtx;
  b.loaded = true;
  try {
    std::vector<PtxImage> images = ptx_images(b.wrapper);
    if (images.empty())
      throw std::runtime_error(
          "the program holds no PTX: compile with -gencode arch=compute_80,code=compute_80");
    const auto best = std::max_element(images.begin(), images.end(),
                                       [](const PtxImage& x, const PtxImage& y) { return x.arch < y.arch; });
    const unsigned arch = best->arch;
    for (PtxImage& image : images) {
      if (image.arch != arch) continue;
      b.modules.push_back(parse_ptx(std::move(image.text)));
      b.globals.push_back(place_variables(*b.modules.back()));
    }
  } catch (const std::exception& e) {
    b.load_error = e.what();
    record_fault("cannot load device code: " + b.load_error, cudaSuccess);
    return cudaErrorInvalidPtx;
  }
  return cudaSuccess;
}

Kernel* find_kernel(const void* handle) {
  for (auto& [stub, kernel] : runtime().kernels)
    if (stub == handle || kernel.get() == handle) return kernel.get();
  return nullptr;
}

cudaError_t prepare(Kernel& k) {
  if (k.program != nullptr) return cudaSuccess;
  if (const cudaError_t e = load(*k.binary); e != cudaSuccess) return e;
  for (size_t m = 0; m < k.binary->modules.size(); ++m) {
    const auto f = k.binary->modules[m]->functions.find(k.name);
    if (f == k.binary->modules[m]->functions.end() || !f->second.has_body) continue;
    try {
      auto& slot = k.binary->programs[k.name];
      slot = decode(k.binary->modules[m], f->second, k.binary->globals[m]);
      k.program = slot.get();
      return cudaSuccess;
    } catch (const PtxError& e) {
      record_fault("kernel " + k.name + " cannot be simulated\n    " + e.what() + "\n    " +
                       k.binary->modules[m]->line_text(e.line),
                   cudaSuccess);
      return cudaErrorInvalidPtx;
    }
  }
  return cudaErrorInvalidDeviceFunction;
}

uint64_t find_variable(const void* host, size_t* bytes) {
  const auto it = runtime().variables.find(host);
  if (it == runtime().variables.end() || load(*it->second.binary) != cudaSuccess) return 0;
  if (bytes != nullptr) *bytes = it->second.bytes;
  for (const auto& globals : it->second.binary->globals)
    if (const auto found = globals.find(it->second.name); found != globals.end()) return found->second;
  return 0;
}

cudaError_t check_launch(const LaunchRequest& q) {
  if (q.grid.count() == 0 || q.block.count() == 0 || q.block.count() > 1024 || q.block.z > 64 ||
      q.grid.y > 65535 || q.grid.z > 65535 || q.grid.x > 0x7fffffffu)
    return cudaErrorInvalidConfiguration;
  if (q.kernel->program->max_threads != 0 &&
      q.block.count() > static_cast<uint64_t>(q.kernel->program->max_threads))
    return cudaErrorInvalidConfiguration;
  const uint64_t shared = q.kernel->program->static_shared_bytes + q.dynamic_shared;
  if (q.dynamic_shared > static_cast<uint64_t>(q.kernel->max_dynamic_shared) ||
      shared > static_cast<uint64_t>(kMaxSharedPerBlock) ||
      (shared > 48 * 1024 && q.kernel->max_dynamic_shared <= 48 * 1024))
    return cudaErrorInvalidValue;
  if (q.cooperative && q.grid.count() > resident_blocks(q.block, shared))
    return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

void execute(const LaunchRequest& q) {
  Runtime& r = runtime();
  if (r.fault != cudaSuccess || r.sticky != cudaSuccess) return;  // the context is dead
  const Program& p = *q.kernel->program;
  Launch l;
  l.program = &p;
  l.grid = q.grid;
  l.block = q.block;
  l.dynamic_shared = q.dynamic_shared;
  l.shared_bytes = p.static_shared_bytes + q.dynamic_shared;
  if (uses_reserved_shared(p)) l.shared_bytes = (l.shared_bytes + 127) / 128 * 128 + 1024;
  l.params = q.params;
  l.cooperative = q.cooperative;
  if (q.cooperative) l.grid_workspace.assign(256, 0);
  l.random = Random(config().seed * 0x9e3779b9u + r.records.size());
  if (config().check_global_race) l.global_race = std::make_unique<GlobalRaceDetector>();
  l.cache.assign(p.code.size(), {1, 0, nullptr});
  Allocation* workspace = nullptr;
  if (q.cooperative)
    workspace = memory().add(l.grid_workspace.data(), l.grid_workspace.size(), "the grid barrier", false);
  std::vector<uint8_t> pool(p.constants.size() + 128);
  uint8_t* constants = align64(pool);
  std::memcpy(constants, p.constants.data(), p.constants.size());
  for (const LaunchConstant& c : p.launch_constants)
    for (int lane = 0; lane < kLanes; ++lane) {
      uint8_t* at = constants + static_cast<size_t>(c.unit) * 64 + static_cast<size_t>(lane * c.bits / 8);
      if (c.is_param) {
        std::memcpy(at, l.params.data() + c.offset, static_cast<size_t>(c.bits) / 8);
      } else {
        const uint32_t v = launch_value(l, c.special, lane);
        std::memcpy(at, &v, 4);
      }
    }
  l.constants = std::move(pool);
  for (auto& [begin, a] : memory().all()) a.read_bytes = a.written_bytes = 0;

  const double start = cpu_seconds();
  try {
    run_grid(l);
  } catch (const KernelFault& f) {
    record_fault(f.what(), code_of(f.kind));
  }
  for (const std::string& race : l.reports) record_fault(race, cudaErrorLaunchFailure);
  if (l.race_reports > l.reports.size()) {
    r.num_faults += l.race_reports - l.reports.size();
    const std::string more =
        "and " + std::to_string(l.race_reports - l.reports.size()) + " more races in kernel " + p.kernel;
    std::fprintf(stderr, "ptxsim: %s\n", more.c_str());
    r.report += more + "\n";
    r.fault = r.fault == cudaSuccess ? cudaErrorLaunchFailure : r.fault;
  }
  if (workspace != nullptr) memory().remove(l.grid_workspace.data());

  LaunchRecord record{p.kernel,
                      {q.grid.x, q.grid.y, q.grid.z},
                      {q.block.x, q.block.y, q.block.z},
                      q.dynamic_shared,
                      l.executed,
                      cpu_seconds() - start,
                      l.counters,
                      {}};
  for (auto& [begin, a] : memory().all())
    if (!a.name.empty() && a.read_bytes + a.written_bytes != 0) {
      record.buffers[a.name].first += a.read_bytes;
      record.buffers[a.name].second += a.written_bytes;
    }
  r.warp_instructions += l.executed;
  if (config().verbose)
    std::fprintf(stderr, "ptxsim: %s: %llu blocks, %llu warp instructions, %.6f s, %.1f M/s\n",
                 p.kernel.c_str(), static_cast<unsigned long long>(q.grid.count()),
                 static_cast<unsigned long long>(l.executed), record.seconds,
                 static_cast<double>(l.executed) / record.seconds / 1e6);
  r.records.push_back(std::move(record));
  if (r.records.size() > 4096) r.records.pop_front();
}

}  // namespace ptxsim
