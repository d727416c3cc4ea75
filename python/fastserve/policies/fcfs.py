# SPDX-License-Identifier: Apache-2.0
"""First come, first served."""

from collections.abc import Sequence
from typing import Any

from fastserve.policies import Memory
from fastserve.request import Request


def order(request: Request) -> tuple[Any, ...]:
    return ()


def admit(candidate: Request, running: Sequence[Request], memory: Memory) -> bool:
    # The whole prompt must fit, though its blocks are taken chunk by chunk: a prompt that started in too
    # little memory would be preempted halfway and computed twice.
    return memory.num_needed <= memory.num_available
