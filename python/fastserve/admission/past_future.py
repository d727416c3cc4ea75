# SPDX-License-Identifier: Apache-2.0
"""A request may start if memory is predicted to last until all have ended: the Past-Future scheduler of Gong et
al. 2025 (LightLLM).

Past: how long outputs will be is drawn from the lengths of those that ended lately, given what each request has
got already. Future: memory is fullest just before some request ends, when all that are still alive have grown
by as many tokens as that one; the peak over these moments must fit. A shared block is counted once, for the
holder that is predicted to live longest.

Beyond the paper: memory is counted in blocks, exactly; and a request keeps its random numbers for life. Drawn
anew in every step, a refused candidate would only have to wait for a lucky draw.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from fastserve.admission import Memory, blocks_at_worst, conservative, output_limit
from fastserve.request import Request

SAMPLE_SETS = 5  # independent predictions; the highest of their peaks counts
RESERVE = 0.02  # of the cache, kept for what turns out longer than predicted


def admit(candidate: Request, running: Sequence[Request], memory: Memory) -> bool:
    if memory.num_needed > memory.num_available:
        return False
    requests = [*running, candidate]
    if sum(blocks_at_worst(request, memory) for request in requests) + memory.num_held <= memory.num_blocks:
        return True
    limits = np.array([output_limit(request, memory.max_len) for request in requests])
    outputs = np.array([request.num_output_tokens for request in requests])
    numbers = np.array([request.queue_key[-1] for request in requests], np.uint64)
    totals = predicted_lengths(np.array(memory.output_lengths), outputs, limits, uniform(numbers, SAMPLE_SETS))
    # The KV of a last token is never computed.
    if fits(requests, np.maximum(totals - outputs - 1, 0), memory, RESERVE):
        return True
    # What fits at worst needs no reserve. The sum above has counted shared blocks many times.
    return memory.num_shared(candidate) > 0 and conservative.admit(candidate, running, memory)


def fits(requests: Sequence[Request], remaining: np.ndarray, memory: Memory, reserve: float) -> bool:
    """Whether the cache less `reserve` holds `requests` until they have ended, in every row of `remaining`:
    int64 [sets, requests], the tokens by which each will grow."""
    held = np.array([len(request.token_ids) for request in requests])
    spared = _spared_blocks(requests, remaining.mean(axis=0), memory)
    idle = memory.num_idle(sum(len(request.block_ids) for request in requests) - int(spared.sum()))
    capacity = (memory.num_blocks - idle) * (1 - reserve)
    return all(peak_blocks(held, row, spared, memory.block_size) <= capacity for row in remaining)


def peak_blocks(held: np.ndarray, remaining: np.ndarray, spared: np.ndarray, block_size: int) -> int:
    """Blocks in use at the fullest moment, if request j holds held[j] tokens, each step adds one to all, and j
    ends after remaining[j] steps. spared[j] of its blocks are counted elsewhere. All int64 [requests].

    Sorted by remaining, descending, the alive just before request i ends are requests 0 to i.
    """
    order = np.argsort(-remaining, kind="stable")
    blocks, tokens = np.divmod(held[order] - 1, block_size)  # all blocks but the last, tokens of that one less 1
    new_blocks, new_tokens = np.divmod(remaining[order], block_size)
    # j's last block overflows by m more tokens if tokens[j] + m >= block_size
    overflows = tokens[:, None] + np.arange(block_size) >= block_size
    num_overflows = np.cumsum(overflows, axis=0)[np.arange(len(order)), new_tokens]
    num_alive = np.arange(1, len(order) + 1)
    used = np.cumsum(blocks + 1 - spared[order]) + num_alive * new_blocks + num_overflows
    return int(used.max())


def predicted_lengths(history: np.ndarray, outputs: np.ndarray, limits: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Output lengths, int64 like uniforms [sets, requests], of requests that have `outputs` tokens of at most
    `limits`.

    The steps from `outputs` over the longer lengths of `history` (ascending) to the limit are equally likely,
    and lengths within a step too. Without a history all lengths up to the limit are.
    """
    first = np.searchsorted(history, outputs, side="right")
    step, within = np.divmod(uniforms * (len(history) - first + 1), 1)
    index = first + step.astype(np.int64)  # of the step's end
    ends = np.minimum(np.append(history, np.iinfo(np.int64).max)[index], limits)
    begins = np.where(index == first, outputs, np.minimum(np.insert(history, 0, 0)[index], limits))
    return np.ceil(begins + within * (ends - begins)).astype(np.int64)


def uniform(numbers: np.ndarray, sets: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [sets, requests], fixed by the requests' numbers (splitmix64)."""
    keys = numbers[None, :] * np.uint64(sets) + np.arange(1, sets + 1, dtype=np.uint64)[:, None]
    mixed = keys * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def _spared_blocks(requests: Sequence[Request], remaining: np.ndarray, memory: Memory) -> np.ndarray:
    """Of each request's blocks, how many belong to one that lives longer as well. They come first in its table:
    who holds a block holds all before it."""
    spared = np.zeros(len(requests), np.int64)
    seen: set[int] = set()
    for place in np.argsort(-remaining, kind="stable"):
        request = requests[place]
        shared = request.block_ids[: memory.num_shared(request)]
        if shared:
            spared[place] = bisect_left(shared, True, key=lambda block_id: block_id not in seen)
            seen.update(shared[spared[place] :])
    return spared
