# SPDX-License-Identifier: Apache-2.0
"""The order in which a batch that is known in advance runs, so that each shared prefix is computed once.

The whole batch is analysed before anything runs (`csrc/plan/prefix_analysis.h`): requests that begin alike become
neighbours, at every level, and groups that decode much for what they compute go first, so that later prompts find
decodes to ride with (BatchLLM, Zheng et al. 2024). What a request gets does not depend on the order.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastserve.config import SamplingParams
from fastserve.request import SharedPrefix

# Output tokens to expect of a request without max_tokens.
EXPECTED_OUTPUT = 256


@dataclass(frozen=True)
class PrefixPlan:
    """`order[k]` is the request to add k-th. All lists but `order` and `prefixes` go by request."""

    order: Sequence[int]
    prefix_of: Sequence[SharedPrefix | None]  # the innermost shared prefix of each request
    prefixes: Sequence[SharedPrefix]  # all of them: to be dropped when the batch is over, however it ends
    num_tokens: int  # of all prompts
    num_computed: int  # of these, to compute when every prefix of whole blocks is computed once
    min_computed: int  # the least possible, with every common token shared

    @property
    def saving(self) -> float:
        """The part of the prompt tokens that need not be computed."""
        return 1 - self.num_computed / max(self.num_tokens, 1)


def unplanned(num_requests: int) -> PrefixPlan:
    """Requests in the order in which they are given, without shared prefixes."""
    return PrefixPlan(range(num_requests), [None] * num_requests, (), 0, 0, 0)


def plan_prefixes(
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    block_size: int,
    cache_salts: Sequence[str] | None = None,
    priorities: Sequence[int] | None = None,
) -> PrefixPlan:
    """`prompts` are token ids, none empty. Requests of different salts share nothing, and those with prompt_logprobs
    read no prefix. `priorities` where they decide who runs first: requests of different ones plan nothing together, or
    all prefixes of the urgent would be held until the last of the others has ended. About 12 bytes of memory per token
    meanwhile, and some hundred per request."""
    from fastserve import _native

    tokens = array("i")
    for prompt in prompts:
        tokens.extend(prompt)
    starts = np.cumsum([0, *map(len, prompts)], dtype=np.int64)
    families: dict[tuple[str, int], int] = {}
    roots = np.empty(len(prompts), np.int32)
    for i, one in enumerate(params):
        family = ("" if cache_salts is None else cache_salts[i], 0 if priorities is None else priorities[i])
        roots[i] = families.setdefault(family, len(families)) if one.prompt_logprobs is None else -1 - i
    expected = [(EXPECTED_OUTPUT if one.max_tokens is None else one.max_tokens) * one.n for one in params]
    analysis = _native.PrefixAnalysis(
        np.frombuffer(tokens, np.int32) if tokens else np.empty(0, np.int32),
        starts,
        block_size=block_size,
        expected_output=np.array(expected, np.int64),
        roots=roots,
    )
    prefixes: list[SharedPrefix] = []
    for parent, _, end, _, _, num_children in analysis.nodes.tolist():
        prefixes.append(SharedPrefix(end, prefixes[parent] if parent >= 0 else None, num_children))
    prefix_of = [prefixes[node] if node >= 0 else None for node in analysis.node_of.tolist()]
    for prefix, one in zip(prefix_of, params, strict=True):
        if prefix is not None:
            prefix.num_open += one.n - 1  # each completion is a request of its own
    return PrefixPlan(
        analysis.order.tolist(),
        prefix_of,
        prefixes,
        analysis.num_tokens,
        analysis.num_computed,
        analysis.min_computed,
    )
