# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from sampling_reference import RowParams, arguments_of
from sampling_reference import sample as sample_exactly

from . import Arguments, BadCase, OpCase, normal, widen_rows

Params = Callable[[int, int], RowParams]  # (row, vocab) -> its parameters
NAN, INF = float("nan"), float("inf")


def reference(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    token_ids, close = sample_exactly(inputs)
    assert not any(close), f"rows {[b for b, c in enumerate(close) if c]} are too close to call: take another seed"
    return {"token_ids": token_ids}


def noise_of(row: int) -> dict[str, int]:
    return {"seed": (-1) ** row * (row + 1) * 0x1234567890AB, "position": 7 * row}


def case(name: str, rows: int, vocab: int, params: Params, *, strided: bool = False, ragged: bool = False) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        logits = (normal(generator, rows, vocab, scale=4.0) * 8).round() / 8  # many ties
        return arguments_of(widen_rows(logits) if strided else logits, [params(b, vocab) for b in range(rows)])

    per_row = ("token_ids", "logits", "temperature", "top_k", "top_p", "min_p", "seeds", "positions", "allowed_rows")
    return OpCase(
        op="sample",
        id=f"{name}-B{rows}-V{vocab}" + "-strided" * strided,
        make=make,
        reference=reference,
        length=0,
        rows=() if ragged else per_row,
    )


def greedy(b: int, vocab: int) -> RowParams:
    return RowParams()


def mixed(b: int, vocab: int) -> RowParams:
    """Every combination of filters, and greedy rows among them."""
    return RowParams(
        temperature=(0.0, 0.7, 1.0, 1.5)[b % 4],
        top_k=(0, 1, 5, vocab, vocab + 9)[b % 5],
        top_p=(1.0, 0.9, 0.5)[b % 3],
        min_p=(0.0, 0.0, 0.02)[b // 2 % 3],
        **noise_of(b),
    )


def unfiltered(b: int, vocab: int) -> RowParams:
    return RowParams(temperature=0.5 + b / 4, **noise_of(b))


def masked(b: int, vocab: int) -> RowParams:
    allowed = None if b % 3 == 0 else frozenset(range(b % 2, vocab, b + 1))
    return replace(mixed(b, vocab), allowed=allowed)


def penalised(b: int, vocab: int) -> RowParams:
    return replace(
        mixed(b, vocab),
        repetition_penalty=(1.0, 1.3, 0.8)[b % 3],
        frequency_penalty=(0.0, 0.5, -0.3)[b // 2 % 3],
        presence_penalty=(0.25, 0.0, -0.5)[b % 3],
        seen={i: i % 4 for i in range(b % 2, vocab, 3)} if b % 4 != 3 else {},
        bias=tuple((i, 1.5 * i - 4) for i in range(0, min(vocab, 7), 2)) if b % 2 else (),
        allowed=frozenset(range(b % 5, vocab, 2)) if b % 5 == 1 else None,
    )


SHAPES = [(1, 1), (3, 7), (5, 63), (7, 64), (20, 65), (9, 200), (6, 1031)]
CASES = [
    case(name, rows, vocab, params, ragged=name == "penalised")
    for name, params in [
        ("greedy", greedy),
        ("mixed", mixed),
        ("unfiltered", unfiltered),
        ("masked", masked),
        ("penalised", penalised),
    ]
    for rows, vocab in SHAPES
]
CASES += [
    case("mixed", 0, 33, mixed),
    case("mixed", 12, 70, mixed, strided=True),
    case("unfiltered", 2, 49152, unfiltered),
]


def broken_rows(generator: torch.Generator) -> Arguments:
    """NaN or +infinity fail their own row only, a mask or a bias of -infinity everywhere too."""
    logits = normal(generator, 10, 70, scale=2.0)
    params = [mixed(b, 70) for b in range(10)]
    logits[1, 69] = NAN
    logits[2, 0] = INF
    logits[3] = -INF
    params[4] = replace(params[4], allowed=frozenset())
    params[5] = replace(params[5], bias=tuple((i, -INF) for i in range(70)))
    logits[6, 3] = NAN  # a token that the mask excludes
    params[6] = replace(params[6], allowed=frozenset({1, 2}))
    logits[7, :68] = -INF  # two tokens are left
    logits[8, 5] = 3e38  # overflows through the penalty
    params[8] = replace(params[8], repetition_penalty=0.01, seen={5: 0})
    return arguments_of(logits, params)


CASES += [OpCase("sample", "broken-rows", broken_rows, reference, length=0)]


def all_arguments() -> Arguments:
    return arguments_of(torch.zeros(4, 40), [replace(penalised(b, 40), top_p=0.5, min_p=0.01) for b in range(4)])


def with_value(name: str, index: int, value: float) -> Callable[[torch.Generator], Arguments]:
    def make(generator: torch.Generator) -> Arguments:
        arguments = all_arguments()
        arguments[name][index] = value
        return arguments

    return make


def with_argument(name: str, value: Any) -> Callable[[torch.Generator], Arguments]:
    return lambda generator: {**all_arguments(), name: value}


BAD_VALUES = [
    ("temperature", 1, -0.5), ("temperature", 0, NAN), ("temperature", 2, INF),
    ("top_p", 0, 0.0), ("top_p", 1, 1.5), ("top_p", 3, NAN), ("min_p", 2, -0.1), ("min_p", 2, 1.1),
    ("top_k", 3, -1), ("repetition_penalty", 0, 0.0), ("frequency_penalty", 0, INF), ("presence_penalty", 1, NAN),
    ("seen_ids", 3, 40), ("seen_ids", 0, -1), ("bias_ids", 1, 40), ("bias_ids", 0, -7),
    ("seen_offsets", 2, 1000), ("allowed_rows", 0, 1), ("allowed_rows", 3, -2),
]  # fmt: skip
BAD_CASES = [
    BadCase("sample", f"{name}-{value:g}", with_value(name, index, value), rf"{name}\[\d+\] is ")
    for name, index, value in BAD_VALUES
]
ONE_WORD = torch.zeros(1, 1, dtype=torch.int32)
BAD_CASES += [
    BadCase("sample", "offsets-start", with_value("bias_offsets", 0, 1), "bias_offsets run from 1 to"),
    BadCase("sample", "offsets-end", with_value("seen_offsets", 4, 3), "seen_offsets run from 0 to 3"),
    BadCase("sample", "few-words", with_argument("allowed", ONE_WORD), "rows of 1 words; expected 2"),
    BadCase("sample", "no-rows", with_argument("workspace", torch.empty(0, 160)), "workspace has 0 rows"),
]
BAD_CASES += [
    BadCase("sample", f"no-{name}", with_argument(name, None), f"without '{name}'|'{re.escape(name)}' is given without")
    for name in ("seeds", "positions", "seen_ids", "seen_counts", "bias", "bias_ids", "allowed", "repetition_penalty")
]
