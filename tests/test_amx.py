# SPDX-License-Identifier: Apache-2.0
"""On AMX's tile registers: the bits that Intel documents, from the processor and from the emulation alike, and
from vector registers where there are few tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastserve import _native
from op_cases.attention import Shape, arguments_for
from op_cases.linear_quantized import FORMS, pack, random_weight
from op_checks import run_guarded

AMX = [isa for isa in _native.isas() if isa.startswith("amx")]


@pytest.fixture(autouse=True)
def restore_isa() -> Iterator[None]:
    isa = _native.isa()
    yield
    _native.set_isa(isa)


def documented(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x @ weight.T as TDPBF16PS sums it: 32 k at a time, even and odd ones apart, then their sum to the total.

    A product of two bfloat16 is exact in float32, so that adding it rounds as a fused multiply-add does."""
    total = np.zeros((len(x), len(weight)), np.float32)
    for begin in range(0, x.shape[1], 32):
        even, odd = np.zeros_like(total), np.zeros_like(total)
        for k in range(begin, min(begin + 32, x.shape[1])):
            product = np.multiply.outer(x[:, k], weight[:, k])
            if k % 2 == 0:
                even = even + product
            else:
                odd = odd + product
        total = total + (even + odd)
    return total


on_amx = pytest.mark.skipif(not AMX, reason="neither AMX nor its emulation is in this build and machine")


@on_amx
@pytest.mark.parametrize("isa", AMX)
@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "depth"),
    [(1, 32, 32), (16, 64, 576), (17, 40, 33), (33, 96, 70), (71, 33, 1), (70, 64, 600), (545, 33, 300)],
)
def test_linear_sums_as_documented(isa: str, num_tokens: int, num_rows: int, depth: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, depth, generator=generator).bfloat16()
    weight = torch.randn(num_rows, depth, generator=generator).bfloat16()
    packed = torch.empty(_native.packed_linear_shape(num_rows, depth), dtype=torch.bfloat16)
    _native.ops.pack_linear(packed, weight)
    out = torch.empty(num_tokens, num_rows)
    num_bytes = _native.linear_workspace_bytes(num_tokens, depth, "bfloat16")
    _native.set_isa(isa)
    _native.ops.linear(out, x.float(), packed, None, torch.empty(num_bytes, dtype=torch.uint8))
    assert np.array_equal(out.numpy(), documented(x.float().numpy(), weight.float().numpy()))


def hostile_inputs(depth: int) -> torch.Tensor:
    """Rows of ordinary numbers, of subnormals (as bfloat16, and as products), of huge ones, with infinities and NaN."""
    generator = torch.Generator().manual_seed(depth)
    x = torch.randn(13, depth, generator=generator)
    x[1] *= 1e-39
    x[2] *= 1e-37
    x[3] *= 2.0 ** -torch.randint(100, 140, (depth,), generator=generator).float()
    x[4] *= 1e38
    x[5, ::7] *= 1e-40
    x[6] = -0.0
    x[7, 3], x[8, 0], x[8, 31], x[9, 5] = torch.inf, -torch.inf, torch.inf, torch.nan
    x[10] = x[10].abs() * 3e38 / depth  # finite until added up
    return x


