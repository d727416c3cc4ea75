# SPDX-License-Identifier: Apache-2.0
"""The engine's int4 layer on its CUDA device, with the simulated GPU under it: packed there, multiplied in the shared
workspace, recorded in a graph and replayed."""

from __future__ import annotations

import pytest
import torch
from cuda_device import load_simulated
from simulated_engine_device import SimulatedCudaDevice

from fastserve.layers import Int4Linear
from fastserve.weights.quantized import QuantizedWeight

MODULE = load_simulated()
pytestmark = pytest.mark.skipif(MODULE is None, reason="there is no build/sim (see tests/cuda/CMakeLists.txt)")


def random_weight(rows: int, depth: int, group_size: int, form: str, ordered: bool = False) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(rows + depth)
    groups = -(-depth // group_size)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    return QuantizedWeight(
        (random(rows, depth) * 16).to(torch.uint8),
        (random(rows, groups) * 0.02).half(),
        group_size,
        zero_points=(random(rows, groups) * 17).to(torch.int16) if form == "zero points" else None,
        minimums=(random(rows, groups) - 0.5).half() if form == "minimums" else None,
        input_order=torch.randperm(depth, generator=generator).int() if ordered else None,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("form", "ordered"), [("symmetric", True), ("zero points", False), ("minimums", False)])
def test_layers_of_one_workspace_multiply_and_replay(dtype: torch.dtype, form: str, ordered: bool) -> None:
    device = SimulatedCudaDevice(MODULE)
    tokens, width = 9, 320
    # Widths of a decoder layer: one is the other's input, and both use the same workspace.
    weights = [random_weight(192, width, 64, form, ordered), random_weight(width, 192, 32, form)]
    biases = [None, torch.linspace(-1, 1, width)]
    first, second = (
        Int4Linear(device, weight, bias, activation_bits=16) for weight, bias in zip(weights, biases, strict=True)
    )
    workspace_bytes = max(layer.workspace_bytes(tokens) for layer in (first, second))
    workspace = device.empty((workspace_bytes,), torch.uint8).zero_()
    x, out = device.empty((tokens, width), dtype), device.empty((tokens, width), dtype)
    between = device.empty((tokens, 192), dtype)

    def step() -> None:
        first(between, x, workspace)
        second(out, between, workspace)

    x.copy_(torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)))
    replay = device.capture(None, step)
    for seed in (2, 3):
        x.copy_(torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)))
        replay()
        got = device.fetch(out).double()
        hidden = (x.double() @ weights[0].dequantize().double().T).to(dtype).double()
        expected = hidden @ weights[1].dequantize().double().T + biases[1].double()
        error = (got - expected).abs().mean() / expected.abs().mean()
        assert error < (1e-3 if dtype == torch.float16 else 4e-3)
    assert device.num_replays == 2
