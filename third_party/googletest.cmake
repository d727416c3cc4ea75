# SPDX-License-Identifier: Apache-2.0
# GTest::gtest and GTest::gtest_main: the system's GoogleTest, or its sources fetched at configure time.
find_package(GTest QUIET)
if(NOT GTest_FOUND)
  include(FetchContent)
  FetchContent_Declare(googletest GIT_REPOSITORY https://github.com/google/googletest.git GIT_TAG v1.15.2)
  FetchContent_MakeAvailable(googletest)
endif()
