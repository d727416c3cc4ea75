# SPDX-License-Identifier: Apache-2.0
#
#   make demo      a real model answers questions about a document, on this machine's CPU
#   make test      everything that CI runs
#   make native    rebuild the extension after a change in csrc/
#   make wheel     a wheel in dist/, with CUDA kernels if nvcc is there, installed and tried in an empty environment
#   make gpu-report  on a machine with a GPU: build for it, test, measure; one report in build/gpu_report
#   make check     style: ruff, mypy, clang-format

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= $(shell nproc)

PY  := $(VENV)/bin/python
MODEL := build/models/smollm2-135m
INT4_MODEL := $(MODEL)-int4
CMAKE := $(PY) -m cmake
CXX_FILES := $(shell find csrc tests bench tools -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test native wheel nvcc simulated check format unit cpp-test sanitize bench-cpp aarch64 clean gpu-report

demo: native $(INT4_MODEL)/config.json
	$(PY) tools/demo.py $(INT4_MODEL)

test: check cpp-test sanitize unit

# --- environment and build ---

$(VENV)/.env: pyproject.toml constraints.txt
	@echo "== environment in $(VENV)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -q -c constraints.txt "setuptools>=77" wheel cmake ninja pybind11 apache-tvm-ffi torch
	@$(PY) tools/install_requirements.py
	@touch $@

# One editable install puts the command `fastserve` and the package in reach; after that only `native` builds.
$(VENV)/.installed: $(VENV)/.env
	@CMAKE_ARGS="$(NATIVE_FLAGS)" $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# Incremental. `make native PYTHON=/path/to/python` builds for an environment of your own, which must have the build
# requirements. The tests run the AVX-512 kernels on machines without AVX-512, so they are built emulated as well.
# On a machine with a GPU its CUDA kernels are part of the module, and tests/cuda runs them there.
GPU_ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d .)
NATIVE_FLAGS := -DFASTSERVE_EMULATE_AVX512=ON $(if $(GPU_ARCH),-DFASTSERVE_CUDA=ON -DFASTSERVE_CUDA_ARCHS=$(GPU_ARCH))
ifeq ($(origin PYTHON),command line)
native: NATIVE_PYTHON := $(PYTHON)
else
native: NATIVE_PYTHON := $(PY)
native: $(if $(GPU_ARCH),nvcc) $(VENV)/.installed
endif
native:
	@CMAKE_ARGS="$(NATIVE_FLAGS)" $(NATIVE_PYTHON) setup.py -q build_ext --inplace

$(MODEL)/config.json: | native
	$(PY) tools/fetch_demo_model.py $(MODEL)

$(INT4_MODEL)/config.json: | native
	$(PY) tools/fetch_demo_model.py --int4 $(INT4_MODEL)

