# SPDX-License-Identifier: Apache-2.0
"""Pages of the KV cache that are there before a step writes to them.

The system gives a page when it is written to first, in the middle of a step, and clears it. That is soon done on a
machine of its own; in a virtual one, whose host has to find the memory too, 4 ms per 2 MiB have been seen, a
quarter of the time of a prompt of 2,048 tokens. So while the engine rests, pages are asked for some way ahead of the
blocks in use. An engine that does not rest would use them up: when a quarter is left they are asked for beside its
steps, too, a few at a time, which takes some of a core from them. Not the whole cache: it may be larger than anybody
ever fills.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Sequence

import torch

AHEAD_BYTES = 512 << 20  # 64 requests of 256 tokens of a 135M model take 380 MB
SLICE_BYTES = 2 << 20  # asked for at a time: a step that comes meanwhile waits for no more
REST_S = 0.05  # without a step, before the engine counts as resting
PACE_S = 0.02  # between two slices beside steps, each of which may take 4 ms: a sixth of one core, 83 MB/s
SYSTEM_PAGE_BYTES = 4096
MADV_POPULATE_WRITE = 23  # as a write would, without a change; Linux 5.14, others refuse


class PagesAhead:
    """Of tensors [num_blocks, ...] of one shape, whose blocks come into use in the order of their numbers; memory of
    another device needs nothing. A thread works while pages are missing; `close` ends it, before the tensors go.

        with pages.step(last_block):
            ...  # compute it
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._addresses = [tensor.data_ptr() for tensor in tensors if tensor.device.type == "cpu"]
        self._num_blocks = tensors[0].shape[0]
        self._block_bytes = tensors[0].nbytes // self._num_blocks  # of one tensor
        self._ahead = AHEAD_BYTES // (self._block_bytes * len(tensors))  # in blocks, as all that follow
        self._used = self._present = self._wanted = 0
        self._in_step = False
        self._last_step = time.monotonic()  # when it ended
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._want(min(self._ahead, self._num_blocks))

    def step(self, last_block: int) -> PagesAhead:
        """A context in which a step writes to blocks up to about this one."""
        if last_block >= self._used:
            self._used = last_block + 1
            wanted = min(self._used + self._ahead, self._num_blocks)
            if wanted - self._wanted > self._ahead // 4 or (wanted == self._num_blocks > self._wanted):
                self._want(wanted)
        return self

    def __enter__(self) -> None:
        self._in_step = True

    def __exit__(self, *_: object) -> None:
        self._last_step = time.monotonic()
        self._in_step = False

    def close(self) -> None:
        self._closed.set()
        thread = self._thread
        if thread is not None:
            thread.join()

    def _want(self, num_blocks: int) -> None:
        with self._lock:
            self._wanted = num_blocks
            if self._thread is None and self._addresses:
                self._thread = threading.Thread(target=self._work, name="fastserve pages ahead", daemon=True)
                self._thread.start()

    def _is_done(self) -> bool:
        with self._lock:
            if self._present < self._wanted:
                return False
            self._thread = None
            return True

    def _work(self) -> None:
        step = max(SLICE_BYTES // self._block_bytes, 1)
        while not self._is_done():
            begin = max(self._present, self._used)
            end = min(begin + step, self._num_blocks)
            for address in self._addresses:
                self._wait()
                if self._closed.is_set() or not _populate(address, begin * self._block_bytes, end * self._block_bytes):
                    return
            self._present = end

    def _wait(self) -> None:
        """Until the engine rests or, if few pages are left, a little."""
        while not self._closed.is_set() and (self._in_step or time.monotonic() < self._last_step + REST_S):
            self._closed.wait(PACE_S)
            if self._present - self._used < self._ahead // 4:
                return


def _populate(address: int, begin: int, end: int) -> bool:
    """False: the system does not do that."""
    first = (address + begin) // SYSTEM_PAGE_BYTES * SYSTEM_PAGE_BYTES
    return _madvise(first, address + end - first, MADV_POPULATE_WRITE) == 0


_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
