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


def test_inputs_and_rows_that_are_all_zero_do_no_harm() -> None:
    draw = torch.Generator().manual_seed(4)
    weight, x = torch.randn((8, 64), generator=draw), torch.randn((100, 64), generator=draw)
    x[:, 5] = 0
    weight[2] = 0  # its scales are 0
    rounded = gptq.round_gptq(weight, x.T @ x, 32, "symmetric")
    rounded.check("weight")
    assert torch.equal(rounded.dequantize()[2], torch.zeros(64))
