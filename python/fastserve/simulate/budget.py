# SPDX-License-Identifier: Apache-2.0
"""How many tokens a step should have on a GPU: SARATHI's rule (Agrawal et al. 2023), on the cost model.

A larger chunk computes prompts faster, until arithmetic is all that counts; a smaller one carries more decodes for each
prompt and holds them up for less time. So the smallest is best at which prompts are computed at nearly their full rate.
"""

from __future__ import annotations

from fastserve.simulate.cost import TILE, CostModel

OF_FULL_RATE = 0.95
LARGEST = 4096
CONTEXT = 1024  # tokens before the chunk


def choose_budget(cost: CostModel) -> int:
    """The least max_num_batched_tokens, in whole tiles, that computes prompts at 95 % of the best rate."""

    def rate(tokens: int) -> float:
        return tokens / cost.step([(tokens, CONTEXT)], 0, 0, 1).total

    sizes = range(TILE, LARGEST + 1, TILE)
    full = max(map(rate, sizes))
    return next(size for size in sizes if rate(size) >= OF_FULL_RATE * full)
