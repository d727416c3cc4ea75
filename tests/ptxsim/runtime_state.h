// SPDX-License-Identifier: Apache-2.0
// What the runtime API remembers: programs, kernels, errors, and the work in flight.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "block.h"
#include "program.h"
#include "ptx_module.h"

namespace ptxsim {

// A fat binary, or a piece of PTX loaded by a test.
struct Binary {
  const void* wrapper = nullptr;
  bool loaded = false;
  std::string load_error;
  std::vector<std::shared_ptr<const Module>> modules;
  std::vector<std::map<std::string, uint64_t>> globals;  // of each module: variable -> address
  std::map<std::string, std::unique_ptr<Program>> programs;
};

struct Kernel {
  Binary* binary = nullptr;
  std::string name;
  int max_dynamic_shared = 48 * 1024;
  int carveout = -1;
  const Program* program = nullptr;  // after the first use
};

struct DeviceVariable {
  Binary* binary = nullptr;
  std::string name;
  size_t bytes = 0;
  void** managed_pointer = nullptr;
};

struct LaunchRequest {
  Kernel* kernel = nullptr;
  Dim3 grid, block;
  uint64_t dynamic_shared = 0;
  bool cooperative = false;
  std::vector<uint8_t> params;
};

// One piece of work on a stream.
using Work = std::function<void()>;

struct Runtime {
  std::recursive_mutex mutex;
  std::vector<std::unique_ptr<Binary>> binaries;
  std::map<const void*, std::unique_ptr<Kernel>> kernels;  // by host stub
  std::map<const void*, DeviceVariable> variables;         // by host variable
  cudaError_t last_error = cudaSuccess;                    // of the API, cleared by cudaGetLastError
  cudaError_t fault = cudaSuccess;   // a kernel failed, and no synchronisation has said so yet
  cudaError_t sticky = cudaSuccess;  // a synchronisation has said so: the context is dead until it is reset
  std::string report;
  uint64_t num_faults = 0;
  uint64_t warp_instructions = 0;
  std::deque<LaunchRecord> records;
};
Runtime& runtime();

// Records an error the way the CUDA runtime does, and returns it.
cudaError_t result(cudaError_t error);
// For synchronising calls: a fault of earlier work shows here first.
cudaError_t synchronised();

// The kernel behind a host stub or a cudaKernel_t; nullptr if unknown.
Kernel* find_kernel(const void* handle);
// Decodes on first use; cudaErrorInvalidPtx with a report if that fails.
cudaError_t prepare(Kernel& kernel);
cudaError_t load(Binary& binary);
uint64_t find_variable(const void* host, size_t* bytes);  // 0 if unknown
Binary* add_binary(const void* wrapper);
Binary* add_ptx(std::string text);  // throws PtxError

// Checks a launch against the limits of the device.
cudaError_t check_launch(const LaunchRequest& request);
// Runs it now; a fault is recorded.
void execute(const LaunchRequest& request);

// ---- streams (runtime_api_stream.cpp)
void enqueue(cudaStream_t stream, Work work, const char* what);
bool is_capturing(cudaStream_t stream);
void finish_stream(cudaStream_t stream);
void finish_all();

constexpr int kMaxSharedPerBlock = 166912;  // what sm_80 lets a block opt in to

}  // namespace ptxsim
