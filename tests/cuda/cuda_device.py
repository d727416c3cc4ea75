# SPDX-License-Identifier: Apache-2.0
"""Where the CUDA ops run in tests: on the GPU if this machine has one and the package was built for it, else on the
simulated device (`build/sim`, see tests/cuda/CMakeLists.txt)."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastserve import _native

ROOT = Path(__file__).resolve().parents[2]
SIMULATED_MULTIPROCESSORS = 8
ASYNC_MODES = {"late": 0, "early": 1, "random": 2}


def load_simulated() -> ModuleType | None:
    """The module built by CMake with FASTSERVE_BUILD_SIMULATED, or None if it was not built."""
    folder = Path(os.environ.get("FASTSERVE_SIM_DIR", ROOT / "build" / "sim"))
    for path in folder.glob("_native_sim*.so"):
        spec = importlib.util.spec_from_file_location("_native_sim", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return None


class SimulatedDevice:
    """Runs ops with race detection, bounds checks, poisoned memory, and async copies landing as the mode says."""

    def __init__(self, module: ModuleType, async_mode: str, seed: int = 0, **checks: bool):
        self.module = module
        self.name = f"simulated-{async_mode}" + (f"-seed{seed}" if seed else "")
        self.async_mode = ASYNC_MODES[async_mode]
        self.seed = seed
        self.checks = checks  # weak_memory, ignore_order
        self.num_multiprocessors = SIMULATED_MULTIPROCESSORS

    def ops(self) -> list[str]:
        return self.module.ops()

    def run(self, op: str, arguments: dict[str, Any]) -> None:
        """Outputs are written into the given CPU tensors. Raises ValueError, also for what the device reports."""
        self.module.configure(self.async_mode, self.seed, self.num_multiprocessors, **self.checks)
        self.module.run(op, arguments)

    def counters(self) -> list[dict[str, Any]]:
        """One dict per launch of the last run."""
        return json.loads(self.module.counters())


class Gpu:
    """Runs ops on the first CUDA device."""

    name = "gpu"

    def __init__(self) -> None:
        self.num_multiprocessors: int = _native.cuda_devices()[0]["multiprocessors"]

    def ops(self) -> list[str]:
        return [row["op"] for row in _native.op_table() if row["cuda"]]

    def run(self, op: str, arguments: dict[str, Any]) -> None:
        given = {name: value for name, value in arguments.items() if torch.is_tensor(value)}
        there = {name: value.to("cuda", copy=True) for name, value in given.items() if value.is_contiguous()}
        for name, value in given.items():
            if name not in there:
                there[name] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
                there[name].copy_(value)
        getattr(_native.ops, op)(**{**arguments, **there})
        torch.cuda.synchronize()
        for name, value in given.items():
            value.copy_(there[name])


def num_multiprocessors() -> int:
    gpus = _native.cuda_devices()
    return gpus[0]["multiprocessors"] if gpus else SIMULATED_MULTIPROCESSORS


def linear_counters() -> torch.Tensor:
    return torch.zeros(_native.cuda_linear_counters, dtype=torch.int32)


def find_devices() -> list[SimulatedDevice | Gpu]:
    """Every way in which the op cases are to run here; empty if neither a GPU nor the simulated device is there."""
    if _native.built_with_cuda and _native.cuda_devices():
        return [Gpu()]
    module = load_simulated()
    if module is None:
        return []
    return [
        SimulatedDevice(module, "late"),
        SimulatedDevice(module, "early"),
        SimulatedDevice(module, "random", seed=7),
    ]
