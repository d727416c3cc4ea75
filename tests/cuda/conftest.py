# SPDX-License-Identifier: Apache-2.0
"""Leaves out the tests of CUDA ops where nothing can run them, and says so."""

from __future__ import annotations

from cuda_device import find_devices

DEVICES = find_devices()
collect_ignore = [] if DEVICES else ["test_cuda_ops.py", "test_cuda_sampling.py"]


def pytest_report_header() -> str:
    if not DEVICES:
        return "CUDA ops: not tested, there is neither a GPU nor build/sim (see tests/cuda/CMakeLists.txt)"
    return "CUDA ops: on " + ", ".join(device.name for device in DEVICES)
