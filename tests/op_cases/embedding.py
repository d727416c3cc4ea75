# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from . import Arguments, BadCase, OpCase, empty, normal

VOCAB = 37


def make(generator: torch.Generator, tokens: int, hidden: int, dtype: torch.dtype) -> Arguments:
    return {
        "out": empty(tokens, hidden),
        "token_ids": torch.randint(VOCAB, (tokens,), generator=generator, dtype=torch.int32),
        "weight": normal(generator, VOCAB, hidden).to(dtype),
    }


def reference(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {"out": inputs["weight"].double()[inputs["token_ids"].long()]}


def case(tokens: int, hidden: int, dtype: torch.dtype) -> OpCase:
    name = str(dtype).removeprefix("torch.")
    return OpCase(
        op="embedding",
        id=f"T{tokens}-H{hidden}-{name}",
        make=lambda generator: make(generator, tokens, hidden, dtype),
        reference=reference,
        length=0,
        rows=("out", "token_ids"),
    )


CASES = [
    case(tokens, hidden, dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for tokens, hidden in [(0, 8), (1, 1), (3, 7), (16, 16), (17, 33), (35, 576)]
]


def with_id(generator: torch.Generator, token_id: int) -> Arguments:
    arguments = make(generator, 3, 8, torch.float32)
    arguments["token_ids"][1] = token_id
    return arguments


BAD_CASES = [
    BadCase(
        "embedding",
        f"token-id-{bad}",
        lambda generator, bad=bad: with_id(generator, bad),
        rf"token_ids\[1\] is {bad}\b.*\b{VOCAB}\b",
    )
    for bad in (VOCAB, -1)
]
