# SPDX-License-Identifier: Apache-2.0
"""The engine's CUDA device with a simulated GPU under it: the same staging, graphs and layers, and kernels that run
from their PTX. Device memory is host memory, so torch's own operators work on it as on CPU tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from fastserve import _native
from fastserve.engine.device import CudaDevice

POISON = 0xFF  # bytes of NaN: what nobody has written must not be read


class SimulatedOps:
    """The ops by name, with positional or keyword arguments like `_native.ops`."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._arguments = {row["op"]: [arg["name"] for arg in row["args"]] for row in _native.op_table()}
        self.num_launches: dict[str, int] = dict.fromkeys(self._arguments, 0)

    def __getattr__(self, op: str) -> Callable[..., None]:
        names = self._arguments[op]

        def launch(*values: Any, **named: Any) -> None:
            given = {**dict(zip(names, values, strict=False)), **named}
            self.num_launches[op] += 1
            self._module.launch(op, {name: value for name, value in given.items() if value is not None})

        return launch


class SimulatedCudaDevice(CudaDevice):
    """`graphs`: record steps of decodes; every op of such a step must then be one of ours, as with `exact`."""

    def __init__(
        self, module: ModuleType, *, exact: bool = True, graphs: bool = True, memory_bytes: int = 1 << 30
    ) -> None:
        self.module = module
        self.has_graphs = graphs
        self.memory_bytes = memory_bytes
        self.num_captures = self.num_replays = 0
        self._set_up(exact, SimulatedOps(module), module.num_multiprocessors())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        memory = self.module.Memory(math.prod(shape) * dtype.itemsize, f"{list(shape)} {dtype}")
        if math.prod(shape) == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        there = torch.frombuffer(memory, dtype=torch.uint8)
        there.fill_(POISON)
        return there.view(dtype).view(tuple(shape))

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        self.module.synchronize()
        return tensor.clone()

    def free_memory_bytes(self) -> int:
        return self.memory_bytes

    def capture(self, arrays: Any, work: Callable[[], None]) -> Callable[[], None]:
        work()
        self.module.synchronize()
        graph = self.module.Graph()
        work()
        graph.end()
        self.num_captures += 1

        def replay() -> None:
            self.num_replays += 1
            graph.replay()

        return replay

    def _pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32)

    def _record_event(self) -> None:
        return None
