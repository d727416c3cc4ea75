# SPDX-License-Identifier: Apache-2.0
"""Gate and up projections as one op: the bits of `linear` and `silu_mul`, and which layers get it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastserve import _native
from fastserve.engine.device import CpuDevice
from fastserve.layers import Int4Linear, Int8Linear, Linear, can_gate, in_turns, make_int4_linear, make_linear
from fastserve.weights.int8 import round_int8
from fastserve.weights.quantized import QuantizedWeight
from fastserve.weights.round_int4 import round_int4

WIDTH, DEPTH = 48, 200
TOKENS = 70


@pytest.fixture(scope="module")
def device() -> CpuDevice:
    return CpuDevice(2)


@pytest.fixture(autouse=True)
def restore_isa() -> Iterator[None]:
    isa = _native.isa()
    yield
    _native.set_isa(isa)


def layer(device: CpuDevice, kind: str, activation_bits: int, is_gated: bool) -> Linear:
    """[gate | up] of random weights; the same rows as gated layers have them if it is not one."""
    weight = torch.randn(2 * WIDTH, DEPTH, generator=torch.Generator().manual_seed(1)) / 4
    order = torch.arange(2 * WIDTH) if is_gated else in_turns(2 * WIDTH)
    if kind == "int8":
        return Int8Linear(device, round_int8(weight).rows(order), None, activation_bits, is_gated)
    if kind in ("symmetric", "minimums"):
        return Int4Linear(device, round_int4(weight, 32, kind).rows(order), None, activation_bits, is_gated)
    return make_linear(device, weight[order].to(getattr(torch, kind)), None, is_gated)


def apply(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    out = torch.full((x.shape[0], linear.out_features), torch.nan)
    linear(out, x, torch.empty(linear.workspace_bytes(x.shape[0]), dtype=torch.uint8))
    return out


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "symmetric", "minimums", "int8"])
def test_bits_are_those_of_the_product_and_its_gate(
    device: CpuDevice, isa: str, kind: str, activation_bits: int
) -> None:
    if "float" in kind and activation_bits == 8:
        pytest.skip("not rounded")
    _native.set_isa(isa)
    x = torch.randn(TOKENS, DEPTH, generator=torch.Generator().manual_seed(2))
    x[3] *= 1e3  # gates far from zero
    x[4] *= 1e-30
    products = apply(layer(device, kind, activation_bits, False), x)
    expected = torch.empty(TOKENS, WIDTH)
    _native.ops.silu_mul(expected, products[:, in_turns(2 * WIDTH).argsort()])
    gated = layer(device, kind, activation_bits, True)
    assert (gated.out_features, gated.in_features) == (WIDTH, DEPTH)
    assert torch.equal(apply(gated, x), expected)
    assert torch.equal(torch.cat([apply(gated, part) for part in x.split([1, 2, 5, 17, 45])]), expected)


def test_other_layers_stay_apart(device: CpuDevice) -> None:
    assert can_gate(device, WIDTH, False)
    assert not can_gate(device, WIDTH + 8, False)
    assert not can_gate(device, WIDTH, True)
    parts = [round_int4(torch.randn(WIDTH, 64), 32, form) for form in ("symmetric", "minimums")]
    assert not make_int4_linear(device, parts, [], 16, "gate_up", is_gated=True).is_gated
    assert make_int4_linear(device, [parts[0]] * 2, [], 16, "gate_up", is_gated=True).is_gated


def test_rows_keep_what_belongs_to_them() -> None:
    weight = QuantizedWeight(
        torch.arange(12, dtype=torch.uint8).view(3, 4),
        torch.arange(3).half()[:, None],
        32,
        torch.arange(3).short()[:, None],
        None,
        torch.tensor([3, 1, 0, 2], dtype=torch.int32),
    )
    order = torch.tensor([2, 0])
    assert torch.equal(weight.rows(order).dequantize(), weight.dequantize()[order])
