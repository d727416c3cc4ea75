# SPDX-License-Identifier: Apache-2.0
"""Cases of `linear` and `pack_linear` with the CUDA layout of packed weights (csrc/layout/fragment.h)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from cuda_device import linear_counters, num_multiprocessors

from fastserve import _native
from op_cases import Arguments, Expected, OpCase, empty, normal, widen_rows

FORMATS = (torch.float16, torch.bfloat16)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """What `pack_linear` must give: [panel, chunk, pair, g, t, product, half, low] flattened."""
    rows, depth = weight.shape
    panels, chunks = -(-rows // 32), -(-depth // 16)
    full = torch.zeros(panels * 32, chunks * 16, dtype=weight.dtype)
    full[:rows, :depth] = weight
    by_axis = full.reshape(panels, 2, 2, 8, chunks, 2, 4, 2)  # panel pair product g chunk half t low
    return by_axis.permute(0, 4, 1, 3, 6, 2, 5, 7).reshape(panels, chunks * 16, 32).contiguous()


def unpack(packed: torch.Tensor, rows: int, depth: int) -> torch.Tensor:
    panels, padded, _ = packed.shape
    by_axis = packed.reshape(panels, padded // 16, 2, 8, 4, 2, 2, 2)
    return by_axis.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(panels * 32, padded)[:rows, :depth]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pack_case(rows: int, depth: int, dtype: torch.dtype, strided: bool = False) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        weight = normal(generator, rows, depth).to(dtype)
        shape = (-(-rows // 32), -(-depth // 16) * 16, 32)
        return {"packed": empty(*shape, dtype=dtype), "weight": widen_rows(weight) if strided else weight}

    return OpCase(
        op="pack_linear",
        id=f"fragments-N{rows}-K{depth}-{name_of(dtype)}" + "-strided" * strided,
        make=make,
        reference=lambda inputs: {"packed": pack(inputs["weight"]).double()},
        length=0,
    )


def reference(inputs: Mapping[str, Any]) -> dict[str, Expected]:
    x, rows = inputs["x"].double(), inputs["out"].shape[1]
    weight = unpack(inputs["packed"], rows, x.shape[1]).double()
    bias = torch.zeros(rows).double() if inputs["bias"] is None else inputs["bias"].double()
    return {"out": Expected(x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs())}


def linear_case(
    tokens: int, rows: int, depth: int, dtype: torch.dtype, bias: bool = False, strided: bool = False
) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        x, out = normal(generator, tokens, depth).to(dtype), empty(tokens, rows, dtype=dtype)
        return {
            "out": widen_rows(out, extra=8) if strided else out,
            "x": widen_rows(x, extra=8) if strided else x,
            "packed": pack(normal(generator, rows, depth, scale=depth**-0.5).to(dtype)),
            "bias": normal(generator, rows) if bias else None,
            "workspace": empty(_native.cuda_linear_workspace_bytes(tokens, num_multiprocessors()), dtype=torch.uint8),
            "counters": linear_counters(),
        }

    return OpCase(
        op="linear",
        id=f"fragments-M{tokens}-N{rows}-K{depth}-{name_of(dtype)}" + "-bias" * bias + "-strided" * strided,
        make=make,
        reference=reference,
        length=depth + 1,
        rows=("out", "x"),
    )


LINEAR_CASES = [pack_case(rows, depth, dtype) for dtype in FORMATS for rows, depth in ((1, 8), (33, 40), (96, 128))]
LINEAR_CASES += [pack_case(33, 24, torch.bfloat16, strided=True)]
for _dtype in FORMATS:
    LINEAR_CASES += [linear_case(tokens, 64, 72, _dtype) for tokens in (0, 1, 8, 16, 17, 32, 33, 64, 65)]
    LINEAR_CASES += [
        linear_case(3, 31, 16, _dtype, bias=True),  # an odd number of columns: no stores in pairs
        linear_case(5, 130, 336, _dtype, bias=True, strided=True),  # two blocks, more stages than the ring has
        linear_case(130, 160, 64, _dtype),
    ]
