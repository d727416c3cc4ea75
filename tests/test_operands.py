# SPDX-License-Identifier: Apache-2.0
"""Rows of bfloat16 between the ops of a CPU step: the bits of float32 rows that the product rounds itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve import LLM, SamplingParams, _native
from fastserve.engine.device import CpuDevice
from fastserve.layers import Int4Linear, Int8Linear, Linear, make_linear
from fastserve.weights.int8 import round_int8
from fastserve.weights.round_int4 import round_int4
from op_cases.attention import Shape, arguments_for
from op_checks import run_guarded
from tiny_models import make_tiny_checkpoint

AMX = [isa for isa in _native.isas() if isa.startswith("amx")]
WIDTH, DEPTH, TOKENS = 96, 160, 70


@pytest.fixture(autouse=True)
def restore_isa() -> Iterator[None]:
    isa = _native.isa()
    yield
    _native.set_isa(isa)


def wide_rows(x: torch.Tensor, extra: int) -> torch.Tensor:
    wide = torch.full((x.shape[0], x.shape[1] + extra), torch.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("hidden", [7, 33, 160])
def test_a_norm_rounds_what_it_would_write(isa: str, hidden: int) -> None:
    _native.set_isa(isa)
    x, weight = torch.randn(9, hidden), torch.randn(hidden)
    x[3, 5] = torch.nan
    x[4] = torch.arange(hidden) * 2.0**-130  # subnormal results
    exact, rounded = torch.empty(9, hidden), wide_rows(torch.empty(9, hidden, dtype=torch.bfloat16), 32)
    _native.ops.rms_norm(exact, x, None, weight, 1e-5)
    _native.ops.rms_norm(rounded, x, None, weight, 1e-5)
    assert torch.equal(rounded[3].isnan(), exact[3].isnan())
    others = torch.arange(9) != 3
    assert torch.equal(rounded[others], exact[others].bfloat16())


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [18, 64])
def test_attention_rounds_what_it_would_write(isa: str, cache: torch.dtype, dim: int) -> None:
    """Outputs written by items and by merges, of rows that begin where a norm's or an MLP's would."""
    _native.set_isa(isa)
    shape = Shape(dim=dim, span=64, dtype=cache, num_workers=8)
    rows, lengths = [3, 40, *[1] * 18], [290, 60, *range(193, 211)]
    arguments = arguments_for(torch.Generator().manual_seed(3), rows, lengths, shape, [(0, 192, 2, 20)])
    assert (arguments["items"][:, 7] == 0).any()
    assert len(arguments["merges"]) > 0
    arguments["kv_cache"][arguments["block_tables"][1, 0], 1] = torch.nan  # values of one request
    arguments["out"] = torch.empty(sum(rows), shape.heads, dim)
    exact = run_guarded("attention", arguments)["out"]
    wide = torch.empty(sum(rows), shape.heads * dim + 32, dtype=torch.bfloat16)
    arguments["out"] = wide[:, : shape.heads * dim].unflatten(1, (shape.heads, dim))
    rounded = run_guarded("attention", arguments)["out"]
    is_nan = exact.isnan().all(2).all(1)
    assert is_nan.tolist() == [3 <= row < 43 for row in range(sum(rows))]
    assert torch.equal(rounded.isnan(), exact.isnan())
    assert torch.equal(rounded[~is_nan], exact[~is_nan].bfloat16())


def layer(kind: str, is_gated: bool) -> Linear:
    device = CpuDevice(2)
    weight = torch.randn(WIDTH, DEPTH, generator=torch.Generator().manual_seed(1)) / 4
    if kind == "int8":
        return Int8Linear(device, round_int8(weight), None, 16, is_gated)
    if kind == "int4":
        return Int4Linear(device, round_int4(weight, 32, "minimums"), None, 16, is_gated)
    return make_linear(device, weight.bfloat16(), None, is_gated)


def apply(linear: Linear, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full((x.shape[0], linear.out_features), torch.nan, dtype=dtype)
    linear(out, x, torch.empty(linear.workspace_bytes(x.shape[0]), dtype=torch.uint8))
    return out


@pytest.mark.skipif(not AMX, reason="neither AMX nor its emulation is in this build and machine")
@pytest.mark.parametrize("isa", AMX)
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("kind", ["bfloat16", "int4", "int8"])
def test_rounded_rows_give_the_bits_of_exact_ones(isa: str, is_gated: bool, kind: str) -> None:
    _native.set_isa(isa)
    linear = layer(kind, is_gated)
    assert linear.takes_bf16
    x = torch.randn(TOKENS, DEPTH, generator=torch.Generator().manual_seed(2))
    x[2] *= 1e-38
    expected = apply(linear, x)
    for extra in (0, 32, 7):
        rounded = wide_rows(x.bfloat16(), extra)
        for split in ([TOKENS], [1, 2, 17, 50]):
            assert torch.equal(torch.cat([apply(linear, part) for part in rounded.split(split)]), expected)
    if is_gated:
        assert torch.equal(apply(linear, rounded, torch.bfloat16), expected.bfloat16())
        assert torch.equal(apply(linear, x[:1], torch.bfloat16), expected[:1].bfloat16())


def test_rows_that_cannot_be_multiplied_are_refused() -> None:
    device = CpuDevice(1)
    x = torch.zeros(3, 40, dtype=torch.bfloat16)
    for isa in AMX:
        _native.set_isa(isa)
        linear = make_linear(device, torch.zeros(32, 40, dtype=torch.bfloat16))
        assert not linear.takes_bf16
        with pytest.raises(ValueError, match=r"linear: argument 'x' is bfloat16 \[M, 40\]; multiples of 32 inputs"):
            apply(linear, x)
    for isa in set(_native.isas()) - set(AMX):
        _native.set_isa(isa)
        with pytest.raises(ValueError, match=r"linear: argument 'x' is bfloat16; .* take float32"):
            apply(linear := make_linear(device, torch.zeros(32, 32, dtype=torch.bfloat16)), x[:, :32])
        assert not linear.takes_bf16


@pytest.mark.skipif(not AMX, reason="neither AMX nor its emulation is in this build and machine")
def test_a_model_computes_the_same_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_checkpoint(tmp_path, intermediate_size=96)
    _native.set_isa(AMX[0])

    def run() -> tuple[Any, torch.dtype]:
        with LLM(tmp_path, dtype="bfloat16", max_model_len=64, num_threads=1) as llm:
            params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=3)
            (output,) = llm.generate(["The quick brown fox jumps over"], params, use_tqdm=False)
            buffers = llm.loaded.runner.buffers
            assert buffers.normed.dtype == buffers.gated.dtype == buffers.attention.dtype
            return (output.outputs[0].token_ids, output.prompt_logprobs), buffers.normed.dtype

    rounded, dtype = run()
    assert dtype == torch.bfloat16
    monkeypatch.setattr(CpuDevice, "multiplies_bf16", lambda self, depth: False)
    exact, dtype = run()
    assert dtype == torch.float32
    assert exact == rounded
