# SPDX-License-Identifier: Apache-2.0
# The CUDA kernels, if asked for: FASTSERVE_CUDA = OFF | AUTO (if a compiler is found) | ON.
#
# The compiler is an installed nvcc, or the one of the Python packages nvidia-cuda-nvcc, nvidia-cuda-crt,
# nvidia-nvvm, nvidia-cuda-runtime and nvidia-cuda-cccl. Each file of csrc/cuda is compiled once, through
# tools/ptxas_check.py, which fails the build where a kernel spills or uses more registers than its file states.
# CMake's own CUDA language is not used: it tests the compiler by linking programs, needs more of the toolkit, and
# would give no hold on what ptxas says.
#
# Sets FASTSERVE_HAS_CUDA, cuda_objects (to link into a module), CUDA_RUNTIME_STATIC and CUDA_INCLUDE_DIR.
set(FASTSERVE_CUDA OFF CACHE STRING "build the CUDA kernels: OFF, AUTO or ON")
set_property(CACHE FASTSERVE_CUDA PROPERTY STRINGS OFF AUTO ON)
set(FASTSERVE_CUDA_ARCHS "80" CACHE STRING "compute capabilities to compile machine code for, or `release`")
set(FASTSERVE_HAS_CUDA OFF)
set(cuda_objects "")

if(FASTSERVE_CUDA)
  include(python_package)
  if(NOT Python_EXECUTABLE)
    find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  endif()
  find_python_package(nvidia_folder nvidia.cu13)
  find_program(FASTSERVE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT FASTSERVE_NVCC AND nvidia_folder)
    find_program(FASTSERVE_NVCC nvcc PATHS ${nvidia_folder}/bin NO_DEFAULT_PATH)
  endif()
  if(FASTSERVE_NVCC)
    # Where the compiler really lies: it may be a link or a script.
    execute_process(COMMAND ${FASTSERVE_NVCC} --dryrun -x cu -c /dev/null -o /dev/null
                    ERROR_VARIABLE nvcc_plan OUTPUT_QUIET)
    string(REGEX MATCH "TOP=([^\n]+)" nvcc_top "${nvcc_plan}")
    get_filename_component(cuda_root "${CMAKE_MATCH_1}" REALPATH)
    find_path(CUDA_INCLUDE_DIR cuda_runtime_api.h HINTS ${cuda_root} PATH_SUFFIXES include targets/x86_64-linux/include
              NO_DEFAULT_PATH)
    find_library(CUDA_RUNTIME_STATIC libcudart_static.a
                 HINTS ${cuda_root} PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib NO_DEFAULT_PATH)
  endif()
  if(FASTSERVE_NVCC AND CUDA_RUNTIME_STATIC)
    set(FASTSERVE_HAS_CUDA ON)
  elseif(NOT FASTSERVE_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "FASTSERVE_CUDA is ${FASTSERVE_CUDA}, but nvcc or libcudart_static.a was not found. Install the "
                        "CUDA toolkit 13, or: pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm "
                        "nvidia-cuda-runtime nvidia-cuda-cccl (nvcc: ${FASTSERVE_NVCC}, runtime: ${CUDA_RUNTIME_STATIC})")
  endif()
endif()

if(FASTSERVE_HAS_CUDA)
  set(cuda_archs ${FASTSERVE_CUDA_ARCHS})
  if(cuda_archs STREQUAL "release")
    set(cuda_archs 80 86 89 90 100 120)
  endif()
  # PTX of the oldest architecture runs, compiled by the driver, on those that are not listed, and is what the
  # simulated device executes.
  list(GET cuda_archs 0 oldest)
  set(nvcc_flags -std=c++20 -O3 -lineinfo -Xptxas -v -I${CMAKE_CURRENT_SOURCE_DIR}/csrc
      # nvcc rewrites the declarations in core/op.h with redundant parentheses.
      -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror,-Wno-parentheses -Werror all-warnings)
  foreach(arch ${cuda_archs})
    list(APPEND nvcc_flags -gencode arch=compute_${arch},code=sm_${arch})
  endforeach()
  list(APPEND nvcc_flags -gencode arch=compute_${oldest},code=compute_${oldest})

  file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
  set(cuda_build ${CMAKE_CURRENT_BINARY_DIR}/cuda)
  file(MAKE_DIRECTORY ${cuda_build})
  foreach(source ${cuda_sources})
    get_filename_component(name ${source} NAME_WE)
    add_custom_command(
      OUTPUT ${cuda_build}/${name}.o
      COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/tools/ptxas_check.py
              --source ${source} --report ${cuda_build}/${name}.ptxas --
              ${FASTSERVE_NVCC} ${nvcc_flags} -MD -MF ${cuda_build}/${name}.d -c ${source} -o ${cuda_build}/${name}.o
      DEPENDS ${source} ${CMAKE_CURRENT_SOURCE_DIR}/tools/ptxas_check.py
      DEPFILE ${cuda_build}/${name}.d
      COMMENT "CUDA ${name} for ${cuda_archs}" VERBATIM)
    list(APPEND cuda_objects ${cuda_build}/${name}.o)
  endforeach()
  # One target owns the commands, so that two modules with the same objects do not compile them twice.
  add_custom_target(fastserve_cuda DEPENDS ${cuda_objects})
  set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  message(STATUS "CUDA kernels for ${cuda_archs} with ${FASTSERVE_NVCC}")
endif()
