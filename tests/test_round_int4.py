# SPDX-License-Identifier: Apache-2.0
"""Rounding to int4, by itself and with GPTQ, against what must hold of any good rounding."""

from __future__ import annotations

import pytest
import torch

from fastserve.errors import FastserveError
from fastserve.weights import gptq
from fastserve.weights.gptq import round_gptq
from fastserve.weights.quantized import QuantizedWeight
from fastserve.weights.round_int4 import FORMS, round_int4


def weights(num_rows: int, depth: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers with some outliers, as in a language model."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((num_rows, depth), generator=generator) * 0.02
    outliers = torch.rand((num_rows, depth), generator=generator) < 0.01
    return torch.where(outliers, weight * 4, weight)


def plain(weight: torch.Tensor, group_size: int, form: str) -> torch.Tensor:
    """Round to nearest on the grid that just holds all weights of a group: no search."""
    rounded = torch.empty_like(weight)
    for begin in range(0, weight.shape[1], group_size):
        group = weight[:, begin : begin + group_size]
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        if form == "symmetric":
            scale = torch.maximum(low.abs(), high.abs()) / 7
            low = -8 * scale
        else:
            low, high = (low, high) if form == "minimums" else (low.clamp(max=0), high.clamp(min=0))
            scale = (high - low) / 15
            if form == "zero-points":
                low = (low / scale).round() * scale
        rounded[:, begin : begin + group_size] = ((group - low) / scale).round().clamp(0, 15) * scale + low
    return rounded


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("depth", "group_size"), [(256, 32), (256, 128), (96, 64), (100, 2**20)])
def test_searched_grids_err_less_than_plain_rounding_in_every_group(form: str, depth: int, group_size: int) -> None:
    weight = weights(48, depth)
    quantized = round_int4(weight, group_size, form)
    quantized.check("w")
    searched = (quantized.dequantize() - weight).square()
    unsearched = (plain(weight, group_size, form) - weight).square()
    assert searched.sum() < 0.97 * unsearched.sum()
    per_row = searched.sum(1) / unsearched.sum(1)
    assert per_row.max() < 1.05


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_lie_on_a_grid_come_back_exactly(form: str) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (32, 128), generator=generator, dtype=torch.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 15  # the whole range is in use
    scales = (torch.rand((32, 4), generator=generator) * 0.1 + 0.01).half()
    given = {
        "symmetric": QuantizedWeight(codes, scales, 32),
        "zero-points": QuantizedWeight(codes, scales, 32, torch.full((32, 4), 5, dtype=torch.int16)),
        "minimums": QuantizedWeight(codes, scales, 32, minimums=(-scales * 3).half()),
    }[form]
    weight = given.dequantize()
    assert (round_int4(weight, 32, form).dequantize() - weight).abs().max() < 2e-3 * weight.abs().max()


def test_a_grid_of_which_some_values_are_unused_is_found_again() -> None:
    """As after dequantising Q4_1: many blocks do not use all 16 codes."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 13, (64, 64), generator=generator, dtype=torch.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 12
    scales = (torch.rand((64, 2), generator=generator) * 0.1 + 0.01).half()
    weight = QuantizedWeight(codes, scales, 32, minimums=(-scales * 4).half()).dequantize()
    again = round_int4(weight, 32, "minimums")
    assert (again.dequantize() - weight).abs().max() < 2e-3 * weight.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_awkward_weights_stay_finite(form: str) -> None:
    weight = torch.zeros((4, 64))
    weight[1] = 1e-7  # below the smallest float16
    weight[2] = 6e4
    weight[3, 5] = -3.0
    rounded = round_int4(weight, 32, form)
    rounded.check("w")
    assert torch.isfinite(rounded.dequantize()).all()
    assert rounded.dequantize()[0].abs().max() == 0
    assert abs(float(rounded.dequantize()[3, 5]) + 3) < 0.2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("depth", "group_size"), [(256, 32), (192, 64), (160, 2**20)])
def test_gptq_changes_the_outputs_less_than_rounding(form: str, depth: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = weights(64, depth, seed=4)
    # Correlated inputs of different sizes, as behind a norm.
    mixing = torch.randn((depth // 4, depth), generator=generator) + 0.0
    x = torch.randn((2048, depth // 4), generator=generator) @ mixing
    x = x * torch.rand(depth, generator=generator) + 0.1 * torch.randn((2048, depth), generator=generator)
    exact = x.double() @ weight.double().T

    def error(quantized: QuantizedWeight) -> float:
        quantized.check("w")
        return float((x.double() @ quantized.dequantize().double().T - exact).square().mean())

    by_gptq = error(round_gptq(weight, x.T @ x, group_size, form))
    assert by_gptq < 0.5 * error(round_int4(weight, group_size, form))


def test_gptq_of_uncorrelated_inputs_is_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(16, 64)
    rounded = round_int4(weight, 32, "symmetric").dequantize()
    descended = round_gptq(weight, torch.eye(64), 32, "symmetric").dequantize()
    assert (descended - weight).square().sum() <= (rounded - weight).square().sum()
    monkeypatch.setattr(gptq, "SWEEPS", 0)  # before coordinate descent
    assert torch.equal(round_gptq(weight, torch.eye(64), 32, "symmetric").dequantize(), rounded)


def test_gptq_takes_inputs_that_are_always_zero() -> None:
    x = torch.randn((512, 64), generator=torch.Generator().manual_seed(5))
    x[:, 10:20] = 0
    quantized = round_gptq(weights(16, 64), x.T @ x, 32, "symmetric")
    assert torch.isfinite(quantized.dequantize()).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_gptq_refuses_activations_without_information(value: float) -> None:
    with pytest.raises(FastserveError, match="calibration text"):
        round_gptq(weights(16, 64), torch.full((64, 64), value), 32, "symmetric")
