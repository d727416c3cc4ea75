# SPDX-License-Identifier: Apache-2.0
"""A request may start if its prompt fits into what is free now. Output yet to come counts for nothing: as it
grows, requests are preempted and computed again."""

from collections.abc import Sequence

from fastserve.admission import Memory
from fastserve.request import Request


def admit(candidate: Request, running: Sequence[Request], memory: Memory) -> bool:
    # The whole prompt must fit, though its blocks are taken chunk by chunk: a prompt that started in too
    # little memory would be preempted halfway and computed twice.
    return memory.num_needed <= memory.num_available
