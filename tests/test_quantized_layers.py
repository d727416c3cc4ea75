# SPDX-License-Identifier: Apache-2.0
"""Layers of 4 and 8-bit weights: their error, their memory, and what they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastserve import LLM, FastserveError, InvalidRequest, _native
from fastserve.config import EngineConfig
from fastserve.engine.device import CpuDevice
from fastserve.layers import Int4Linear, Int8Linear, Linear, PackedLinear, SideBySide, make_int4_linear
from fastserve.weights.int8 import round_int8
from fastserve.weights.quantized import QuantizedWeight
from int4_formats import quantize_folder
from tiny_models import make_tiny_checkpoint

FORMS = ("symmetric", "zero_points", "minimums")
TOKENS = (*range(1, 9), 12, 16, 24, 32, 48, 64, 118, 128, 152, 1024)


@pytest.fixture(scope="module")
def device() -> CpuDevice:
    return CpuDevice(2)


@pytest.fixture(autouse=True)
def restore_isa() -> Iterator[None]:
    isa = _native.isa()
    yield
    _native.set_isa(isa)


def random_weight(rows: int, depth: int, form: str, group_size: int = 32, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = (rows, -(-depth // group_size))
    scales = (0.5 + torch.rand(groups, generator=generator)).half() / 64
    return QuantizedWeight(
        torch.randint(0, 16, (rows, depth), generator=generator).to(torch.uint8),
        scales,
        group_size,
        torch.randint(6, 11, groups, generator=generator).short() if form == "zero_points" else None,
        (-8 * scales).half() if form == "minimums" else None,
    )


def apply(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    out = torch.full((x.shape[0], layer.out_features), float("nan"))
    layer(out, x, torch.empty(layer.workspace_bytes(x.shape[0]), dtype=torch.uint8))
    return out


def mean_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).abs().mean() / exact.abs().mean())


@pytest.mark.parametrize("isa", [isa for isa in _native.isas() if "emulated" not in isa])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group_size", [32, 128, 320])
def test_mean_error_against_float64(device: CpuDevice, isa: str, form: str, group_size: int) -> None:
    """Float activations: below 1e-3, or 4e-3 where they are rounded to bfloat16; int12 activations: below 1e-3;
    int8 activations: below 1e-2. And a
    row's result is bitwise the same for every number of rows."""
    _native.set_isa(isa)
    weight = random_weight(96, 320, form, group_size)
    x = torch.randn(max(TOKENS), 320, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ weight.dequantize().double().T
    for activation_bits, bar in ((16, 4e-3 if "bf16" in isa else 1e-3), (12, 1e-3), (8, 1e-2)):
        layer = Int4Linear(device, weight, None, activation_bits)
        whole = apply(layer, x)
        assert mean_error(whole, exact) < bar
        for tokens in TOKENS:
            assert torch.equal(apply(layer, x[:tokens]), whole[:tokens])


def test_projections_of_one_form_are_one_layer_and_others_lie_side_by_side(device: CpuDevice) -> None:
    one = [random_weight(40, 64, "minimums", seed=i) for i in range(3)]
    mixed = [random_weight(40, 64, form, seed=i) for i, form in enumerate(FORMS)]
    x = torch.randn(5, 64)
    biases = [torch.randn(40) for _ in range(3)]
    for parts, kind in ((one, Int4Linear), (mixed, SideBySide)):
        layer = make_int4_linear(device, parts, biases, 16, "qkv")
        assert type(layer) is kind
        assert (layer.out_features, layer.in_features) == (120, 64)
        exact = torch.cat([x.double() @ part.dequantize().double().T for part in parts], 1) + torch.cat(biases)
        assert mean_error(apply(layer, x), exact) < 4e-3
        assert layer.num_bytes == 3 * 40 * 4 + sum(
            _native.packed_int4_shape(rows, 64, 32, form)[0] * _native.packed_int4_shape(rows, 64, 32, form)[1]
            for rows, form in ([(120, 2)] if parts is one else [(40, 0), (40, 1), (40, 2)])
        )


def test_weights_rounded_to_8_bits(device: CpuDevice) -> None:
    weight = torch.randn(70, 100)
    weight[3, 32:64] = 0.0
    weight[4] *= 1e-9  # below what a float16 scale can say
    rounded = round_int8(weight.bfloat16())
    codes, again = rounded.codes, rounded.dequantize()
    step = rounded.scales.float().repeat_interleave(rounded.group_size, 1)[:, :100]
    assert torch.equal(again, step * codes.float())
    near = torch.arange(70) != 4
    assert ((again - weight.bfloat16().float()).abs() <= step * 0.51 + 1e-7)[near].all()
    assert codes[3, 32:64].abs().max() == 0
    assert codes[near].abs().max() == 127
    x, rounded = torch.randn(9, 100), round_int8(weight)
    for activation_bits, bar in ((8, 1.5e-2), (12, 1e-2), (16, 1e-2)):
        layer = Int8Linear(device, rounded, None, activation_bits)
        assert mean_error(apply(layer, x), x.double() @ weight.double().T) < bar


# --- in a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int4_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_checkpoint(folder / "plain", tie_word_embeddings=True)
    quantize_folder(folder / "plain", folder / "int4", "fastserve", 32)
    return folder / "int4"


def layers_of(folder: Path, **options: str) -> tuple[list[Linear], int]:
    with LLM(folder, max_model_len=64, num_threads=1, skip_tokenizer_init=True, **options) as llm:
        model = llm.loaded.runner.model
        return list(model.linears()), llm.loaded.runner.memory_plan.weight_bytes


def test_options_choose_the_layers_and_the_memory_plan_knows(int4_dir: Path) -> None:
    layers, packed_bytes = layers_of(int4_dir)
    assert {type(layer) for layer in layers[:-1]} == {Int4Linear}
    assert type(layers[-1]) is PackedLinear
    written_out, all_bytes = layers_of(int4_dir, quantization="none")
    assert {type(layer) for layer in written_out} == {PackedLinear}
    for kept, full in zip(layers[:-1], written_out[:-1], strict=True):
        num_rows = kept.out_features * (2 if kept.is_gated else 1)
        padded_rows, padded_inputs = (-(-size // 32) * 32 for size in (num_rows, kept.in_features))
        assert kept.num_bytes == padded_rows * padded_inputs * 5 // 8  # 4 bits, and 2 x 16 of every 32
        assert full.num_bytes == padded_rows * kept.in_features * 4
    saved = sum(full.num_bytes - kept.num_bytes for kept, full in zip(layers, written_out, strict=True))
    assert all_bytes - packed_bytes == saved
    int8_head, head_bytes = layers_of(int4_dir, lm_head_dtype="int8")
    assert type(int8_head[-1]) is Int8Linear
    assert head_bytes == packed_bytes - layers[-1].num_bytes + int8_head[-1].num_bytes
    assert int8_head[-1].num_bytes * 3 < layers[-1].num_bytes


def test_options_that_do_not_exist() -> None:
    for name, bad in (("quantization", "gptq"), ("activation_dtype", "int4"), ("lm_head_dtype", "int4")):
        with pytest.raises(InvalidRequest, match=f"{name}='{bad}' is not allowed: {name} must be one of auto"):
            EngineConfig(**{name: bad})


def test_activations_that_a_device_cannot(device: CpuDevice) -> None:
    from fastserve.layers import Precision

    class Narrow(CpuDevice):
        activation_bits = (16,)
        has_int4 = has_int8 = False

    narrow = Narrow(1)
    with pytest.raises(FastserveError, match="activation_dtype='int8' is not available on cpu"):
        Precision.of(EngineConfig(activation_dtype="int8"), narrow, torch.float32)
    with pytest.raises(FastserveError, match="lm_head_dtype='int8' is not available on cpu"):
        Precision.of(EngineConfig(lm_head_dtype="int8"), narrow, torch.float32)
    assert not Precision.of(EngineConfig(), narrow, torch.float32).keep_int4
