# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from . import Arguments, OpCase, empty, normal, widen_rows

EPS = 1e-5


def make(
    generator: torch.Generator, tokens: int, hidden: int, dtype: torch.dtype, residual: bool, strided: bool
) -> Arguments:
    x = normal(generator, tokens, hidden, scale=3.0)
    return {
        "out": empty(tokens, hidden),
        "x": widen_rows(x) if strided else x,
        "residual": normal(generator, tokens, hidden, scale=10.0) if residual else None,
        "weight": normal(generator, hidden).to(dtype),
        "eps": EPS,
    }


def reference(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    row = inputs["x"].double()
    outputs = {}
    if inputs["residual"] is not None:
        # The sum is stored in the residual's own precision, and the norm is that of what was stored.
        row = (inputs["residual"] + inputs["x"].to(inputs["residual"].dtype)).double()
        outputs["residual"] = row
    scale = (row.square().mean(-1, keepdim=True) + inputs["eps"]).rsqrt()
    return {"out": row * scale * inputs["weight"].double(), **outputs}


def case(
    tokens: int, hidden: int, dtype: torch.dtype = torch.float32, residual: bool = False, strided: bool = False
) -> OpCase:
    parts = [f"T{tokens}-H{hidden}-{str(dtype).removeprefix('torch.')}"]
    parts += ["residual"] * residual + ["strided"] * strided
    return OpCase(
        op="rms_norm",
        id="-".join(parts),
        make=lambda generator: make(generator, tokens, hidden, dtype, residual, strided),
        reference=reference,
        length=hidden + 6,
        rows=("out", "x", "residual"),
    )


CASES = [
    case(tokens, hidden, residual=residual)
    for residual in (False, True)
    for tokens, hidden in [(0, 8), (1, 1), (3, 7), (8, 16), (9, 33), (17, 576)]
]
CASES += [
    case(9, 33, dtype, residual, strided=True)
    for dtype in (torch.bfloat16, torch.float16)
    for residual in (False, True)
]