# With CUDA=OFF for CPU kernels only, with CUDA_ARCHS="80;90" for fewer GPUs. The wheel's Python is the environment's own.
CUDA ?= AUTO
CUDA_ARCHS ?= release
wheel: $(VENV)/.env $(MODEL)/config.json
	@echo "== wheel"
	@rm -rf dist build/wheel && mkdir -p build
	@FASTSERVE_BUILD_TREE=build/wheel CMAKE_ARGS="-DFASTSERVE_CUDA=$(CUDA) -DFASTSERVE_CUDA_ARCHS=$(CUDA_ARCHS)" \
	  $(PY) setup.py -q bdist_wheel > build/wheel.log 2>&1 || (cat build/wheel.log; exit 1)
	@$(PY) tools/prove_wheel.py dist/*.whl $(MODEL)

# --- tests ---

# A worker per core, up to eight, since each has a model of its own in memory.
TEST_WORKERS ?= $(shell test $(JOBS) -gt 8 && echo 8 || echo $(JOBS))
unit: native simulated $(MODEL)/config.json $(INT4_MODEL)/config.json
	@echo "== pytest"
	@$(PY) -m pytest -n $(TEST_WORKERS) --dist worksteal

# nvcc comes from PyPI where none is installed.
nvcc: $(VENV)/.env
	@command -v nvcc > /dev/null || test -x /usr/local/cuda/bin/nvcc || $(PY) tools/install_requirements.py cuda

# The simulated CUDA device with its own tests, and the kernels on it for tests/cuda.
simulated: $(VENV)/.env nvcc
	@echo "== simulated CUDA device"
	@mkdir -p build
	@tools/ensure_googletest.sh
	@$(CMAKE) -G Ninja -S . -B build/sim -DPython_EXECUTABLE=$(abspath $(PY)) -DFASTSERVE_CUDA=ON \
	  -DFASTSERVE_BUILD_MODULE=OFF -DFASTSERVE_BUILD_SIMULATED=ON > build/sim.log || (cat build/sim.log; exit 1)
	@$(CMAKE) --build build/sim -j $(JOBS) > build/sim.log || (cat build/sim.log; exit 1)
	@$(call ctest,sim)

cpp-test: $(VENV)/.env
	@echo "== C++ tests"
	@mkdir -p build
	@tools/ensure_googletest.sh
	@$(CMAKE) -G Ninja -S . -B build/cpp -DFASTSERVE_BUILD_MODULE=OFF -DFASTSERVE_BUILD_TESTS=ON > build/cpp.log || (cat build/cpp.log; exit 1)
	@$(CMAKE) --build build/cpp -j $(JOBS) > build/cpp.log || (cat build/cpp.log; exit 1)
	@$(call ctest,cpp)

# AddressSanitizer and UndefinedBehaviorSanitizer on all of them, ThreadSanitizer on the thread pool.
sanitize: $(VENV)/.env
	@echo "== C++ tests under ASan and UBSan, the thread pool under TSan"
	@mkdir -p build
	@tools/ensure_googletest.sh
	@$(call sanitized,asan,address$(comma)undefined,all)
	@$(call ctest,asan)
	@$(call sanitized,tsan,thread,test_thread_pool)
	@build/tsan/tests/cpp/test_thread_pool --gtest_brief=1

# Not part of `test`: needs g++-aarch64-linux-gnu, qemu-user and the sources of GoogleTest (libgtest-dev).
aarch64: $(VENV)/.env
	@echo "== aarch64: portable kernels compiled, C++ tests on QEMU"
	@mkdir -p build
	@($(CMAKE) -G Ninja -S . -B build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CROSSCOMPILING_EMULATOR="qemu-aarch64;-L;/usr/aarch64-linux-gnu" \
	  -DCMAKE_DISABLE_FIND_PACKAGE_GTest=ON -DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=/usr/src/googletest \
	  -DFASTSERVE_BUILD_MODULE=OFF -DFASTSERVE_BUILD_TESTS=ON && \
	  $(CMAKE) --build build/aarch64 -j $(JOBS) --target all fastserve_cpu_portable) > build/aarch64.log || (cat build/aarch64.log; exit 1)
	@$(call ctest,aarch64)

# Not part of `test`: the C++ microbenchmarks, built into build/bench/bench/cpp.
bench-cpp: $(VENV)/.env
	@echo "== C++ microbenchmarks"
	@mkdir -p build
	@($(CMAKE) -G Ninja -S . -B build/bench -DPython_EXECUTABLE=$(abspath $(PY)) -DFASTSERVE_BUILD_MODULE=OFF \
	  -DFASTSERVE_BUILD_BENCH=ON && $(CMAKE) --build build/bench -j $(JOBS)) > build/bench.log || (cat build/bench.log; exit 1)
	@ls build/bench/bench/cpp/bench_*

# ctest FOLDER
define ctest
$(VENV)/bin/ctest --test-dir build/$(1) --output-on-failure -j $(JOBS) > build/$(1).log || (cat build/$(1).log; exit 1)
	@tail -n 4 build/$(1).log
endef

comma := ,
# sanitized FOLDER, SANITIZERS, TARGET
define sanitized
($(CMAKE) -G Ninja -S . -B build/$(1) -DFASTSERVE_SANITIZE=$(2) \
  -DFASTSERVE_BUILD_MODULE=OFF -DFASTSERVE_BUILD_TESTS=ON && \
  $(CMAKE) --build build/$(1) -j $(JOBS) --target $(3)) > build/$(1).log || (cat build/$(1).log; exit 1)
endef

# Needs a torch with CUDA in the environment, and nvcc. Without a GPU: bench/gpu_report.py --simulated rehearses it.
gpu-report: native $(MODEL)/config.json
	$(PY) bench/gpu_report.py --out build/gpu_report

format: $(VENV)/.env
	@$(PY) -m ruff check --fix -q . ; $(PY) -m ruff format -q .
	@$(VENV)/bin/clang-format -i $(CXX_FILES)

check: $(VENV)/.env
	@echo "== style"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

clean:
	rm -rf build python/fastserve/_native*.so
