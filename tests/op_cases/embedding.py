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


# --- 8-bit codes ------------------------------------------------------------------------------------------------------


def make_int8(generator: torch.Generator, tokens: int, hidden: int, group_size: int) -> Arguments:
    groups = -(-hidden // group_size)
    return {
        "out": empty(tokens, hidden),
        "token_ids": torch.randint(VOCAB, (tokens,), generator=generator, dtype=torch.int32),
        "codes": torch.randint(-128, 128, (VOCAB, hidden), generator=generator).to(torch.int8),
        "scales": normal(generator, VOCAB, groups).half(),
        "group_size": group_size,
    }


def int8_reference(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    hidden, ids = inputs["codes"].shape[1], inputs["token_ids"].long()
    scales = inputs["scales"].double().repeat_interleave(min(inputs["group_size"], hidden), 1)[:, :hidden]
    exact = (scales * inputs["codes"].double())[ids]  # in float32, too: 8 bits times 11
    return {"out": exact.float().to(inputs["out"].dtype).double()}


def int8_case(tokens: int, hidden: int, group_size: int) -> OpCase:
    return OpCase(
        op="embedding_int8",
        id=f"T{tokens}-H{hidden}-G{group_size}",
        make=lambda generator: make_int8(generator, tokens, hidden, group_size),
        reference=int8_reference,
        length=0,
        rows=("out", "token_ids"),
    )


CASES += [
    int8_case(tokens, hidden, group_size)
    for tokens, hidden, group_size in [(0, 8, 32), (1, 1, 32), (3, 7, 7), (16, 33, 32), (17, 100, 64), (35, 576, 32)]
]
CASES += [int8_case(3, 96, 1 << 40)]


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


def changed_int8(**changes: Any) -> Any:
    def make_changed(generator: torch.Generator) -> Arguments:
        return make_int8(generator, 3, 100, 32) | changes

    return make_changed


BAD_CASES += [
    BadCase("embedding_int8", "group-size", changed_int8(group_size=40), "group_size is 40; multiples of 32"),
    BadCase(
        "embedding_int8",
        "groups",
        changed_int8(group_size=64),
        "'scales' has 4 groups; 100 inputs in groups of 64 are 2",
    ),
    BadCase(
        "embedding_int8",
        "token-id",
        changed_int8(token_ids=torch.tensor([0, VOCAB, 1], dtype=torch.int32)),
        rf"token_ids\[1\] is {VOCAB}\b.*\b{VOCAB}\b",
    ),
]
