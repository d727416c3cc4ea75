// SPDX-License-Identifier: Apache-2.0
// Registration of device code, and launches.
#include <cstring>

#include "ptx_error.h"
#include "runtime_state.h"

using namespace ptxsim;
using Lock = std::lock_guard<std::recursive_mutex>;

namespace {

struct CallConfiguration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<CallConfiguration> call_configurations;

cudaError_t launch(const void* handle, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream,
                   bool cooperative) {
  const Lock lock(runtime().mutex);
  Kernel* kernel = find_kernel(handle);
  if (kernel == nullptr) return result(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t e = prepare(*kernel); e != cudaSuccess) return result(e);
  LaunchRequest q;
  q.kernel = kernel;
  q.grid = {grid.x, grid.y, grid.z};
  q.block = {block.x, block.y, block.z};
  q.dynamic_shared = shared;
  q.cooperative = cooperative;
  if (const cudaError_t e = check_launch(q); e != cudaSuccess) return result(e);
  q.params.resize(kernel->program->params_bytes);
  for (size_t i = 0; i < kernel->program->params.size(); ++i)
    std::memcpy(q.params.data() + kernel->program->params[i].offset, args[i],
                kernel->program->params[i].bytes);
  if (runtime().sticky != cudaSuccess) return result(runtime().sticky);
  enqueue(stream, [q] { execute(q); }, kernel->name.c_str());
  return result(cudaSuccess);
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  const Lock lock(runtime().mutex);
  return reinterpret_cast<void**>(add_binary(wrapper));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void** handle) {
  const Lock lock(runtime().mutex);
  return load(*reinterpret_cast<Binary*>(handle)) == cudaSuccess;
}
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  const Lock lock(runtime().mutex);
  auto kernel = std::make_unique<Kernel>();
  kernel->binary = reinterpret_cast<Binary*>(handle);
  kernel->name = name;
  runtime().kernels[host] = std::move(kernel);
}
void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t bytes, int, int) {
  const Lock lock(runtime().mutex);
  runtime().variables[host] = {reinterpret_cast<Binary*>(handle), name, bytes, nullptr};
}
void __cudaRegisterManagedVar(void** handle, void** host, char*, const char* name, int, size_t bytes, int,
                              int) {
  const Lock lock(runtime().mutex);
  runtime().variables[host] = {reinterpret_cast<Binary*>(handle), name, bytes, host};
  *host = reinterpret_cast<void*>(find_variable(host, nullptr));
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  call_configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (call_configurations.empty()) return result(cudaErrorMissingConfiguration);
  const CallConfiguration c = call_configurations.back();
  call_configurations.pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* stub) {
  const Lock lock(runtime().mutex);
  Kernel* kernel = find_kernel(stub);
  *handle = reinterpret_cast<cudaKernel_t>(kernel);
  return kernel != nullptr ? cudaSuccess : result(cudaErrorInvalidDeviceFunction);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, grid, block, args, shared, stream, false);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                                    cudaStream_t stream) {
  return launch(kernel, grid, block, args, shared, stream == nullptr ? cudaStreamPerThread : stream, false);
}

cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** args, size_t shared,
                             cudaStream_t stream) {
  return launch(f, grid, block, args, shared, stream, false);
}
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t stream) {
  return launch(f, grid, block, args, shared, stream, true);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* f, void** args) {
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeCooperative) cooperative = a.val.cooperative != 0;
    if (a.id == cudaLaunchAttributeClusterDimension &&
        a.val.clusterDim.x * a.val.clusterDim.y * a.val.clusterDim.z > 1)
      return result(cudaErrorNotSupported);
  }
  return launch(f, config->gridDim, config->blockDim, args, config->dynamicSmemBytes, config->stream,
                cooperative);
}

