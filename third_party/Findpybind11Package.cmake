# SPDX-License-Identifier: Apache-2.0
# pybind11, from the Python package `pybind11` (a build requirement), or from the system.
include(python_package)
find_python_package(pybind11_folder pybind11)
if(pybind11_folder)
  list(APPEND CMAKE_PREFIX_PATH ${pybind11_folder}/share/cmake/pybind11)
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 2.13 CONFIG REQUIRED)
set(pybind11Package_FOUND ${pybind11_FOUND})
