// SPDX-License-Identifier: Apache-2.0
// Device memory, copies and fills.
#include <cstdlib>
#include <cstring>

#include "runtime_state.h"

using namespace ptxsim;
using Lock = std::lock_guard<std::recursive_mutex>;

namespace {

cudaError_t allocate(void** out, size_t bytes, bool host, bool managed) {
  const Lock lock(runtime().mutex);
  if (out == nullptr) return result(cudaErrorInvalidValue);
  *out = bytes == 0 ? nullptr : memory().allocate(bytes, host, managed);
  return result(*out == nullptr && bytes != 0 ? cudaErrorMemoryAllocation : cudaSuccess);
}
cudaError_t release(void* pointer) {
  const Lock lock(runtime().mutex);
  if (pointer == nullptr) return result(cudaSuccess);
  finish_all();  // freeing waits for the device
  return result(memory().release(pointer) ? cudaSuccess : cudaErrorInvalidValue);
}

bool is_device(const void* pointer) {
  return memory().find(reinterpret_cast<uint64_t>(pointer)) != nullptr;
}
// A copy must stay inside the allocation it begins in, and a pointer the direction calls device memory must
// be that.
bool inside(const void* pointer, size_t bytes, bool must_be_device) {
  const uint64_t at = reinterpret_cast<uint64_t>(pointer);
  const Allocation* a = memory().find(at);
  return a != nullptr ? at + bytes <= a->end : !must_be_device;
}
bool valid(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return false;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  return inside(to, bytes, to_device) && inside(from, bytes, from_device);
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream,
                 bool wait) {
  const Lock lock(runtime().mutex);
  if (bytes == 0) return result(cudaSuccess);
  if (to == nullptr || from == nullptr || !valid(to, from, bytes, kind)) return result(cudaErrorInvalidValue);
  if (wait) {
    finish_stream(stream);
    if (const cudaError_t e = synchronised(); e != cudaSuccess) return e;
    std::memmove(to, from, bytes);
    return result(cudaSuccess);
  }
  // From pageable memory the data are taken at once; to pageable memory the call waits.
  if (!is_device(from) && !is_capturing(stream)) {
    const auto* bytes_at = static_cast<const uint8_t*>(from);
    enqueue(
        stream,
        [to, data = std::vector<uint8_t>(bytes_at, bytes_at + bytes)] {
          std::memcpy(to, data.data(), data.size());
        },
        "cudaMemcpyAsync");
  } else {
    enqueue(stream, [=] { std::memmove(to, from, bytes); }, "cudaMemcpyAsync");
  }
  if (!is_device(to) && !is_capturing(stream)) finish_stream(stream);
  return result(cudaSuccess);
}

cudaError_t copy_2d(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                    size_t height, cudaMemcpyKind kind, cudaStream_t stream, bool wait) {
  const Lock lock(runtime().mutex);
  if (width == 0 || height == 0) return result(cudaSuccess);
  if (width > to_pitch || width > from_pitch) return result(cudaErrorInvalidPitchValue);
  if (!valid(to, from, 1, kind) || !inside(to, to_pitch * (height - 1) + width, false) ||
      !inside(from, from_pitch * (height - 1) + width, false))
    return result(cudaErrorInvalidValue);
  enqueue(
      stream,
      [=] {
        for (size_t y = 0; y < height; ++y)
          std::memmove(static_cast<char*>(to) + y * to_pitch, static_cast<const char*>(from) + y * from_pitch,
                       width);
      },
      "cudaMemcpy2D");
  if (!wait && is_device(to) && is_device(from)) return result(cudaSuccess);
  if (!is_capturing(stream)) finish_stream(stream);
  return wait ? synchronised() : result(cudaSuccess);
}

cudaError_t fill(void* to, int value, size_t bytes, cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  if (bytes == 0) return result(cudaSuccess);
  if (!inside(to, bytes, true)) return result(cudaErrorInvalidValue);
  enqueue(stream, [=] { std::memset(to, value, bytes); }, "cudaMemset");
  return result(cudaSuccess);
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** out, size_t bytes) {
  return allocate(out, bytes, false, false);
}
cudaError_t cudaMallocAsync(void** out, size_t bytes, cudaStream_t) {
  return allocate(out, bytes, false, false);
}
cudaError_t cudaMallocManaged(void** out, size_t bytes, unsigned) {
  return allocate(out, bytes, true, true);
}
cudaError_t cudaMallocHost(void** out, size_t bytes) {
  return allocate(out, bytes, true, false);
}
cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) {
  return allocate(out, bytes, true, false);
}
cudaError_t cudaFree(void* p) {
  return release(p);
}
cudaError_t cudaFreeHost(void* p) {
  return release(p);
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  if (p == nullptr) return result(cudaSuccess);
  if (!is_device(p)) return result(cudaErrorInvalidValue);
  enqueue(stream, [p] { memory().release(p); }, "cudaFreeAsync");
  return result(cudaSuccess);
}
cudaError_t cudaMallocPitch(void** out, size_t* pitch, size_t width, size_t height) {
  *pitch = (width + 511) / 512 * 512;
  return allocate(out, *pitch * height, false, false);
}
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  const Lock lock(runtime().mutex);
  if (is_device(p)) return result(cudaErrorHostMemoryAlreadyRegistered);
  memory().add(p, bytes, "", true);
  return result(cudaSuccess);
}
cudaError_t cudaHostUnregister(void* p) {
  const Lock lock(runtime().mutex);
  return result(memory().remove(p) ? cudaSuccess : cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaHostGetDevicePointer(void** out, void* p, unsigned) {
  const Lock lock(runtime().mutex);
  *out = p;
  return result(is_device(p) ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* p) {
  const Lock lock(runtime().mutex);
  std::memset(out, 0, sizeof(*out));
  const Allocation* a = memory().find(reinterpret_cast<uint64_t>(p));
  out->type = a == nullptr ? cudaMemoryTypeUnregistered
              : a->managed ? cudaMemoryTypeManaged
              : a->host    ? cudaMemoryTypeHost
                           : cudaMemoryTypeDevice;
  out->device = a == nullptr ? -2 : 0;
  out->devicePointer = a == nullptr ? nullptr : const_cast<void*>(p);
  out->hostPointer = a == nullptr || a->host ? const_cast<void*>(p) : nullptr;
  return result(cudaSuccess);
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  const Lock lock(runtime().mutex);
  *total = 16ull << 30;
  *free_bytes = *total - std::min<uint64_t>(*total, memory().used_bytes());
  return result(cudaSuccess);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
  return copy(to, from, bytes, kind, nullptr, true);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return copy(to, from, bytes, kind, stream, false);
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                         size_t height, enum cudaMemcpyKind kind) {
  return copy_2d(to, to_pitch, from, from_pitch, width, height, kind, nullptr, true);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy_2d(to, to_pitch, from, from_pitch, width, height, kind, stream, false);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  const cudaError_t e = fill(to, value, bytes, nullptr);
  return e;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return fill(to, value, bytes, stream);
}
cudaError_t cudaMemset2D(void* to, size_t pitch, int value, size_t width, size_t height) {
  for (size_t y = 0; y < height; ++y)
    if (const cudaError_t e = fill(static_cast<char*>(to) + y * pitch, value, width, nullptr);
        e != cudaSuccess)
      return e;
  return cudaSuccess;
}
cudaError_t cudaMemPrefetchAsync(const void*, size_t, struct cudaMemLocation, unsigned, cudaStream_t) {
  return result(cudaSuccess);
}
cudaError_t cudaMemAdvise(const void*, size_t, enum cudaMemoryAdvise, struct cudaMemLocation) {
  return result(cudaSuccess);
}

cudaError_t cudaGetSymbolAddress(void** out, const void* symbol) {
  const Lock lock(runtime().mutex);
  *out = reinterpret_cast<void*>(find_variable(symbol, nullptr));
  return result(*out != nullptr ? cudaSuccess : cudaErrorInvalidSymbol);
}
cudaError_t cudaGetSymbolSize(size_t* out, const void* symbol) {
  const Lock lock(runtime().mutex);
  return result(find_variable(symbol, out) != 0 ? cudaSuccess : cudaErrorInvalidSymbol);
}
static cudaError_t copy_symbol(const void* symbol, size_t bytes, size_t offset, void** at) {
  const Lock lock(runtime().mutex);
  size_t size = 0;
  const uint64_t base = find_variable(symbol, &size);
  if (base == 0) return result(cudaErrorInvalidSymbol);
  if (offset + bytes > size) return result(cudaErrorInvalidValue);
  *at = reinterpret_cast<void*>(base + offset);
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind) {
  void* at = nullptr;
  const cudaError_t e = copy_symbol(symbol, bytes, offset, &at);
  return e != cudaSuccess ? e : copy(at, from, bytes, kind, nullptr, true);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                                    enum cudaMemcpyKind kind, cudaStream_t stream) {
  void* at = nullptr;
  const cudaError_t e = copy_symbol(symbol, bytes, offset, &at);
  return e != cudaSuccess ? e : copy(at, from, bytes, kind, stream, false);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset,
                                 enum cudaMemcpyKind kind) {
  void* at = nullptr;
  const cudaError_t e = copy_symbol(symbol, bytes, offset, &at);
  return e != cudaSuccess ? e : copy(to, at, bytes, kind, nullptr, true);
}
cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void* symbol, size_t bytes, size_t offset,
                                      enum cudaMemcpyKind kind, cudaStream_t stream) {
  void* at = nullptr;
  const cudaError_t e = copy_symbol(symbol, bytes, offset, &at);
  return e != cudaSuccess ? e : copy(to, at, bytes, kind, stream, false);
}

}  // extern "C"
