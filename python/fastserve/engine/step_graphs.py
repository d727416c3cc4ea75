# SPDX-License-Identifier: Apache-2.0
"""Recorded steps: on a GPU a decode step is hundreds of small launches, which a CUDA graph queues as one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from fastserve.engine.device import Device

MAX_GRAPHS = 48  # each holds some hundred launches' parameters; the least recently used goes


class StepGraphs:
    """Records the work of a step on its first use and queues the recording from then on.

    The key names all that a recording depends on: shapes and addresses. Recordings share one set of buffers, so that
    their memory is bounded by their own parameters.
    """

    def __init__(self, device: Device, max_graphs: int = MAX_GRAPHS) -> None:
        self._device = device
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= self._max_graphs:
                self._graphs.popitem(last=False)
            graph = self._graphs[key] = self._device.capture(work)
        else:
            self._graphs.move_to_end(key)
        graph()
