// SPDX-License-Identifier: Apache-2.0
// The one simulated device: what it says about itself. It claims compute capability 8.0.
#include <cstdio>
#include <cstring>

#include "runtime_state.h"

using namespace ptxsim;

namespace {

constexpr int kMajor = 8, kMinor = 0;
constexpr int kSharedPerMultiprocessor = 167936;

int attribute(enum cudaDeviceAttr a, bool& known) {
  switch (a) {
    case cudaDevAttrMaxThreadsPerBlock:
      return 1024;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return 1024;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 0x7fffffff;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return 48 * 1024;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return kMaxSharedPerBlock;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return kSharedPerMultiprocessor;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return 1024;
    case cudaDevAttrTotalConstantMemory:
      return 65536;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return 65536;
    case cudaDevAttrMultiProcessorCount:
      return config().multiprocessors;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return 32;
    case cudaDevAttrComputeCapabilityMajor:
      return kMajor;
    case cudaDevAttrComputeCapabilityMinor:
      return kMinor;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrHostNativeAtomicSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
      return 1;
    case cudaDevAttrL2CacheSize:
      return 40 << 20;
    case cudaDevAttrClockRate:
      return 1410000;
    case cudaDevAttrMemoryClockRate:
      return 1215000;
    case cudaDevAttrGlobalMemoryBusWidth:
      return 5120;
    case cudaDevAttrTextureAlignment:
      return 512;
    case cudaDevAttrAsyncEngineCount:
      return 2;
    case cudaDevAttrKernelExecTimeout:
    case cudaDevAttrIntegrated:
    case cudaDevAttrComputeMode:
    case cudaDevAttrEccEnabled:
    case cudaDevAttrPciBusId:
    case cudaDevAttrPciDeviceId:
    case cudaDevAttrPciDomainId:
    case cudaDevAttrTccDriver:
    case cudaDevAttrIsMultiGpuBoard:
    case cudaDevAttrPageableMemoryAccess:
    case cudaDevAttrComputePreemptionSupported:
      return 0;
    default:
      known = false;
      return 0;
  }
}

struct ErrorName {
  cudaError_t code;
  const char *name, *text;
};
#define PTXSIM_ERROR(code, text) {code, #code, text}
const ErrorName kErrors[] = {
    PTXSIM_ERROR(cudaSuccess, "no error"),
    PTXSIM_ERROR(cudaErrorInvalidValue, "invalid argument"),
    PTXSIM_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    PTXSIM_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    PTXSIM_ERROR(cudaErrorInvalidPitchValue, "invalid pitch argument"),
    PTXSIM_ERROR(cudaErrorInvalidSymbol, "invalid device symbol"),
    PTXSIM_ERROR(cudaErrorMissingConfiguration, "__global__ function call is not configured"),
    PTXSIM_ERROR(cudaErrorInvalidDeviceFunction, "invalid device function"),
    PTXSIM_ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    PTXSIM_ERROR(cudaErrorInvalidPtx, "a PTX image could not be simulated"),
    PTXSIM_ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    PTXSIM_ERROR(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    PTXSIM_ERROR(cudaErrorNotReady, "device not ready"),
    PTXSIM_ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    PTXSIM_ERROR(cudaErrorLaunchTimeout, "the launch timed out and was terminated"),
    PTXSIM_ERROR(cudaErrorAssert, "device-side assert triggered"),
    PTXSIM_ERROR(cudaErrorHostMemoryAlreadyRegistered,
                 "part or all of the requested memory range is already mapped"),
    PTXSIM_ERROR(cudaErrorHostMemoryNotRegistered,
                 "pointer does not correspond to a registered memory region"),
    PTXSIM_ERROR(cudaErrorMisalignedAddress, "misaligned address"),
    PTXSIM_ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    PTXSIM_ERROR(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch"),
    PTXSIM_ERROR(cudaErrorNotSupported, "operation not supported"),
    PTXSIM_ERROR(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    PTXSIM_ERROR(cudaErrorStreamCaptureUnmatched, "the capture was not begun on this stream"),
    PTXSIM_ERROR(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
};

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return result(cudaSuccess);
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return result(cudaSuccess);
}
cudaError_t cudaSetDevice(int device) {
  return result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaInitDevice(int device, unsigned, unsigned) {
  return cudaSetDevice(device);
}
cudaError_t cudaSetDeviceFlags(unsigned) {
  return result(cudaSuccess);
}
cudaError_t cudaGetDeviceFlags(unsigned* flags) {
  *flags = 0;
  return result(cudaSuccess);
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return result(cudaSuccess);
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr a, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  bool known = true;
  *value = attribute(a, known);
  return result(known ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  std::memset(p, 0, sizeof(*p));
  std::snprintf(p->name, sizeof(p->name), "ptxsim simulated device");
  p->totalGlobalMem = 16ull << 30;
  p->sharedMemPerBlock = 48 * 1024;
  p->sharedMemPerBlockOptin = kMaxSharedPerBlock;
  p->sharedMemPerMultiprocessor = kSharedPerMultiprocessor;
  p->reservedSharedMemPerBlock = 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = kMajor;
  p->minor = kMinor;
  p->multiProcessorCount = config().multiprocessors;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->l2CacheSize = 40 << 20;
  p->memoryBusWidth = 5120;
  p->textureAlignment = 512;
  p->memPitch = 0x7fffffff;
  p->asyncEngineCount = 2;
  p->unifiedAddressing = p->managedMemory = p->concurrentKernels = p->concurrentManagedAccess =
      p->canMapHostMemory = p->cooperativeLaunch = 1;
  p->streamPrioritiesSupported = 1;
  return result(cudaSuccess);
}
cudaError_t cudaChooseDevice(int* device, const struct cudaDeviceProp*) {
  return cudaGetDevice(device);
}
cudaError_t cudaDeviceReset() {
  ptxsim_clear_report();
  return cudaSuccess;
}
cudaError_t cudaDeviceSetCacheConfig(enum cudaFuncCache) {
  return result(cudaSuccess);
}
cudaError_t cudaDeviceSetLimit(enum cudaLimit, size_t) {
  return result(cudaSuccess);
}
cudaError_t cudaDeviceGetLimit(size_t* value, enum cudaLimit limit) {
  *value = limit == cudaLimitStackSize ? 1024 : limit == cudaLimitPrintfFifoSize ? 1 << 20 : 8 << 20;
  return result(cudaSuccess);
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return result(cudaSuccess);
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return result(cudaSuccess);
}
cudaError_t cudaProfilerStart() {
  return result(cudaSuccess);
}
cudaError_t cudaProfilerStop() {
  return result(cudaSuccess);
}

cudaError_t cudaGetLastError() {
  const std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  const cudaError_t e = runtime().last_error;
  runtime().last_error = runtime().sticky;
  return e;
}
cudaError_t cudaPeekAtLastError() {
  const std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  return runtime().last_error;
}
const char* cudaGetErrorName(cudaError_t error) {
  for (const auto& e : kErrors)
    if (e.code == error) return e.name;
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  for (const auto& e : kErrors)
    if (e.code == error) return e.text;
  return "unrecognized error code";
}

}  // extern "C"
