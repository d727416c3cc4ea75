# SPDX-License-Identifier: Apache-2.0
"""Host memory in pages of 2 MiB. Weights that stream past once per step would else miss the TLB at every page of 4 KiB:
a plain read of memory gains about a quarter."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

PAGE_BYTES = 2 << 20
CHUNK_BYTES = 32 << 20  # small tensors share a mapping: one of its own would have no whole page
ALIGNMENT = 64  # of each tensor: a cache line, a vector


class HugePages:
    """Hands out memory of any content. A mapping is given back when the last tensor in it has gone."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        if num_bytes > CHUNK_BYTES // 4:
            memory = _mapping(num_bytes)[:num_bytes]
        else:
            if self._used + num_bytes > self._chunk.numel():
                self._chunk, self._used = _mapping(CHUNK_BYTES), 0
            memory = self._chunk[self._used : self._used + num_bytes]
            self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return memory.view(dtype).view(tuple(shape))


def _mapping(num_bytes: int) -> torch.Tensor:
    """uint8, at least `num_bytes`. Where the system has no huge pages, it has ordinary ones."""
    size = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # another system, or a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
