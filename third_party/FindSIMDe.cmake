# SPDX-License-Identifier: Apache-2.0
# SIMDe, from the Python package `cmeel-simde` (extra `test`) or the system (Debian: libsimde-dev 0.8 or later).
include(FindPackageHandleStandardArgs)
if(NOT Python_EXECUTABLE)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
endif()
execute_process(COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"
                OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
find_path(SIMDe_INCLUDE_DIR simde/x86/avx512/dpbf16.h HINTS ${site_packages}/cmeel.prefix/include)
find_package_handle_standard_args(SIMDe REQUIRED_VARS SIMDe_INCLUDE_DIR
                                  REASON_FAILURE_MESSAGE "pip install cmeel-simde")
