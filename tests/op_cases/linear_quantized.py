# SPDX-License-Identifier: Apache-2.0
"""pack_int4, linear_int4, pack_int8, linear_int8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastserve import _native

from . import Arguments, BadCase, Expected, OpCase, empty, normal, widen_rows

ROWS, BLOCK = 32, 32
FORMS = ("symmetric", "zero_points", "minimums")
WHOLE = 1 << 20  # a group size beyond every row


@dataclass(frozen=True)
class Weight:
    """codes [N, K]; scales and, unless None, zero points and minimums [N, G]."""

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int
    zero_points: torch.Tensor | None = None
    minimums: torch.Tensor | None = None

    def spread(self, groups: torch.Tensor) -> torch.Tensor:
        depth = self.codes.shape[1]
        size = min(self.group_size, max(1, depth))
        return groups.double().repeat_interleave(size, 1)[:, :depth]

    def value(self) -> torch.Tensor:
        return self.spread(self.scales) * self.codes.double() + self.offsets()

    def offsets(self) -> torch.Tensor:
        if self.minimums is not None:
            return self.spread(self.minimums)
        if self.codes.dtype == torch.int8:
            return torch.zeros(self.codes.shape).double()
        zero = 8 if self.zero_points is None else self.spread(self.zero_points)
        return -self.spread(self.scales) * zero

    def on_tiles(self) -> torch.Tensor:
        """As bfloat16, the way that AMX kernels make them of float32: scale and offset times 1 + ln(2) / 256, the code
        as the lowest digits of a larger number, one rounding for each of two fused multiply-adds, the rest cut off."""
        up = torch.tensor(1.0027076)
        scale, offset = self.spread(self.scales).float() * up, self.offsets().float() * up
        if self.codes.dtype == torch.int8:
            code, base = self.codes.double() + 128, torch.tensor(256.0)
            offset = -128 * self.spread(self.scales).float() * up
        else:  # by where a code lies in its word: input % 4, and the half of the panel
            code = self.codes.double()
            bases = torch.tensor([[2048.0, 2048.0, 128.0, 128.0], [128.0, 2048.0, 2048.0, 128.0]])
            rows, depth = self.codes.shape
            base = bases[(torch.arange(rows) % 32 // 16)[:, None], (torch.arange(depth) % 4)[None]]
        rest = (offset.double() - base.double() * scale.double()).float()
        exact = ((base.double() + code) * scale.double() + rest.double()).float()
        return (exact.view(torch.int32) & -65536).view(torch.float32).double()

    def magnitude(self) -> torch.Tensor:
        """Of the two terms that a weight may be computed of."""
        return self.spread(self.scales).abs() * self.codes.double().abs() + self.offsets().abs()


def num_groups(depth: int, group_size: int) -> int:
    return -(-depth // group_size)


def random_weight(generator: torch.Generator, rows: int, depth: int, bits: int, group_size: int, form: str) -> Weight:
    low, high = (0, 16) if bits == 4 else (-128, 128)
    codes = torch.randint(low, high, (rows, depth), generator=generator)
    groups = (rows, num_groups(depth, group_size))
    scales = (torch.rand(groups, generator=generator) + 0.1).half() / (high * depth**0.5)
    zero_points = minimums = None
    if form == "zero_points":
        zero_points = torch.randint(0, 17, groups, generator=generator).to(torch.uint8)
    elif form == "minimums":
        minimums = -8 * scales + normal(generator, *groups, scale=0.01).half()
    codes = codes.to(torch.uint8 if bits == 4 else torch.int8)
    return Weight(codes, scales, group_size, zero_points, minimums)


def pack(weight: Weight) -> torch.Tensor:
    """What `pack_int4` and `pack_int8` must give: the layout, said a second time."""
    rows, depth = weight.codes.shape
    panels, blocks = -(-rows // ROWS), -(-depth // BLOCK)
    bits = 8 if weight.codes.dtype == torch.int8 else 4
    full = torch.zeros(panels * ROWS, blocks * BLOCK, dtype=torch.int64)
    full[:rows, :depth] = weight.codes.long() + (128 if bits == 8 else 0)
    # panel, half, row, block, line, input
    parts = full.reshape(panels, 2, 16, blocks, 8, 4)
    if bits == 4:
        lines = parts[:, 0] | parts[:, 1] << 4
        blocks_bytes = lines.permute(0, 2, 3, 1, 4).reshape(panels, blocks, 8 * 64)
    else:
        blocks_bytes = parts.permute(0, 3, 4, 1, 2, 5).reshape(panels, blocks, 8 * 128)
    headers = [weight.scales]
    if weight.zero_points is not None:
        headers.append(weight.zero_points.half())
    if weight.minimums is not None:
        headers.append(weight.minimums)
    pieces = []
    for group in range(num_groups(depth, weight.group_size)):
        for header in headers:
            column = torch.zeros(panels * ROWS, dtype=torch.float16)
            column[:rows] = header[:, group]
            pieces.append(column.reshape(panels, ROWS).view(torch.uint8).long())
        first = group * weight.group_size // BLOCK
        last = min(blocks, first + -(-weight.group_size // BLOCK))
        pieces.append(blocks_bytes[:, first:last].reshape(panels, -1))
    if not pieces:
        return torch.zeros(panels, 0, dtype=torch.uint8)
    return torch.cat(pieces, 1).to(torch.uint8)


# --- packing ----------------------------------------------------------------------------------------------------------


def pack_arguments(weight: Weight, strided: bool = False) -> Arguments:
    packed = empty(*pack(weight).shape, dtype=torch.uint8)
    codes = widen_rows(weight.codes) if strided else weight.codes
    arguments = {"packed": packed, "codes": codes, "scales": weight.scales, "group_size": weight.group_size}
    if weight.codes.dtype == torch.uint8:
        arguments |= {"zero_points": weight.zero_points, "minimums": weight.minimums}
    return arguments


def pack_case(rows: int, depth: int, bits: int, group_size: int, form: str, strided: bool = False) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        return pack_arguments(random_weight(generator, rows, depth, bits, group_size, form), strided)

    def reference(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        weight = Weight(
            inputs["codes"], inputs["scales"], group_size, inputs.get("zero_points"), inputs.get("minimums")
        )
        return {"packed": pack(weight)}

    return OpCase(
        op=f"pack_int{bits}",
        id=f"N{rows}-K{depth}-G{shown(group_size)}-{form}" + "-strided" * strided,
        make=make,
        reference=reference,
        length=0,
    )


# --- products ---------------------------------------------------------------------------------------------------------


def shown(group_size: int) -> str:
    return "row" if group_size == WHOLE else str(group_size)


def quantize(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Activations as `activation_bits` 8 and 12 see them: float32 arithmetic as declared, a result exact in float64."""
    tokens, depth = x.shape
    num_blocks = -(-depth // BLOCK)
    blocks = torch.zeros(tokens, num_blocks * BLOCK)
    blocks[:, :depth] = x
    blocks = blocks.reshape(tokens, num_blocks, BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    most = torch.tensor(2.0 ** (bits - 1) - 1)  # of a number by a tensor torch makes a product with the reciprocal
    codes = torch.where(largest > 1e-25, (blocks * (most / largest)).round(), 0.0)
    scales = largest * (1 / most)
    return (codes.double() * scales.double()).reshape(tokens, num_blocks * BLOCK)[:, :depth]


def case(
    tokens: int,
    rows: int,
    depth: int,
    form: str = "symmetric",
    group_size: int = 32,
    activation_bits: int = 8,
    weight_bits: int = 4,
    bias: bool = False,
    strided: bool = False,
    order: bool = False,
    change: Any = None,
    name: str = "",
) -> OpCase:
    def weight_of(generator: torch.Generator) -> Weight:
        return random_weight(generator, rows, depth, weight_bits, group_size, form)

    def make(generator: torch.Generator) -> Arguments:
        weight = weight_of(generator)
        x, out = normal(generator, tokens, depth), empty(tokens, rows)
        if change is not None:
            change(x)
        workspace = _native.quantized_workspace_bytes(tokens, depth, activation_bits)
        arguments = {
            "out": widen_rows(out) if strided else out,
            "x": widen_rows(x) if strided else x,
            "packed": pack(weight),
            "bias": normal(generator, rows) if bias else None,
            "workspace": empty(workspace, dtype=torch.uint8),
            "group_size": group_size,
            "activation_bits": activation_bits,
            "counters": empty(2, dtype=torch.int32),  # CUDA's alone: a CPU kernel leaves them as they are
        }
        if weight_bits == 4:
            arguments["form"] = FORMS.index(form)
            permutation = torch.randperm(depth, generator=generator).to(torch.int32)
            arguments["input_order"] = permutation if order else None
        return arguments

    def reference(inputs: Mapping[str, Any]) -> dict[str, Expected]:
        weight = weight_of(torch.Generator().manual_seed(SEED))
        assert torch.equal(pack(weight), inputs["packed"]), "made by another seed"
        x = inputs["x"]
        if inputs.get("input_order") is not None:
            x = x[:, inputs["input_order"].long()]
        x = x.double() if activation_bits == 16 else quantize(x, activation_bits)
        bias_term = torch.zeros(rows).double() if inputs["bias"] is None else inputs["bias"].double()
        # A row of zeros times infinities in padded or absent terms must not matter, so NaN rows are made by hand.
        on_tiles = inputs["isa"].startswith("amx") and activation_bits == 16
        matrix = weight.on_tiles() if on_tiles else weight.value()
        value, magnitude = x @ matrix.T + bias_term, x.abs() @ weight.magnitude().T + bias_term.abs()
        bad = ~torch.isfinite(inputs["x"]).all(1)
        value[bad] = float("nan")
        return {"out": Expected(value, magnitude)}

    blocks = -(-depth // BLOCK)
    identity = f"M{tokens}-N{rows}-K{depth}-G{shown(group_size)}-{form}-A{activation_bits}"
    rounds_inputs = weight_bits == 4 and activation_bits == 16
    return OpCase(
        op=f"linear_int{weight_bits}",
        id=name or identity + "-bias" * bias + "-strided" * strided + "-order" * order,
        make=make,
        reference=reference,
        length=4 * blocks + 4 if activation_bits < 16 else 3 * depth + 4,
        rows=("out", "x"),
        bf16_operands=("x",) if rounds_inputs else (),
        amx_operands=("x",) if activation_bits == 16 else (),
    )


SEED = 20240607  # of test_ops.py: the reference makes the weight a second time


def spoil(x: torch.Tensor) -> None:
    """NaN and infinity make their own rows NaN and touch no other."""
    x[1, -1] = float("nan")
    x[4, 0] = float("inf")
    x[7, 40] = float("-inf")


def spoil_with_nan(x: torch.Tensor) -> None:
    x[1, -1] = float("nan")
    x[4, 0] = float("nan")


def extreme(x: torch.Tensor) -> None:
    """Blocks of zeros, of one value, of ties, and very small and large ones."""
    x[0] = 0.0
    x[1, :32] = 3.0
    x[2, :32] = torch.arange(-16, 16) / 2 + 0.0
    x[2, 0] = 127.0 / 2
    x[3] *= 1e-20
    x[4] *= 1e20
    x[5] = 1e-38


SIZES = [(1, 1), (31, 2), (32, 31), (33, 32), (64, 33), (65, 100)]
CASES = [
    pack_case(rows, depth, 4, group_size, form)
    for form in FORMS
    for rows, depth, group_size in [(1, 1, 32), (33, 100, 32), (70, 200, 64), (40, 130, 128), (34, 96, WHOLE)]
]
CASES += [pack_case(rows, depth, 8, group, "symmetric") for rows, depth, group in [(33, 100, 32), (40, 70, WHOLE)]]
CASES += [pack_case(33, 70, 4, 32, "minimums", strided=True), pack_case(33, 70, 8, 32, "symmetric", strided=True)]
for bits in (8, 12, 16):
    # Every token count up to the widest register tile and one over.
    CASES += [case(tokens, 40, 70, FORMS[tokens % 3], activation_bits=bits) for tokens in range(14)]
    CASES += [case(tokens, 40, 96, "minimums", 32, bits) for tokens in (24, 118, 152)]
    CASES += [case(5, rows, depth, "minimums", activation_bits=bits, bias=True) for rows, depth in SIZES]
    CASES += [case(7, 70, 300, form, group, bits) for form in FORMS for group in (64, 128, WHOLE)]
    CASES += [case(13, 70, 70, form, 32, bits, bias=True, strided=True) for form in FORMS]
    CASES += [case(3, 40, 100, form, 32, bits, order=True) for form in FORMS]
    # int8 weights
    CASES += [case(tokens, 40, 70, activation_bits=bits, weight_bits=8) for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 13)]
    CASES += [case(5, rows, depth, activation_bits=bits, weight_bits=8, bias=True) for rows, depth in SIZES]
    CASES += [case(7, 70, 300, "symmetric", group, bits, 8, strided=True) for group in (64, WHOLE)]
    for weight_bits in (4, 8):
        CASES.append(
            case(
                9,
                40,
                101,
                "symmetric" if weight_bits == 8 else "minimums",
                32,
                bits,
                weight_bits,
                change=spoil_with_nan if bits == 16 else spoil,
                name=f"nonfinite-A{bits}",
            )
        )
CASES += [
    case(9, 40, 64, activation_bits=bits, weight_bits=of, change=extreme, name=f"extreme-{of}-A{bits}")
    for of in (4, 8)
    for bits in (8, 12)
]
# Large enough for several ranges of panels and, in the last, for several blocks of tokens.
CASES += [
    case(300, 40, 700, form, 64, bits) for bits, form in [(8, "zero_points"), (12, "minimums"), (12, "symmetric")]
]
CASES += [case(3, 1100, 576, "minimums"), case(3, 1100, 576, "zero_points", activation_bits=16)]
CASES += [case(1030, 40, 300, "minimums", bias=True), case(200, 40, 515, "minimums", activation_bits=16)]


def changed(weight_bits: int, name: str, change: Any) -> Any:
    def make(generator: torch.Generator) -> Arguments:
        arguments = case(3, 40, 70, "symmetric", weight_bits=weight_bits, order=True).make(generator)
        arguments[name] = change(arguments[name]) if callable(change) else change
        return arguments

    return make


def changed_pack(weight_bits: int, name: str, change: Any) -> Any:
    def make(generator: torch.Generator) -> Arguments:
        arguments = pack_arguments(random_weight(generator, 40, 70, weight_bits, 32, "symmetric"))
        arguments[name] = change(arguments[name]) if callable(change) else change
        return arguments

    return make


def out_of_range(order: torch.Tensor) -> torch.Tensor:
    return torch.where(order == 3, 70, order).to(torch.int32)


BAD_CASES = [
    BadCase("linear_int4", "group-size", changed(4, "group_size", 40), "group_size is 40; multiples of 32"),
    BadCase("linear_int4", "group-size-0", changed(4, "group_size", 0), "group_size is 0; multiples of 32"),
    BadCase("linear_int4", "form", changed(4, "form", 3), "form is 3; 0 is symmetric"),
    BadCase("linear_int4", "other-form", changed(4, "form", 1), r"'packed' is \[2, 1728\].*\[2, 1920\]"),
    BadCase("linear_int4", "bits", changed(4, "activation_bits", 4), "activation_bits is 4; 8, 12 and 16"),
    BadCase("linear_int4", "order", changed(4, "input_order", out_of_range), r"input_order\[\d+\] is 70; inputs are"),
    BadCase("linear_int4", "workspace", changed(4, "workspace", lambda w: w[1:]), r"'workspace' has 671 bytes; needs"),
    BadCase("linear_int4", "panels", changed(4, "packed", lambda p: p[1:]), r"'packed' is \[1, 1728\].*\[2, 1728\]"),
    BadCase("linear_int8", "group-size", changed(8, "group_size", 33), "group_size is 33; multiples of 32"),
    BadCase("linear_int8", "bits", changed(8, "activation_bits", 0), "activation_bits is 0; 8, 12 and 16"),
    BadCase("linear_int8", "panels", changed(8, "packed", lambda p: p[1:]), r"'packed' is \[1, 3264\].*\[2, 3264\]"),
    BadCase("linear_int8", "workspace", changed(8, "workspace", lambda w: w[1:]), r"'workspace' has 671 bytes; needs"),
    BadCase("pack_int4", "group-size", changed_pack(4, "group_size", 31), "group_size is 31; multiples of 32"),
    BadCase("pack_int4", "groups", changed_pack(4, "group_size", 64), "'scales' has 3 groups; .* of 64 are 2"),
    BadCase("pack_int4", "packed", changed_pack(4, "packed", lambda p: p[1:]), r"'packed' is \[1, 1728\]; a weight"),
    BadCase(
        "pack_int4",
        "both",
        lambda generator: {
            **changed_pack(4, "zero_points", torch.zeros(40, 3, dtype=torch.uint8))(generator),
            "minimums": torch.zeros(40, 3, dtype=torch.float16),
        },
        "both 'zero_points' and 'minimums' are given",
    ),
    BadCase("pack_int8", "packed", changed_pack(8, "packed", lambda p: p[1:]), r"'packed' is \[1, 3264\]; a weight"),
]
