# SPDX-License-Identifier: Apache-2.0
"""Cases of `pack_int8` and `linear_int8` with the CUDA layout (csrc/layout/int8_fragment.h), and that layout written a
second time, in torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from cuda_device import linear_counters, num_multiprocessors

from fastserve import _native
from op_cases import Arguments, Expected, OpCase, empty, normal, widen_rows

FORMATS = (torch.float16, torch.bfloat16)
STAGE_BYTES, CODE_BYTES = 2048 + 128, 2048


def random_weight(generator: torch.Generator, rows: int, depth: int, group_size: int) -> Arguments:
    codes = torch.randint(-128, 128, (rows, depth), generator=generator, dtype=torch.int8)
    scales = (torch.rand(rows, -(-depth // group_size), generator=generator) + 0.2) * depth**-0.5 / 74
    return {"codes": codes, "scales": scales.half()}


def pack(codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    rows, depth = codes.shape
    panels, stages = -(-rows // 32), -(-depth // 64)
    full = torch.full((panels * 32, stages * 64), 128, dtype=torch.int64)
    full[:rows, :depth] = codes.long() + 128
    # panel, block, g | stage, step, half, t, low
    axes = full.reshape(panels, 4, 8, stages, 4, 2, 4, 2)
    code_bytes = axes.permute(0, 3, 4, 2, 6, 1, 7, 5).reshape(panels, stages, CODE_BYTES).to(torch.uint8)
    spread = torch.zeros(panels * 32, stages * 2, dtype=torch.float16)
    begin = torch.arange(stages * 2) * 32
    spread[:rows, begin < depth] = scales[:, begin[begin < depth] // group_size]
    # panel, block, t, low | stage, group
    by_lane = spread.reshape(panels, 4, 4, 2, stages, 2).permute(0, 4, 5, 2, 1, 3).contiguous()
    scale_bytes = by_lane.view(torch.uint8).reshape(panels, stages, STAGE_BYTES - CODE_BYTES)
    return torch.cat([code_bytes, scale_bytes], dim=2).reshape(panels, -1)


def unpack(packed: torch.Tensor, rows: int, depth: int) -> torch.Tensor:
    """The weight [rows, depth], float64."""
    panels, stages = packed.shape[0], packed.shape[1] // STAGE_BYTES
    by_stage = packed.reshape(panels, stages, STAGE_BYTES)
    axes = by_stage[..., :CODE_BYTES].long().reshape(panels, stages, 4, 8, 4, 4, 2, 2)  # step, g, t, block, low, half
    codes = axes.permute(0, 5, 3, 1, 2, 7, 4, 6).reshape(panels * 32, stages * 64) - 128
    values = by_stage[..., CODE_BYTES:].contiguous().view(torch.float16).reshape(panels, stages, 2, 4, 4, 2)
    scales = values.permute(0, 4, 3, 5, 1, 2).reshape(panels * 32, stages * 2).double()
    return (codes * scales.repeat_interleave(32, dim=1))[:rows, :depth]


def pack_case(rows: int, depth: int, group_size: int, strided: bool = False) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        weight = random_weight(generator, rows, depth, group_size)
        shape = _native.cuda_packed_int8_shape(rows, depth, group_size)
        codes = widen_rows(weight["codes"]) if strided else weight["codes"]
        return {**weight, "packed": empty(*shape, dtype=torch.uint8), "codes": codes, "group_size": group_size}

    def reference(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"packed": pack(inputs["codes"], inputs["scales"], inputs["group_size"])}

    label = f"fragments-N{rows}-K{depth}-G{group_size}" + "-strided" * strided
    return OpCase("pack_int8", label, make, reference, length=0)


def linear_reference(inputs: Mapping[str, Any]) -> dict[str, Expected]:
    x, rows = inputs["x"].double(), inputs["out"].shape[1]
    weight = unpack(inputs["packed"], rows, x.shape[1])
    bias = torch.zeros(rows).double() if inputs["bias"] is None else inputs["bias"].double()
    return {"out": Expected(x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs())}


def linear_case(
    tokens: int,
    rows: int,
    depth: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    strided: bool = False,
    bits: int = 16,
) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        x, out = normal(generator, tokens, depth).to(dtype), empty(tokens, rows, dtype=dtype)
        weight = random_weight(generator, rows, depth, group_size)
        return {
            "out": widen_rows(out, extra=8) if strided else out,
            "x": widen_rows(x, extra=8) if strided else x,
            "packed": pack(weight["codes"], weight["scales"], group_size),
            "bias": normal(generator, rows) if bias else None,
            "workspace": empty(_native.cuda_linear_workspace_bytes(tokens, num_multiprocessors()), dtype=torch.uint8),
            "group_size": group_size,
            "activation_bits": bits,
            "counters": linear_counters(),
        }

    parts = [f"fragments-M{tokens}-N{rows}-K{depth}-G{group_size}", str(dtype).removeprefix("torch.")]
    parts += ["bias"] * bias + ["strided"] * strided + [f"A{bits}"] * (bits != 16)
    return OpCase("linear_int8", "-".join(parts), make, linear_reference, length=depth + 1, rows=("out", "x"))


INT8_CASES = [
    pack_case(rows, depth, group)
    for rows, depth, group in ((64, 128, 32), (33, 72, 64), (1, 8, 8), (40, 200, 96), (32, 320, 320))
] + [pack_case(33, 96, 32, strided=True)]
for _dtype in FORMATS:
    # Every number of rows at which another tile begins or ends; three parts per column tile; half a stage at K's end.
    INT8_CASES += [linear_case(tokens, 96, 736, 32, _dtype) for tokens in (0, 1, 8, 16, 17, 32, 33, 48, 49, 97, 130)]
    INT8_CASES += [
        linear_case(3, 31, 16, 16, _dtype, bias=True),  # less than anything; no stores in pairs
        linear_case(5, 130, 336, 64, _dtype, bias=True, strided=True),
        linear_case(9, 160, 200, 96, _dtype, bits=8),
        linear_case(20, 672, 640, 640, _dtype),  # stripes that begin and end inside column tiles
    ]
