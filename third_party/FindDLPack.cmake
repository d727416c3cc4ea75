# SPDX-License-Identifier: Apache-2.0
# dlpack.h (1.2 or later, with the C exchange table), from the Python package `apache-tvm-ffi` (a build requirement).
include(python_package)
include(FindPackageHandleStandardArgs)
find_python_package(tvm_ffi_folder tvm_ffi)
find_path(DLPack_INCLUDE_DIR dlpack/dlpack.h HINTS ${tvm_ffi_folder}/include)
find_package_handle_standard_args(DLPack REQUIRED_VARS DLPack_INCLUDE_DIR
                                  REASON_FAILURE_MESSAGE "pip install apache-tvm-ffi")
