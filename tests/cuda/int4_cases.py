# SPDX-License-Identifier: Apache-2.0
"""Cases of `pack_int4` and `linear_int4` with the CUDA layout (csrc/layout/int4_fragment.h), and that layout written a
second time, in torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cuda_device import linear_counters, num_multiprocessors

from fastserve import _native
from op_cases import Arguments, Expected, OpCase, empty, normal, widen_rows

SYMMETRIC, ZERO_POINTS, MINIMUMS = range(3)
FORM_NAMES = ("symmetric", "zeros", "minimums")
FORMATS = (torch.float16, torch.bfloat16)
NIBBLES = 16 ** torch.arange(8)


@dataclass(frozen=True)
class Int4Weight:
    """A weight in groups, as `pack_int4` takes it."""

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    minimums: torch.Tensor | None
    group_size: int

    @staticmethod
    def random(generator: torch.Generator, rows: int, depth: int, group_size: int, form: int) -> Int4Weight:
        groups = -(-depth // group_size)

        def codes(limit: int, *shape: int) -> torch.Tensor:
            return torch.randint(0, limit, shape, generator=generator, dtype=torch.uint8)

        scales = (torch.rand(rows, groups, generator=generator) + 0.2) * depth**-0.5 / 5
        return Int4Weight(
            codes(16, rows, depth),
            scales.half(),
            codes(17, rows, groups) if form == ZERO_POINTS else None,
            (normal(generator, rows, groups, scale=depth**-0.5)).half() if form == MINIMUMS else None,
            group_size,
        )

    @property
    def form(self) -> int:
        return ZERO_POINTS if self.zero_points is not None else MINIMUMS if self.minimums is not None else SYMMETRIC

    def pack(self) -> torch.Tensor:
        (rows, depth), stored = self.codes.shape, stored_group(self.group_size, self.codes.shape[1])
        panels, padded = -(-rows // 32), -(-depth // 64) * 64
        full = torch.full((panels * 32, padded), 8, dtype=torch.int64)
        full[:, depth:] = full[rows:, :] = 8
        full[:rows, :depth] = self.codes.long()
        # panel, block, high, g | k / 32, step, half, t, low
        axes = full.reshape(panels, 2, 2, 8, padded // 32, 2, 2, 4, 2)
        nibbles = axes.permute(0, 4, 3, 7, 5, 1, 8, 6, 2).reshape(panels, -1, 8)
        words = (nibbles * NIBBLES).sum(-1)
        parts = [words.to(torch.int64).unsqueeze(-1).bitwise_right_shift(torch.arange(0, 32, 8)).bitwise_and(255)]
        parts = [parts[0].to(torch.uint8).reshape(panels, -1)]
        for values in (self.scales, self.zero_points, self.minimums):
            if values is not None:
                groups = 1 if stored == 0 else -(-depth // 128) * 128 // stored
                spread = torch.zeros(panels * 32, groups, dtype=values.dtype)
                begin = torch.arange(groups) * stored
                spread[:rows, begin < depth] = values[:, begin[begin < depth] // self.group_size]
                by_row = spread.reshape(panels, 2, 2, 8, groups).permute(0, 4, 3, 1, 2).contiguous()
                parts.append(by_row.view(torch.uint8).reshape(panels, -1))
        return torch.cat(parts, dim=1)


def stored_group(group_size: int, depth: int) -> int:
    if group_size >= depth:
        return 0
    return next(size for size in (128, 64, 32) if group_size % size == 0)


def unpack(packed: torch.Tensor, rows: int, depth: int, group_size: int, form: int) -> tuple[torch.Tensor, ...]:
    """Codes, scales, zero points or minimums of every weight [rows, depth], float64."""
    panels, padded, stored = packed.shape[0], -(-depth // 64) * 64, stored_group(group_size, depth)
    code_bytes = padded * 16
    shifts = torch.tensor([0, 4])
    nibbles = packed[:, :code_bytes].long().unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(15)
    axes = nibbles.reshape(panels, padded // 32, 8, 4, 2, 2, 2, 2, 2)  # k / 32, g, t, step, block, low, half, high
    codes = axes.permute(0, 5, 8, 2, 1, 4, 7, 3, 6).reshape(panels * 32, padded)
    groups = 1 if stored == 0 else -(-depth // 128) * 128 // stored

    def spread(values: torch.Tensor) -> torch.Tensor:
        by_row = values.reshape(panels, groups, 8, 2, 2).permute(0, 3, 4, 2, 1).reshape(panels * 32, groups)
        return by_row.double().repeat_interleave(stored or padded, dim=1)[:rows, :depth]

    scales = packed[:, code_bytes : code_bytes + groups * 64].contiguous().view(torch.float16)
    rest = packed[:, code_bytes + groups * 64 :].contiguous()
    offsets = {SYMMETRIC: [], ZERO_POINTS: [rest], MINIMUMS: [rest.view(torch.float16)] if form == MINIMUMS else []}
    return codes[:rows, :depth].double(), spread(scales), *(spread(values) for values in offsets[form])


def pack_case(rows: int, depth: int, group_size: int, form: int, strided: bool = False) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        weight = Int4Weight.random(generator, rows, depth, group_size, form)
        return {
            "packed": empty(*_native.cuda_packed_int4_shape(rows, depth, group_size, form), dtype=torch.uint8),
            "codes": widen_rows(weight.codes) if strided else weight.codes,
            "scales": weight.scales,
            "zero_points": weight.zero_points,
            "minimums": weight.minimums,
            "group_size": group_size,
        }

    def reference(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        names = ("codes", "scales", "zero_points", "minimums", "group_size")
        return {"packed": Int4Weight(*(inputs[name] for name in names)).pack()}

    label = f"fragments-N{rows}-K{depth}-G{group_size}-{FORM_NAMES[form]}" + "-strided" * strided
    return OpCase("pack_int4", label, make, reference, length=0)


def linear_reference(inputs: Mapping[str, Any]) -> dict[str, Expected]:
    x, rows, form = inputs["x"].double(), inputs["out"].shape[1], inputs["form"]
    codes, scales, *offsets = unpack(inputs["packed"], rows, x.shape[1], inputs["group_size"], form)
    if form == MINIMUMS:
        weight, size = scales * codes + offsets[0], scales.abs() * codes + offsets[0].abs()
    else:
        weight = scales * (codes - (offsets[0] if offsets else 8))
        size = weight.abs()
    if inputs["input_order"] is not None:
        x = x[:, inputs["input_order"].long()]
    bias = torch.zeros(rows).double() if inputs["bias"] is None else inputs["bias"].double()
    return {"out": Expected(x @ weight.T + bias, x.abs() @ size.T + bias.abs())}


def linear_case(
    tokens: int,
    rows: int,
    depth: int,
    group_size: int,
    form: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    strided: bool = False,
    ordered: bool = False,
) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        x, out = normal(generator, tokens, depth).to(dtype), empty(tokens, rows, dtype=dtype)
        order = torch.randperm(depth, generator=generator).int() if ordered else None
        workspace = _native.cuda_int4_workspace_bytes(tokens, depth, num_multiprocessors(), ordered)
        return {
            "out": widen_rows(out, extra=8) if strided else out,
            "x": widen_rows(x, extra=8) if strided else x,
            "packed": Int4Weight.random(generator, rows, depth, group_size, form).pack(),
            "bias": normal(generator, rows) if bias else None,
            "input_order": order,
            "workspace": empty(workspace, dtype=torch.uint8),
            "group_size": group_size,
            "form": form,
            "activation_bits": 16,
            "counters": linear_counters(),
        }

    parts = [f"fragments-M{tokens}-N{rows}-K{depth}-G{group_size}-{FORM_NAMES[form]}"]
    parts += [str(dtype).removeprefix("torch.")] + ["bias"] * bias + ["strided"] * strided + ["ordered"] * ordered
    return OpCase("linear_int4", "-".join(parts), make, linear_reference, length=depth + 1, rows=("out", "x"))


PACK_CASES = [
    pack_case(rows, depth, group, form)
    for form in range(3)
    for rows, depth, group in ((64, 128, 32), (33, 72, 64), (1, 8, 8), (96, 320, 128), (40, 200, 96), (32, 512, 512))
] + [pack_case(33, 96, 32, ZERO_POINTS, strided=True), pack_case(64, 768, 256, MINIMUMS)]

INT4_CASES = list(PACK_CASES)
for _dtype in FORMATS:
    # Every number of rows at which another tile begins or ends; three parts per column tile; an odd number of panels.
    INT4_CASES += [
        linear_case(tokens, 96, 832, 128, SYMMETRIC, _dtype)
        for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 118, 128, 152)
    ]
    # Whole units of K and no zero points: a loop of its own in groups of 128.
    INT4_CASES += [linear_case(tokens, 96, 768, 128, SYMMETRIC, _dtype) for tokens in (5, 16, 24, 40, 60)]
    # Every form and group size, with a column tile and a half and the half of a stage at the end of K.
    INT4_CASES += [
        linear_case(tokens, 192, 448, group, form, _dtype, bias=True)
        for form in range(3)
        for group in (32, 64, 96, 128, 256, 448)
        for tokens in (5, 16, 33)
    ]
    INT4_CASES += [
        linear_case(3, 31, 16, 16, MINIMUMS, _dtype, bias=True),  # less than anything
        linear_case(9, 100, 136, 32, ZERO_POINTS, _dtype, strided=True),
        linear_case(20, 672, 640, 128, ZERO_POINTS, _dtype),  # stripes that begin and end inside column tiles
        linear_case(64, 672, 640, 64, SYMMETRIC, _dtype, strided=True),
        linear_case(7, 64, 260, 128, ZERO_POINTS, _dtype, ordered=True),
        linear_case(70, 64, 256, 128, SYMMETRIC, _dtype, ordered=True, bias=True),
        linear_case(1024, 128, 256, 128, SYMMETRIC, _dtype),
    ]
