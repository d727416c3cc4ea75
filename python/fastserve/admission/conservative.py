# SPDX-License-Identifier: Apache-2.0
"""A request may start if all would fit even if each got the longest output it may. Nothing is ever preempted
(unless shared blocks part), and most of the memory stays empty where outputs end before their limit.

A block that several requests share is counted once.
"""

from collections.abc import Sequence

from fastserve.admission import Memory, blocks_at_worst
from fastserve.request import Request


def admit(candidate: Request, running: Sequence[Request], memory: Memory) -> bool:
    requests = [*running, candidate]
    worst = sum(blocks_at_worst(request, memory) for request in requests)
    if worst + memory.num_held > memory.num_blocks:
        shared = [memory.num_shared(request) for request in requests]
        tables = [request.block_ids[:count] for request, count in zip(requests, shared, strict=True)]
        spared = sum(shared) - len({block_id for table in tables for block_id in table})
        worst += memory.num_idle(sum(len(request.block_ids) for request in requests) - spared) - spared
    return worst <= memory.num_blocks and memory.num_needed <= memory.num_available
