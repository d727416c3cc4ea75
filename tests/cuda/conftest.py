# SPDX-License-Identifier: Apache-2.0
"""Leaves out the tests of CUDA ops where nothing can run them, and says so."""

from __future__ import annotations

import torch
from cuda_device import find_devices

torch.set_num_threads(1)  # the references are small: threads that wait for one another take most of their time
DEVICES = find_devices()
collect_ignore = (
    []
    if DEVICES
    else [
        "test_cuda_attention.py",
        "test_cuda_int4.py",
        "test_cuda_ops.py",
        "test_cuda_sampling.py",
        "test_cuda_stripes.py",
    ]
)


def pytest_report_header() -> str:
    if not DEVICES:
        return "CUDA ops: not tested, there is neither a GPU nor build/sim (see tests/cuda/CMakeLists.txt)"
    return "CUDA ops: on " + ", ".join(device.name for device in DEVICES)
