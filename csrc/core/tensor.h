// SPDX-License-Identifier: Apache-2.0
//
// Tensor: a borrowed, non-owning view of memory that somebody else (torch) owns for the duration of one op
// call.
#pragma once

#include <cstdint>
#include <string>

namespace fs {

enum class DType : uint8_t { f32, f16, bf16, i32, i64, u8, i8, u32 };
inline constexpr int kNumDTypes = 8;

constexpr const char* name_of(DType dtype) {
  constexpr const char* names[kNumDTypes] = {"float32", "float16", "bfloat16", "int32",
                                             "int64",   "uint8",   "int8",     "uint32"};
  return names[static_cast<int>(dtype)];
}

constexpr int size_of(DType dtype) {
  constexpr int sizes[kNumDTypes] = {4, 2, 2, 4, 8, 1, 1, 4};
  return sizes[static_cast<int>(dtype)];
}

// A set of dtypes; `DTypes{DType::f32} | DType::bf16`.
struct DTypes {
  uint16_t bits = 0;

  constexpr DTypes() = default;
  constexpr DTypes(DType dtype) : bits(static_cast<uint16_t>(1u << static_cast<int>(dtype))) {}  // NOLINT
  constexpr bool contains(DType dtype) const { return (bits >> static_cast<int>(dtype)) & 1u; }
  constexpr DTypes operator|(DTypes other) const {
    DTypes both;
    both.bits = static_cast<uint16_t>(bits | other.bits);
    return both;
  }
};

constexpr DTypes operator|(DType a, DType b) {
  return DTypes(a) | DTypes(b);
}

std::string to_string(DTypes dtypes);  // "float32|bfloat16"

enum class Device : uint8_t { cpu, cuda };
inline constexpr int kNumDevices = 2;

constexpr const char* name_of(Device device) {
  return device == Device::cpu ? "cpu" : "cuda";
}

inline constexpr int kMaxDims = 6;

struct Tensor {
  void* data = nullptr;  // borrowed
  DType dtype = DType::f32;
  Device device = Device::cpu;
  int8_t device_index = 0;
  bool present = false;  // false: an optional argument that was not given (an empty tensor is present)
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements

  bool defined() const { return present; }
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
  int64_t numel() const {
    int64_t count = 1;
    for (int d = 0; d < ndim; ++d) count *= shape[d];
    return count;
  }
  int64_t bytes() const { return numel() * size_of(dtype); }
};

// "[3, 64] bfloat16 on cpu"
std::string describe(const Tensor& tensor);

}  // namespace fs
