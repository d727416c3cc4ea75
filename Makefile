# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
JOBS ?= $(shell nproc)

# Rebuild the extension in place after a change in csrc/ (needs the build requirements in $(PYTHON)'s environment).
.PHONY: native
native:
	@mkdir -p build
	@$(PYTHON) -m cmake -G Ninja -S . -B build/native -DPython_EXECUTABLE=$$($(PYTHON) -c 'import sys; print(sys.executable)') \
	  -DFASTSERVE_EMULATE_AVX512=$(if $(EMULATE),$(EMULATE),ON) > build/native.log 2>&1 || (cat build/native.log; exit 1)
	@$(PYTHON) -m cmake --build build/native -j $(JOBS)
