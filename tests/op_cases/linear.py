# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from fastserve import _native

from . import Arguments, BadCase, Expected, OpCase, empty, normal, widen_rows

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PANEL = 32


def unpack(packed: torch.Tensor, rows: int, depth: int) -> torch.Tensor:
    """The weight [rows, depth] of a packed array: the layout, said a second time."""
    panels, padded, _ = packed.shape
    if packed.dtype == torch.bfloat16:
        by_row = packed.reshape(panels, padded // 2, PANEL, 2).permute(0, 2, 1, 3)
    else:
        by_row = packed.permute(0, 2, 1)
    return by_row.reshape(panels * PANEL, padded)[:rows, :depth]


def pack(weight: torch.Tensor) -> torch.Tensor:
    """What `pack_linear` must give."""
    rows, depth = weight.shape
    panels, padded, _ = _native.packed_linear_shape(rows, depth)
    full = torch.zeros(panels * PANEL, padded, dtype=weight.dtype)
    full[:rows, :depth] = weight
    if weight.dtype == torch.bfloat16:
        return full.reshape(panels, PANEL, padded // 2, 2).permute(0, 2, 1, 3).reshape(panels, padded, PANEL)
    return full.reshape(panels, PANEL, padded).permute(0, 2, 1).contiguous()


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- pack_linear ----------------------------------------------------------------------------------------------


def pack_case(rows: int, depth: int, dtype: torch.dtype, strided: bool = False) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        weight = normal(generator, rows, depth).to(dtype)
        packed = empty(*_native.packed_linear_shape(rows, depth), dtype=dtype)
        return {"packed": packed, "weight": widen_rows(weight) if strided else weight}

    return OpCase(
        op="pack_linear",
        id=f"N{rows}-K{depth}-{short(dtype)}" + "-strided" * strided,
        make=make,
        reference=lambda inputs: {"packed": pack(inputs["weight"]).double()},
        length=0,
    )


# --- linear ---------------------------------------------------------------------------------------------------


def make(
    generator: torch.Generator,
    tokens: int,
    rows: int,
    depth: int,
    dtype: torch.dtype,
    bias: bool = False,
    strided: bool = False,
) -> Arguments:
    x, out = normal(generator, tokens, depth), empty(tokens, rows)
    return {
        "out": widen_rows(out) if strided else out,
        "x": widen_rows(x) if strided else x,
        "packed": pack(normal(generator, rows, depth, scale=max(1, depth) ** -0.5).to(dtype)),
        "bias": normal(generator, rows) if bias else None,
        "workspace": empty(_native.linear_workspace_bytes(tokens, depth, dtype), dtype=torch.uint8),
        "counters": empty(2, dtype=torch.int32),  # CUDA's alone: a CPU kernel leaves them as they are
    }


def reference(inputs: Mapping[str, Any]) -> dict[str, Expected]:
    x, rows = inputs["x"].double(), inputs["out"].shape[1]
    weight = unpack(inputs["packed"], rows, x.shape[1]).double()
    bias = torch.zeros(rows).double() if inputs["bias"] is None else inputs["bias"].double()
    return {"out": Expected(x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs())}


def make_nonfinite(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    """Infinities and NaN must reach their own row's outputs and nothing else, not even through padding."""
    arguments = make(generator, 9, 40, 301, dtype)
    arguments["x"][1, -1] = float("inf")
    arguments["x"][4, 0] = float("-inf")
    arguments["x"][7, 255] = float("nan")
    return arguments


def case(tokens: int, rows: int, depth: int, dtype: torch.dtype, bias: bool = False, strided: bool = False) -> OpCase:
    return OpCase(
        op="linear",
        id=f"M{tokens}-N{rows}-K{depth}-{short(dtype)}" + "-bias" * bias + "-strided" * strided,
        make=lambda generator: make(generator, tokens, rows, depth, dtype, bias, strided),
        reference=reference,
        length=2 * depth + 1,  # without fused multiply-add every product is rounded too
        rows=("out", "x"),
        bf16_operands=("x",) if dtype == torch.bfloat16 else (),
    )


SIZES = [(1, 1), (31, 2), (32, 7), (33, 8), (64, 33), (65, 31)]
CASES = [pack_case(rows, depth, dtype) for dtype in WEIGHT_DTYPES for rows, depth in SIZES]
CASES += [pack_case(33, 7, dtype, strided=True) for dtype in WEIGHT_DTYPES]
for weight_dtype in WEIGHT_DTYPES:
    # Every token count up to the widest register tile and one over, then sizes around panels and pairs of k.
    CASES += [case(tokens, 40, 9, weight_dtype) for tokens in range(14)]
    CASES += [case(5, rows, depth, weight_dtype, bias=True) for rows, depth in SIZES]
    CASES += [case(13, 70, 33, weight_dtype, bias, strided=True) for bias in (False, True)]
    # Sums that are set aside between blocks of k while other tiles run.
    CASES += [case(13, 70, 300, weight_dtype, bias=True, strided=True)]
    CASES += [
        dataclasses.replace(
            case(9, 40, 301, weight_dtype),
            id=f"nonfinite-{short(weight_dtype)}",
            make=functools.partial(make_nonfinite, dtype=weight_dtype),
        )
    ]
    # Large enough for several ranges of panels and, in the last, for several blocks of tokens.
    CASES += [case(3, 1100, 576, weight_dtype), case(131, 65, 515, weight_dtype, bias=True)]
    CASES += [case(300, 40, 33, weight_dtype)]


def with_changed(name: str, change: Any) -> Any:
    def make_changed(generator: torch.Generator) -> Arguments:
        arguments = make(generator, 3, 40, 9, torch.bfloat16)
        arguments[name] = change(arguments[name])
        return arguments

    return make_changed


BAD_CASES = [
    BadCase(
        "linear", "short-workspace", with_changed("workspace", lambda w: w[1:]), r"'workspace' has 191 bytes; needs 192"
    ),
    BadCase(
        "linear", "too-few-panels", with_changed("packed", lambda p: p[1:]), r"'packed' is \[1, 10, 32\].*\[2, 10, 32\]"
    ),
    BadCase(
        "linear",
        "other-depth",
        with_changed("packed", lambda p: p[:, :8].contiguous()),
        r"'packed' is \[2, 8, 32\].*\[2, 10, 32\]",
    ),
    BadCase(
        "pack_linear",
        "other-dtype",
        lambda generator: {"packed": empty(1, 2, 32), "weight": empty(2, 2, dtype=torch.bfloat16)},
        "'packed' is float32 but 'weight' is bfloat16",
    ),
    BadCase(
        "pack_linear",
        "other-shape",
        lambda generator: {"packed": empty(1, 2, 32), "weight": empty(33, 2)},
        r"'packed' is \[1, 2, 32\]; a weight \[33, 2\] needs \[2, 2, 32\]",
    ),
]
