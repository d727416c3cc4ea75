# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from sampling_reference import in_order, log_softmax

from . import Arguments, BadCase, Expected, OpCase, empty, normal, widen_rows


def arguments_of(logits: torch.Tensor, token_ids: list[int], num_top: int) -> Arguments:
    rows, vocab = logits.shape
    return {
        "logprobs": empty(rows),
        "ranks": empty(rows, dtype=torch.int32),
        "top_ids": empty(rows, num_top, dtype=torch.int32),
        "top_logprobs": empty(rows, num_top),
        "logits": logits,
        "token_ids": torch.tensor(token_ids, dtype=torch.int32),
        "workspace": empty(2, 4 * vocab),
    }


def reference(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor | Expected]:
    logits = inputs["logits"].numpy()
    rows, num_top = inputs["top_ids"].shape
    logprobs, top_logprobs = np.full(rows, np.nan), np.full((rows, num_top), np.nan)
    ranks, top_ids = np.zeros(rows, np.int32), np.full((rows, num_top), -1, np.int32)
    for b, token_id in enumerate(inputs["token_ids"].tolist()):
        row = logits[b]
        if not np.all(row < np.inf) or row.max() == -np.inf:
            continue
        order, exact = in_order(row), log_softmax(row)
        top_ids[b] = order[:num_top]
        top_logprobs[b] = exact[top_ids[b]]
        if token_id >= 0:
            logprobs[b] = exact[token_id]
            ranks[b] = np.flatnonzero(order == token_id)[0] + 1

    def near(values: np.ndarray) -> Expected:
        # The error of the normaliser does not shrink with the result: that is why 1 is added.
        value = torch.from_numpy(values)
        return Expected(value, value.abs() + 1)

    return {
        "logprobs": near(logprobs),
        "ranks": torch.from_numpy(ranks),
        "top_ids": torch.from_numpy(top_ids),
        "top_logprobs": near(top_logprobs),
    }


def case(rows: int, vocab: int, num_top: int, *, ties: bool = False, strided: bool = False) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        logits = normal(generator, rows, vocab, scale=5.0)
        logits = logits.round() if ties else logits
        token_ids = torch.randint(-1, vocab, (rows,), generator=generator).tolist()
        return arguments_of(widen_rows(logits) if strided else logits, token_ids, num_top)

    return OpCase(
        op="token_logprobs",
        id=f"B{rows}-V{vocab}-L{num_top}" + "-ties" * ties + "-strided" * strided,
        make=make,
        reference=reference,
        length=8,
        rows=("logprobs", "ranks", "top_ids", "top_logprobs", "logits", "token_ids"),
    )


def broken_rows(generator: torch.Generator) -> Arguments:
    logits = normal(generator, 6, 70)
    logits[0, 69] = float("nan")
    logits[1, 3] = float("inf")
    logits[2] = float("-inf")
    logits[3, 2:] = float("-inf")  # two finite logits, five are asked for
    logits[4] *= 1e37
    return arguments_of(logits, [1, 2, 3, 60, 5, -1], 5)


SHAPES = [(0, 8, 2), (1, 1, 1), (3, 7, 0), (4, 7, 7), (5, 64, 5), (9, 65, 20), (6, 1031, 1031), (3, 5000, 20)]
CASES = [case(rows, vocab, num_top, ties=ties) for ties in (False, True) for rows, vocab, num_top in SHAPES]
CASES += [
    case(4, 100, 3, strided=True),
    case(2, 49152, 5),
    OpCase("token_logprobs", "broken-rows", broken_rows, reference, length=8),
]


def bad(token_ids: list[int], num_top: int, num_workspaces: int = 2) -> Callable[[torch.Generator], Arguments]:
    return lambda generator: {
        **arguments_of(torch.zeros(2, 5), token_ids, num_top),
        "workspace": empty(num_workspaces, 20),
    }


BAD_CASES = [
    BadCase("token_logprobs", "id-too-large", bad([1, 5], 2), r"token_ids\[1\] is 5\b.*\b5 tokens"),
    BadCase("token_logprobs", "id-negative", bad([-2, 0], 2), r"token_ids\[0\] is -2\b"),
    BadCase("token_logprobs", "more-than-all", bad([0, 0], 6), r"the 6 largest .* 5 tokens"),
    BadCase("token_logprobs", "no-workspace", bad([0, 0], 2, 0), "workspace has 0 rows"),
]