cudaError_t cudaGetKernel(cudaKernel_t* handle, const void* stub) {
  return __cudaGetKernel(handle, stub);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* f) {
  const Lock lock(runtime().mutex);
  Kernel* kernel = find_kernel(f);
  if (kernel == nullptr) return result(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t e = prepare(*kernel); e != cudaSuccess) return result(e);
  std::memset(out, 0, sizeof(*out));
  out->sharedSizeBytes = kernel->program->static_shared_bytes;
  out->localSizeBytes = kernel->program->local_bytes;
  out->maxThreadsPerBlock = kernel->program->max_threads != 0 ? kernel->program->max_threads : 1024;
  out->numRegs = 32;  // registers are unknown: ptxas decides them
  out->ptxVersion = out->binaryVersion = 80;
  out->maxDynamicSharedSizeBytes = kernel->max_dynamic_shared;
  out->preferredShmemCarveout = kernel->carveout;
  return result(cudaSuccess);
}
cudaError_t cudaFuncSetAttribute(const void* f, enum cudaFuncAttribute attribute, int value) {
  const Lock lock(runtime().mutex);
  Kernel* kernel = find_kernel(f);
  if (kernel == nullptr) return result(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (const cudaError_t e = prepare(*kernel); e != cudaSuccess) return result(e);
    if (value < 0 || static_cast<uint64_t>(value) + kernel->program->static_shared_bytes > kMaxSharedPerBlock)
      return result(cudaErrorInvalidValue);
    kernel->max_dynamic_shared = value;
  } else if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
    kernel->carveout = value;
  }
  return result(cudaSuccess);
}
cudaError_t cudaFuncSetCacheConfig(const void*, enum cudaFuncCache) {
  return result(cudaSuccess);
}
cudaError_t cudaFuncGetName(const char** name, const void* f) {
  const Lock lock(runtime().mutex);
  const Kernel* kernel = find_kernel(f);
  if (kernel == nullptr) return result(cudaErrorInvalidDeviceFunction);
  *name = kernel->name.c_str();
  return result(cudaSuccess);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* f, int threads,
                                                                   size_t shared, unsigned) {
  const Lock lock(runtime().mutex);
  Kernel* kernel = find_kernel(f);
  if (kernel == nullptr) return result(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t e = prepare(*kernel); e != cudaSuccess) return result(e);
  *blocks = static_cast<int>(resident_blocks_per_multiprocessor(
      static_cast<uint64_t>(threads), shared + kernel->program->static_shared_bytes));
  return result(cudaSuccess);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* f, int threads,
                                                          size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, f, threads, shared, 0);
}
cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void* f, int blocks, int) {
  const Lock lock(runtime().mutex);
  Kernel* kernel = find_kernel(f);
  if (kernel == nullptr || blocks < 1) return result(cudaErrorInvalidValue);
  const size_t each = static_cast<size_t>(167936 / blocks - 1024);
  *bytes = std::min<size_t>(each, kMaxSharedPerBlock);
  return result(cudaSuccess);
}

int ptxsim_run_ptx(const char* ptx, const char* name, const unsigned grid[3], const unsigned block[3],
                   size_t shared, void** args) {
  const Lock lock(runtime().mutex);
  Runtime& r = runtime();
  Kernel kernel;
  try {
    kernel.binary = add_ptx(ptx);
  } catch (const PtxError& e) {
    r.report += std::string(e.what()) + "\n";
    ++r.num_faults;
    return cudaErrorInvalidPtx;
  }
  kernel.name = name;
  kernel.max_dynamic_shared = kMaxSharedPerBlock;
  if (const cudaError_t e = prepare(kernel); e != cudaSuccess) return e;
  LaunchRequest q;
  q.kernel = &kernel;
  q.grid = {grid[0], grid[1], grid[2]};
  q.block = {block[0], block[1], block[2]};
  q.dynamic_shared = shared;
  if (const cudaError_t e = check_launch(q); e != cudaSuccess) return e;
  q.params.resize(kernel.program->params_bytes);
  for (size_t i = 0; i < kernel.program->params.size(); ++i)
    std::memcpy(q.params.data() + kernel.program->params[i].offset, args[i], kernel.program->params[i].bytes);
  finish_all();
  execute(q);
  return synchronised();
}

}  // extern "C"
