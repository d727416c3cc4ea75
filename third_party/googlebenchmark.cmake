# SPDX-License-Identifier: Apache-2.0
# benchmark::benchmark: the system's Google Benchmark (Debian: libbenchmark-dev), or its sources fetched at configure
# time.
find_package(benchmark QUIET)
if(NOT benchmark_FOUND)
  include(FetchContent)
  set(BENCHMARK_ENABLE_TESTING OFF CACHE BOOL "" FORCE)
  FetchContent_Declare(googlebenchmark GIT_REPOSITORY https://github.com/google/benchmark.git GIT_TAG v1.9.1)
  FetchContent_MakeAvailable(googlebenchmark)
endif()