@on_amx
@pytest.mark.parametrize("isa", AMX)
@pytest.mark.parametrize("form", ["symmetric", "zero_points", "minimums", "int8"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_one_token_gets_the_bits_of_tiles(isa: str, form: str, group_size: int) -> None:
    rows, depth = 70, 200
    bits = 8 if form == "int8" else 4
    generator = torch.Generator().manual_seed(bits)
    weight = random_weight(generator, rows, depth, bits, group_size, form)
    weight.scales[:, 1] *= 2.0**-12  # some are subnormal in float16
    weight.scales[3] = 0.0
    packed, bias = pack(weight), torch.randn(rows, generator=generator) * 2.0**-140
    x = hostile_inputs(depth)
    _native.set_isa(isa)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(x), rows)
        workspace = torch.empty(_native.quantized_workspace_bytes(len(x), depth, 16), dtype=torch.uint8)
        if bits == 8:
            _native.ops.linear_int8(out, x, packed, bias, workspace, group_size, 16)
        else:
            _native.ops.linear_int4(out, x, packed, bias, None, workspace, group_size, FORMS.index(form), 16)
        return out

    on_tiles = multiply(x)
    assert torch.isfinite(on_tiles[:4]).all()
    assert torch.isnan(on_tiles[9]).all()
    for size in (1, 2):
        alone = torch.cat([multiply(part) for part in x.split(size)])
        numbers = ~torch.isnan(on_tiles)
        assert torch.equal(torch.isnan(alone), ~numbers)
        assert torch.equal(alone.view(torch.int32)[numbers], on_tiles.view(torch.int32)[numbers])


@pytest.mark.skipif(len(AMX) < 2, reason="not both of AMX and its emulation are in this build and machine")
@pytest.mark.parametrize(
    "shape",
    [
        Shape(heads=9, kv_heads=3, span=256, dtype=torch.bfloat16),
        Shape(heads=2, kv_heads=2, dim=96, block_size=16, span=64, window=100, dtype=torch.bfloat16),
        Shape(heads=4, kv_heads=1, dim=32, block_size=48, span=384, dtype=torch.bfloat16),
    ],
    ids=lambda shape: f"D{shape.dim}-S{shape.block_size}-window{shape.window}",
)
def test_attention_has_the_bits_of_its_emulation(shape: Shape) -> None:
    """Chunks and decodes, with weights down to the smallest and a query that is no number."""
    arguments = arguments_for(torch.Generator().manual_seed(1), [1, 50, 1, 20], [300, 410, 33, 20], shape)
    arguments["q"] = arguments["q"].clone()
    arguments["q"][30] *= 100
    arguments["q"][60, 0, 3] = float("nan")
    outs = []
    for isa in AMX:
        _native.set_isa(isa)
        outs.append(run_guarded("attention", arguments)["out"])
    assert outs[0].isfinite().any()
    same = outs[0].view(torch.int32) == outs[1].view(torch.int32)
    assert (same | (outs[0].isnan() & outs[1].isnan())).all()


@on_amx
@pytest.mark.parametrize("isa", AMX)
@pytest.mark.parametrize("form", ["symmetric", "zero_points", "minimums", "int8", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_among_many_have_the_bits_of_few(isa: str, form: str, threads: int) -> None:
    """More tokens than a block of them, more inputs than a chunk of weights: sums are put aside and taken up again."""
    rows, depth, group_size = 70, 620, 64
    generator = torch.Generator().manual_seed(1)
    if form == "bfloat16":
        packed = torch.empty(_native.packed_linear_shape(rows, depth), dtype=torch.bfloat16)
        _native.ops.pack_linear(packed, torch.randn(rows, depth, generator=generator).bfloat16())
    else:
        packed = pack(random_weight(generator, rows, depth, 8 if form == "int8" else 4, group_size, form))
    _native.set_isa(isa)
    before = _native.num_threads()

    def multiply(x: torch.Tensor) -> torch.Tensor:
        out = torch.full((len(x), rows + 9), torch.nan)[:, :rows]
        workspace = torch.empty(_native.quantized_workspace_bytes(len(x), depth, 16), dtype=torch.uint8)
        if form == "bfloat16":
            _native.ops.linear(out, x, packed, None, workspace)
        elif form == "int8":
            _native.ops.linear_int8(out, x, packed, None, workspace, group_size, 16)
        else:
            _native.ops.linear_int4(out, x, packed, None, None, workspace, group_size, FORMS.index(form), 16)
        return out

    x = torch.randn(600, depth, generator=generator)
    few = torch.cat([multiply(part) for part in x.split([1, 2, 13, 17, 64, 103, 400])])
    _native.set_num_threads(threads)
    try:
        assert torch.equal(multiply(x), few)
        assert torch.equal(multiply(x[5:38]), few[5:38])
    finally:
        _native.set_num_threads(before)
