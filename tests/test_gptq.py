# SPDX-License-Identifier: Apache-2.0
"""GPTQ on one weight: coordinate descent after it only ever brings the outputs closer."""

from __future__ import annotations

import pytest
import torch

from fastserve.weights import gptq
from fastserve.weights.quantized import QuantizedWeight
from fastserve.weights.round_int4 import FORMS, round_int4


def output_error(rounded: QuantizedWeight, weight: torch.Tensor, x: torch.Tensor) -> float:
    difference = (rounded.dequantize() - weight).double() @ x.double().T
    return float(difference.square().sum())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group_size", [32, 1 << 20])
def test_coordinate_descent_brings_outputs_closer(form: str, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn((48, 160), generator=draw)
    x = torch.randn((600, 40), generator=draw) @ torch.randn((40, 160), generator=draw)  # correlated inputs
    x += 0.3 * torch.randn(x.shape, generator=draw)
    errors = {"rtn": output_error(round_int4(weight, group_size, form), weight, x)}
    for sweeps in (0, 1, 4):
        monkeypatch.setattr(gptq, "SWEEPS", sweeps)
        rounded = gptq.round_gptq(weight, x.T @ x, group_size, form)
        rounded.check("weight")
        errors[str(sweeps)] = output_error(rounded, weight, x)
    assert errors["0"] < errors["rtn"], errors
    assert errors["1"] < 0.97 * errors["0"], errors
    assert errors["4"] < errors["1"], errors


def test_a_weight_makes_up_for_inputs_that_have_drifted() -> None:
    draw = torch.Generator().manual_seed(5)
    weight, mixed = torch.randn((48, 96), generator=draw), torch.randn((40, 96), generator=draw)
    exact = torch.randn((800, 40), generator=draw) @ mixed + 0.3 * torch.randn((800, 96), generator=draw)
    x = exact + 0.5 * torch.randn((800, 96), generator=draw) + 0.2 * exact.roll(1, 1)
    wanted = exact @ weight.T
    hessian, drift = x.T @ x, (exact - x).T @ x
    errors = []
    for known in (None, drift):
        rounded = gptq.round_gptq(weight, hessian, 32, "symmetric", known)
        errors.append(float((x @ rounded.dequantize().T - wanted).square().sum()))
    least = float((x @ torch.linalg.lstsq(x, wanted).solution - wanted).square().sum())
    assert errors[1] - least < 0.1 * (errors[0] - least), (errors, least)


def test_no_drift_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(6)
    weight, x = torch.randn((16, 64), generator=draw), torch.randn((200, 64), generator=draw)
    plain = gptq.round_gptq(weight, x.T @ x, 32, "symmetric")
    still = gptq.round_gptq(weight, x.T @ x, 32, "symmetric", torch.zeros(64, 64))
    assert torch.equal(plain.codes, still.codes)
    assert torch.equal(plain.scales, still.scales)


def test_inputs_and_rows_that_are_all_zero_do_no_harm() -> None:
    draw = torch.Generator().manual_seed(4)
    weight, x = torch.randn((8, 64), generator=draw), torch.randn((100, 64), generator=draw)
    x[:, 5] = 0
    weight[2] = 0  # its scales are 0
    rounded = gptq.round_gptq(weight, x.T @ x, 32, "symmetric")
    rounded.check("weight")
    assert torch.equal(rounded.dequantize()[2], torch.zeros(64))
