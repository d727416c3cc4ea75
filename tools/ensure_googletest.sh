#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs GoogleTest from the system's packages when it is missing and that is possible without asking.
# Where it is not, CMake fetches the sources (tests/cpp/CMakeLists.txt).
set -eu
for folder in /usr/lib/cmake/GTest /usr/lib/*/cmake/GTest /usr/local/lib/cmake/GTest /usr/lib64/cmake/GTest; do
  [ -d "$folder" ] && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq && apt-get install -y -qq libgtest-dev >/dev/null || true
fi
