# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from . import Arguments, Expected, OpCase, empty, normal, widen_rows


def make(generator: torch.Generator, tokens: int, width: int, scale: float, strided: bool) -> Arguments:
    gate_up = normal(generator, tokens, 2 * width, scale=scale)
    return {"out": empty(tokens, width), "gate_up": widen_rows(gate_up) if strided else gate_up}


def reference(inputs: Mapping[str, Any]) -> dict[str, Expected]:
    gate, up = inputs["gate_up"].double().chunk(2, dim=-1)
    value = torch.nn.functional.silu(gate) * up
    # Rounding the argument of exp(-gate) costs a relative error proportional to |gate|.
    return {"out": Expected(value, value.abs() * (1 + gate.abs()))}


def case(tokens: int, width: int, scale: float = 2.0, strided: bool = False) -> OpCase:
    return OpCase(
        op="silu_mul",
        id=f"T{tokens}-I{width}-scale{scale:g}" + "-strided" * strided,
        make=lambda generator: make(generator, tokens, width, scale, strided),
        reference=reference,
        length=12,  # exp (relative error 3e-7, five roundings), one sum, one quotient, one product
        rows=("out", "gate_up"),
    )


CASES = [case(tokens, width) for tokens, width in [(0, 8), (1, 1), (3, 7), (4, 16), (5, 33), (9, 1536)]]
# Gates of both signs up to about 70: exp(-gate) spans nearly the whole range of float32.
CASES += [case(5, 33, scale=20.0), case(5, 33, strided=True)]
