# SPDX-License-Identifier: Apache-2.0
"""The memory plan: what weights and buffers take, what is left for the KV cache, and the longest context it holds."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

from fastserve.config import EngineConfig
from fastserve.errors import FastserveError

GiB = 2**30
# Of what is free once weights and buffers are placed, the KV cache may take this share: the rest is for the
# operating system, the page cache of the weights' file and the user's other programs.
KV_SHARE_OF_FREE = 0.6
# Enough for 64 contexts of 4,096 tokens of a 135M model, and little enough for a laptop.
DEFAULT_KV_BYTES = 4 * GiB


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by use. `num_blocks` KV blocks of `block_size` tokens; the longest context is `max_model_len`."""

    free_bytes: int
    weight_bytes: int
    buffer_bytes: int
    kv_bytes: int
    block_bytes: int
    num_blocks: int
    block_size: int
    max_model_len: int

    def table(self) -> str:
        rows = [
            ("weights", self.weight_bytes, ""),
            ("buffers", self.buffer_bytes, ""),
            ("KV cache", self.kv_bytes, f"{self.num_blocks:,} blocks of {self.block_size} tokens"),
            ("left free", self.free_bytes - self.kv_bytes, ""),
        ]
        lines = [f"  {name:<10}{amount / GiB:>9.3f} GiB  {note}".rstrip() for name, amount, note in rows]
        return "\n".join(["Memory plan", *lines, f"  longest context {self.max_model_len:,} tokens"])


def free_memory_bytes() -> int:
    """Memory that this process can still get, in bytes: the kernel's estimate, or less under a cgroup limit."""
    free = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
        pass
    if free is None:
        import os

        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(free, 0)


def peak_memory_bytes() -> int:
    """The most that was resident of this process at a time. Shared libraries count, swapped pages do not."""
    with contextlib.suppress(OSError, ValueError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back_freed_memory() -> None:
    """What was freed and the C library keeps for later goes to the system, where it has a way to do so (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def plan_memory(
    config: EngineConfig,
    *,
    block_bytes: int,
    weight_bytes: int,
    buffer_bytes: int,
    model_max_len: int,
    free_bytes: int,
) -> MemoryPlan:
    """Choose the number of KV blocks and the longest context.

    `free_bytes` is what is free now, weights and buffers already placed. The order of wishes: `num_blocks`, then
    `kv_cache_memory_bytes`, then the smaller of DEFAULT_KV_BYTES (or one whole context, if that is larger) and
    KV_SHARE_OF_FREE of what is free. Raises FastserveError when not even two blocks fit or an explicit
    max_model_len does not.
    """
    size = config.block_size
    wanted_len = config.max_model_len or model_max_len
    if wanted_len > model_max_len:
        raise FastserveError(
            f"max_model_len={wanted_len} is more than the model's max_position_embeddings={model_max_len}"
        )
    blocks_of_one = -(-wanted_len // size)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // block_bytes
    else:
        useful = max(DEFAULT_KV_BYTES // block_bytes, blocks_of_one)
        num_blocks = min(useful, int(free_bytes * KV_SHARE_OF_FREE) // block_bytes, blocks_of_one * config.max_num_seqs)
    kv_bytes = num_blocks * block_bytes
    if num_blocks < 1 or kv_bytes > free_bytes:
        raise FastserveError(
            f"a KV cache of {num_blocks} blocks needs {kv_bytes / GiB:.3f} GiB; {free_bytes / GiB:.3f} GiB are free "
            f"(a block of {size} tokens takes {block_bytes:,} bytes; set num_blocks or kv_cache_memory_bytes)"
        )
    max_model_len = min(wanted_len, num_blocks * size)
    if config.max_model_len is not None and max_model_len < config.max_model_len:
        raise FastserveError(
            f"max_model_len={config.max_model_len} needs {blocks_of_one} KV blocks of {size} tokens; the cache has "
            f"{num_blocks} (lower max_model_len, or raise num_blocks or kv_cache_memory_bytes)"
        )
    return MemoryPlan(free_bytes, weight_bytes, buffer_bytes, kv_bytes, block_bytes, num_blocks, size, max_model_len)
