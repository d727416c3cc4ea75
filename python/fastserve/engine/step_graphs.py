# SPDX-License-Identifier: Apache-2.0
"""Recorded steps. A step is hundreds of op calls: on a GPU a CUDA graph queues those of decodes as one, on a CPU a
native recording runs them, and those of a full step, in one call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from fastserve import _native
from fastserve.engine.device import Device

MAX_GRAPHS = 48  # each holds some hundred ops' arguments, 0.2 MB; the least recently used goes


class StepGraphs:
    """Records the work of a step on its first use and replays the recording from then on.

    The key names all that a recording depends on: shapes and addresses. Recordings share one set of buffers, so that
    their memory is bounded by their own arguments. `arrays` are those of every step.
    """

    def __init__(self, device: Device, arrays: _native.StepArrays, max_graphs: int = MAX_GRAPHS) -> None:
        self._device = device
        self._arrays = arrays
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= self._max_graphs:
                self._graphs.popitem(last=False)
            graph = self._graphs[key] = self._device.capture(self._arrays, work)
        else:
            self._graphs.move_to_end(key)
        graph()
