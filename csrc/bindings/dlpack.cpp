// SPDX-License-Identifier: Apache-2.0
#include "bindings/dlpack.h"

#include <dlpack/dlpack.h>

#include "core/error.h"

namespace fs {

namespace {

// The exchange table of a type. The last type is remembered: nearly every call passes torch tensors.
const DLPackExchangeAPI* exchange_of(PyTypeObject* type) {
  static PyTypeObject* last_type = nullptr;
  static const DLPackExchangeAPI* last_api = nullptr;
  if (type == last_type) return last_api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* api =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (api == nullptr) PyErr_Clear();
  while (api != nullptr && api->header.version.major != DLPACK_MAJOR_VERSION) {
    api = reinterpret_cast<const DLPackExchangeAPI*>(api->header.prev_api);
  }
  if (api == nullptr) return nullptr;
  // The type is kept alive so that its address cannot come back as another type.
  Py_XDECREF(reinterpret_cast<PyObject*>(last_type));
  Py_INCREF(reinterpret_cast<PyObject*>(type));
  last_type = type;
  last_api = api;
  return api;
}

bool dtype_from_dlpack(DLDataType given, DType* dtype) {
  if (given.lanes != 1) return false;
  switch (given.code << 8 | given.bits) {
    case kDLFloat << 8 | 32:
      *dtype = DType::f32;
      return true;
    case kDLFloat << 8 | 16:
      *dtype = DType::f16;
      return true;
    case kDLBfloat << 8 | 16:
      *dtype = DType::bf16;
      return true;
    case kDLInt << 8 | 32:
      *dtype = DType::i32;
      return true;
    case kDLInt << 8 | 64:
      *dtype = DType::i64;
      return true;
    case kDLUInt << 8 | 8:
      *dtype = DType::u8;
      return true;
    case kDLInt << 8 | 8:
      *dtype = DType::i8;
      return true;
    case kDLUInt << 8 | 32:
      *dtype = DType::u32;
      return true;
    default:
      return false;
  }
}

}  // namespace

Tensor tensor_from_python(PyObject* object, const char* op_name, const char* arg_name) {
  Tensor tensor;
  if (object == Py_None) return tensor;
  const DLPackExchangeAPI* api = exchange_of(Py_TYPE(object));
  FS_CHECK(api != nullptr,
           op_name << ": argument '" << arg_name << "' is a " << Py_TYPE(object)->tp_name
                   << "; expected a tensor whose type has __dlpack_c_exchange_api__ (torch >= 2.10)");
  DLTensor view;
  if (api->dltensor_from_py_object_no_sync(object, &view) != 0) {
    PyErr_Clear();
    throw Error(std::string(op_name) + ": argument '" + arg_name + "' cannot be shared through DLPack");
  }
  FS_CHECK(dtype_from_dlpack(view.dtype, &tensor.dtype),
           op_name << ": argument '" << arg_name << "' has an unsupported dtype (DLPack code "
                   << int{view.dtype.code} << ", " << int{view.dtype.bits} << " bits)");
  const bool cuda = view.device.device_type == kDLCUDA || view.device.device_type == kDLCUDAManaged;
  FS_CHECK(cuda || view.device.device_type == kDLCPU || view.device.device_type == kDLCUDAHost,
           op_name << ": argument '" << arg_name << "' is on an unsupported device (DLPack device type "
                   << static_cast<int>(view.device.device_type) << ")");
  FS_CHECK(view.ndim <= kMaxDims, op_name << ": argument '" << arg_name << "' has " << view.ndim
                                          << " dimensions; at most " << kMaxDims);
  tensor.data = static_cast<char*>(view.data) + view.byte_offset;
  tensor.device = cuda ? Device::cuda : Device::cpu;
  tensor.device_index = static_cast<int8_t>(view.device.device_id);
  tensor.present = true;
  tensor.ndim = view.ndim;
  int64_t contiguous = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    tensor.shape[d] = view.shape[d];
    tensor.stride[d] = view.strides != nullptr ? view.strides[d] : contiguous;
    contiguous *= view.shape[d];
  }
  return tensor;
}

void* current_stream(PyObject* object, const Tensor& tensor) {
  if (tensor.device == Device::cpu) return nullptr;
  const DLPackExchangeAPI* api = exchange_of(Py_TYPE(object));
  void* stream = nullptr;
  if (api->current_work_stream(kDLCUDA, tensor.device_index, &stream) != 0) {
    PyErr_Clear();
    throw Error("cannot get the current CUDA stream of the tensor's framework");
  }
  return stream;
}

}  // namespace fs
