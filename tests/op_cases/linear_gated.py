# SPDX-License-Identifier: Apache-2.0
"""linear_gated, linear_int4_gated, linear_int8_gated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastserve import _native

from . import Arguments, BadCase, Expected, OpCase, empty, linear, linear_quantized, normal, widen_rows
from .linear_quantized import FORMS, SEED, WHOLE, Weight, quantize, random_weight, spoil_with_nan

TURN = 16


def gated(products: torch.Tensor, magnitude: torch.Tensor) -> Expected:
    """Of x @ weight.T with rows in turns, and the magnitudes of its terms."""
    gate, up = products.unflatten(1, (-1, 2, TURN)).unbind(2)
    gate_terms, up_terms = magnitude.unflatten(1, (-1, 2, TURN)).unbind(2)
    silu = torch.nn.functional.silu(gate)
    value = silu * up
    # The slope of silu is at most 1.1; the rest as for silu_mul.
    error = 1.1 * gate_terms * up.abs() + silu.abs() * up_terms + value.abs() * (1 + gate.abs())
    return Expected(value.flatten(1), error.flatten(1))


def case(tokens: int, width: int, depth: int, dtype: torch.dtype, strided: bool = False, nan: bool = False) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        arguments = linear.make(generator, tokens, 2 * width, depth, dtype, strided=strided)
        out = empty(tokens, width)
        if nan:
            spoil_with_nan(arguments["x"])
        return {
            "out": widen_rows(out) if strided else out,
            "x": arguments["x"],
            "packed": arguments["packed"],
            "workspace": arguments["workspace"],
        }

    def reference(inputs: Mapping[str, Any]) -> dict[str, Expected]:
        x = inputs["x"].double()
        weight = linear.unpack(inputs["packed"], 2 * width, depth).double()
        return {"out": gated(x @ weight.T, x.abs() @ weight.abs().T)}

    return OpCase(
        op="linear_gated",
        id=f"M{tokens}-I{width}-K{depth}-{linear.short(dtype)}" + "-strided" * strided + "-nan" * nan,
        make=make,
        reference=reference,
        length=2 * depth + 13,
        rows=("out", "x"),
        bf16_operands=("x",) if dtype == torch.bfloat16 else (),
    )


def quantized_case(
    tokens: int,
    width: int,
    depth: int,
    form: str = "minimums",
    group_size: int = 32,
    activation_bits: int = 16,
    weight_bits: int = 4,
    order: bool = False,
) -> OpCase:
    def weight_of(generator: torch.Generator) -> Weight:
        return random_weight(generator, 2 * width, depth, weight_bits, group_size, form)

    def make(generator: torch.Generator) -> Arguments:
        weight = weight_of(generator)
        workspace = _native.quantized_workspace_bytes(tokens, depth, activation_bits)
        arguments = {
            "out": widen_rows(empty(tokens, width)),
            "x": widen_rows(normal(generator, tokens, depth, scale=3.0)),
            "packed": linear_quantized.pack(weight),
            "workspace": empty(workspace, dtype=torch.uint8),
            "group_size": group_size,
            "activation_bits": activation_bits,
        }
        if weight_bits == 4:
            permutation = torch.randperm(depth, generator=generator).to(torch.int32)
            arguments |= {"form": FORMS.index(form), "input_order": permutation if order else None}
        return arguments

    def reference(inputs: Mapping[str, Any]) -> dict[str, Expected]:
        weight = weight_of(torch.Generator().manual_seed(SEED))
        assert torch.equal(linear_quantized.pack(weight), inputs["packed"]), "made by another seed"
        x = inputs["x"] if inputs.get("input_order") is None else inputs["x"][:, inputs["input_order"].long()]
        x = x.double() if activation_bits == 16 else quantize(x, activation_bits)
        on_tiles = inputs["isa"].startswith("amx") and activation_bits == 16
        matrix = weight.on_tiles() if on_tiles else weight.value()
        return {"out": gated(x @ matrix.T, x.abs() @ weight.magnitude().T)}

    blocks = -(-depth // linear_quantized.BLOCK)
    identity = f"M{tokens}-I{width}-K{depth}-G{linear_quantized.shown(group_size)}-{form}-A{activation_bits}"
    return OpCase(
        op=f"linear_int{weight_bits}_gated",
        id=identity + "-order" * order,
        make=make,
        reference=reference,
        length=16 + (4 * blocks if activation_bits < 16 else 3 * depth),
        rows=("out", "x"),
        bf16_operands=("x",) if weight_bits == 4 and activation_bits == 16 else (),
        amx_operands=("x",) if activation_bits == 16 else (),
    )


CASES = []
for weight_dtype in linear.WEIGHT_DTYPES:
    CASES += [case(tokens, 48, 70, weight_dtype, strided=tokens % 2 == 0) for tokens in (0, 1, 2, 5, 6, 7, 13, 33, 70)]
    CASES += [case(9, 32, 101, weight_dtype, nan=True), case(3, 512, 300, weight_dtype)]
for bits in (8, 12, 16):
    CASES += [quantized_case(tokens, 48, 70, FORMS[tokens % 3], 32, bits) for tokens in (0, 1, 2, 4, 7, 33, 70)]
    CASES += [quantized_case(3, 512, 300, "minimums", 64, bits), quantized_case(5, 16, 70, "symmetric", WHOLE, bits)]
    CASES += [quantized_case(4, 32, 70, "zero_points", 32, bits, order=True)]
    CASES += [quantized_case(tokens, 48, 70, "symmetric", 32, bits, 8) for tokens in (0, 1, 2, 4, 7, 33)]


def with_width(make: Any) -> Any:
    def changed(generator: torch.Generator) -> Arguments:
        arguments = make(generator)
        arguments["out"] = arguments["out"][:, :40]
        return arguments

    return changed


BAD_CASES = [
    BadCase(example.op, "width", with_width(example.make), r"'out' is \[M, 40\]; multiples of 16 are allowed")
    for example in (
        case(5, 48, 70, torch.bfloat16),
        quantized_case(5, 48, 70),
        quantized_case(5, 48, 70, "symmetric", weight_bits=8),
    )
]
