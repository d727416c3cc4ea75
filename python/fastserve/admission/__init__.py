# SPDX-License-Identifier: Apache-2.0
"""Admission: whether the next waiting request may start in the memory there is. One small module for each way,
found by its name.

A way is a module with the one function of `Admission`, a pure function of what it is given. Who is next is the
policy's decision; every running decode is part of every step whatever is decided here.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from fastserve.errors import InvalidRequest
from fastserve.request import Request


@dataclass(frozen=True, slots=True)
class Memory:
    """The KV cache, seen by a request that wants to start. Its block table holds what the prefix cache gave it."""

    num_needed: int  # new blocks until its first output token
    num_available: int  # blocks free now, or cached and unused
    num_blocks: int  # the whole cache
    block_size: int  # tokens of a block
    max_len: int  # tokens that a request may grow to, prompt and output together
    output_lengths: Sequence[int]  # of requests that ended lately, ascending
    num_shared: Callable[[Request], int]  # how many of its leading blocks have another owner too
    num_held: int = 0  # blocks kept for requests still to come, whether running ones use them or not

    def num_idle(self, num_in_tables: int) -> int:
        """Blocks that none of those holds whose tables have `num_in_tables` different blocks: kept, or another's."""
        return max(0, self.num_blocks - self.num_available - num_in_tables)


class Admission(Protocol):
    def admit(self, candidate: Request, running: Sequence[Request], memory: Memory) -> bool:
        """Whether the first of the waiting requests may start now. Not asked when nothing runs: then it may."""


def output_limit(request: Request, max_len: int) -> int:
    """The most output tokens that `request` can get."""
    room = max_len - request.num_prompt_tokens
    return room if request.params.max_tokens is None else min(request.params.max_tokens, room)


def blocks_at_worst(request: Request, memory: Memory) -> int:
    """Blocks that `request` holds if it gets all the output it may; the KV of its last token is never computed."""
    return -(-(request.num_prompt_tokens + output_limit(request, memory.max_len) - 1) // memory.block_size)


def admission_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_admission(name: str) -> Admission:
    """The admission called `name`; unknown names raise `InvalidRequest` listing the known ones."""
    if name not in admission_names():
        raise InvalidRequest(f"admission={name!r} is unknown; known are: {', '.join(admission_names())}")
    return cast(Admission, importlib.import_module(f"{__name__}.{name}"))
