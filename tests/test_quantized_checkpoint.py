# SPDX-License-Identifier: Apache-2.0
"""GPTQ, AWQ, compressed-tensors and our own int4 files mean what their descriptions say, and lies are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastserve import LLM, ModelLoadError, SamplingParams, _native
from fastserve.config import EngineConfig
from fastserve.engine.runner import ModelRunner
from fastserve.json_file import Fields
from fastserve.layers import Int8Linear, PackedLinear, in_turns
from fastserve.model_config import ModelConfig
from fastserve.models.llama import projections
from fastserve.weights.quantization_config import (
    QuantizationConfig,
    compressed_tensors_config,
    fastserve_config,
)
from fastserve.weights.quantized import QuantizedWeight
from fastserve.weights.quantized_checkpoint import (
    QuantizedCheckpoint,
    pack_nibbles,
    pack_quantized,
    unpack_nibbles,
)
from fastserve.weights.safetensors import open_checkpoint
from int4_formats import KINDS, quantization_config, quantize_folder, random_linear, to_int8
from op_cases.linear_quantized import Weight
from tiny_models import make_tiny_checkpoint


def parse(config: dict[str, Any]) -> QuantizationConfig:
    found = QuantizationConfig.from_fields(Fields("config.json", {"quantization_config": config}))
    assert found is not None
    return found


def open_quantized(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> QuantizedCheckpoint:
    save_file({f"q_proj.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return QuantizedCheckpoint(open_checkpoint(folder), parse(config))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "depth", "group_size"), [(16, 96, 32), (8, 128, 64), (24, 64, -1), (8, 80, 64)])
def test_a_file_means_what_its_format_says(tmp_path: Path, kind: str, rows: int, depth: int, group_size: int) -> None:
    linear = random_linear(kind, rows, depth, group_size)
    source = open_quantized(tmp_path, linear.tensors, quantization_config(kind, group_size))
    assert source.holds("q_proj")
    assert not source.holds("k_proj")
    assert sorted(source.tensor_names("q_proj")) == sorted(f"q_proj.{name}" for name in linear.tensors)
    weight = source.read("q_proj", rows, depth)
    assert torch.equal(weight.dequantize(), linear.weight)
    assert (weight.zero_points is None) == (kind in ("gptq", "gptq-act", "ct", "fastserve"))
    assert (weight.input_order is not None) == (kind.endswith("act") and group_size != -1)


@pytest.mark.parametrize("kind", ["ct", "ct-asym", "fastserve"])
def test_sizes_that_do_not_fill_words(tmp_path: Path, kind: str) -> None:
    linear = random_linear(kind, 13, 70, 32)
    source = open_quantized(tmp_path, linear.tensors, quantization_config(kind, 32))
    assert torch.equal(source.read("q_proj", 13, 70).dequantize(), linear.weight)


def test_zero_points_of_older_files_are_plain_int8(tmp_path: Path) -> None:
    linear = random_linear("ct-asym", 16, 64, 32)
    source = open_quantized(tmp_path, linear.tensors, quantization_config("ct-asym", 32))
    zeros = source.read("q_proj", 16, 64).zero_points
    assert zeros is not None
    (tmp_path / "old").mkdir()
    tensors = linear.tensors | {"weight_zero_point": (zeros - 8).to(torch.int8)}
    old = open_quantized(tmp_path / "old", tensors, quantization_config("ct-asym", 32))
    assert torch.equal(old.read("q_proj", 16, 64).dequantize(), linear.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_as_with_the_weights_written_out(tmp_path: Path, kind: str) -> None:
    make_tiny_checkpoint(tmp_path / "plain", intermediate_size=96, tie_word_embeddings=kind == "awq")
    quantize_folder(tmp_path / "plain", tmp_path / "int4", kind, 32)
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=3)

    def run(folder: Path, **options: Any) -> tuple[Any, list[float]]:
        with LLM(folder, max_model_len=64, num_threads=1, **options) as llm:
            (output,) = llm.generate(["The quick brown fox jumps over"], params, use_tqdm=False)
        assert output.prompt_logprobs is not None
        prompt = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        logprobs = [entry[token].logprob for entry, token in prompt if entry is not None]
        return (output.outputs[0].token_ids, output.prompt_logprobs), logprobs

    isa = _native.isa()
    dense, logprobs = run(tmp_path / "int4" / "dense")
    assert run(tmp_path / "int4", quantization="none")[0] == dense
    # Of values up to 40. On AMX float activations have a test of their own, which needs no tolerance.
    for activation_dtype, tolerance in (("float", 0.25), ("int8", 0.75)):
        if activation_dtype == "float" and isa.startswith("amx"):
            continue
        _, near = run(tmp_path / "int4", activation_dtype=activation_dtype)
        assert near == pytest.approx(logprobs, abs=tolerance)
        assert near != logprobs  # the int4 kernels computed it
    try:
        # Without a bf16 dot product the packed codes go through the very chain of the weights written out.
        _native.set_isa("portable")
        exact = run(tmp_path / "int4", activation_dtype="float")
        written_out = run(tmp_path / "int4" / "dense")
    finally:
        _native.set_isa(isa)
    assert exact[1] == pytest.approx(written_out[1], abs=1e-4)
    if not kind.endswith("act"):  # which adds up the inputs in another order
        assert exact[0] == written_out[0]


def cut_to_bfloat16(weights: list[QuantizedWeight], is_gated: bool) -> list[torch.Tensor]:
    """What AMX kernels make of projections that are packed as one, by the second description in op_cases."""
    one = QuantizedWeight.stack(weights, "")
    order = in_turns(one.shape[0]) if is_gated else torch.arange(one.shape[0])
    one = one.rows(order)
    zero_points = None if one.zero_points is None else one.zero_points.to(torch.uint8)
    cut = Weight(one.codes, one.scales, one.group_size, zero_points, one.minimums).on_tiles()
    exact = Weight(one.codes, one.scales, one.group_size, zero_points, one.minimums)
    # Half of a unit of bfloat16 on average, never more than one; and what float32 loses beside 2048 * scale.
    assert ((cut - exact.value()).abs() <= 2.0**-7 * exact.value().abs() + 2.0**-12 * exact.magnitude()).all()
    if one.input_order is not None:
        cut = torch.empty_like(cut).index_copy_(1, one.input_order.long(), cut)
    return list(cut.bfloat16()[order.argsort()].split([weight.shape[0] for weight in weights]))


@pytest.mark.skipif(not any(isa.startswith("amx") for isa in _native.isas()), reason="neither AMX nor its emulation")
@pytest.mark.parametrize("kind", KINDS)
def test_on_amx_int4_is_the_bfloat16_model_of_the_weights_cut_off(tmp_path: Path, kind: str) -> None:
    """Bit for bit: on tiles int4 weights differ from exact ones by becoming bfloat16, and by nothing else."""
    make_tiny_checkpoint(tmp_path / "plain", intermediate_size=96)
    quantize_folder(tmp_path / "plain", tmp_path / "int4", kind, 32)
    config = ModelConfig.from_dir(tmp_path / "int4")
    assert config.quantization is not None
    source = QuantizedCheckpoint(open_checkpoint(tmp_path / "int4"), config.quantization)
    file = tmp_path / "int4" / "dense" / "model.safetensors"
    tensors = load_file(file)
    for index in range(config.num_layers):
        for linear, (parts, depth) in projections(config, index).items():
            cut = cut_to_bfloat16([source.read(name, rows, depth) for name, rows in parts], linear == "gate_up")
            tensors |= {f"{name}.weight": part.contiguous() for (name, _), part in zip(parts, cut, strict=True)}
    save_file(tensors, file, metadata={"format": "pt"})
    results = []
    isa = _native.isa()
    try:
        _native.set_isa(next(isa for isa in reversed(_native.isas()) if isa.startswith("amx")))
        for folder in (tmp_path / "int4", tmp_path / "int4" / "dense"):
            options: dict[str, Any] = {"dtype": "bfloat16", "activation_dtype": "float"}
            with LLM(folder, max_model_len=64, num_threads=1, **options) as llm:
                params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=3)
                (output,) = llm.generate(["The quick brown fox jumps over"], params, use_tqdm=False)
            assert output.prompt_logprobs is not None
            results.append((output.outputs[0].token_ids, output.prompt_logprobs))
    finally:
        _native.set_isa(isa)
    if not kind.endswith("act"):  # which adds up the inputs in another order
        assert results[0] == results[1]
        return
    prompts = zip(results[0][1][1:], results[1][1][1:], strict=True)
    for ours, theirs in prompts:
        for token in ours.keys() & theirs.keys():
            assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_int8_matrices_compute_as_the_weights_written_out(tmp_path: Path, tied: bool) -> None:
    """Embedding and head in 8 bits beside int4 linears, as a Q4_1 file with Q8_0 tables gives them."""
    make_tiny_checkpoint(tmp_path / "plain", intermediate_size=96, tie_word_embeddings=tied)
    quantize_folder(tmp_path / "plain", tmp_path / "int8", "fastserve", 32)
    to_int8(tmp_path / "int8", "embed_tokens", "lm_head")
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=3)

    def run(folder: Path, **options: Any) -> tuple[Any, Any]:
        with LLM(folder, max_model_len=64, num_threads=1, **options) as llm:
            (output,) = llm.generate(["The quick brown fox jumps over"], params, use_tqdm=False)
        return output.outputs[0].token_ids, output.prompt_logprobs

    assert run(tmp_path / "int8", quantization="none") == run(tmp_path / "int8" / "dense")
    isa = _native.isa()
    try:
        _native.set_isa("portable")  # where packed codes go through the very chain of the weights written out
        assert run(tmp_path / "int8", activation_dtype="float") == run(tmp_path / "int8" / "dense")
    finally:
        _native.set_isa(isa)
    runner = ModelRunner(tmp_path / "int8", EngineConfig(device="cpu", max_model_len=64))
    model = runner.model
    assert type(model.lm_head) is Int8Linear
    rows, depth = model.config.vocab_size, model.config.hidden_size
    assert model.embedding.num_bytes == rows * (depth + 2 * -(-depth // 32))
    runner.close()


def test_an_int8_model_file(tmp_path: Path) -> None:
    """Every matrix in 8 bits, as of a Q8_0 file."""
    make_tiny_checkpoint(tmp_path / "plain", intermediate_size=96, tie_word_embeddings=True, attention_bias=True)
    shutil.copytree(tmp_path / "plain", tmp_path / "int8" / "dense")
    for file in (tmp_path / "plain").iterdir():
        shutil.copy(file, tmp_path / "int8")
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    to_int8(tmp_path / "int8", "embed_tokens", *names)
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    (tmp_path / "int8" / "config.json").write_text(
        json.dumps(config | {"quantization_config": fastserve_config(32, 8)})
    )
    outputs, layers = [], []
    isa = _native.isa()
    try:
        _native.set_isa("portable")
        for folder in (tmp_path / "int8", tmp_path / "int8" / "dense"):
            with LLM(folder, max_model_len=64, num_threads=1, activation_dtype="float") as llm:
                params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=3)
                (output,) = llm.generate(["The quick brown fox jumps over"], params, use_tqdm=False)
                outputs.append((output.outputs[0].token_ids, output.prompt_logprobs))
                layers.append({type(linear) for linear in llm.loaded.runner.model.linears()})
    finally:
        _native.set_isa(isa)
    assert outputs[0] == outputs[1]
    assert layers == [{Int8Linear}, {PackedLinear}]


@given(st.lists(st.integers(0, 15), min_size=1, max_size=40))
def test_packing_nibbles_and_back(codes: list[int]) -> None:
    packed = pack_nibbles(torch.tensor([codes], dtype=torch.uint8))
    assert packed.shape == (1, -(-len(codes) // 8))
    assert unpack_nibbles(packed)[0, : len(codes)].tolist() == codes


@pytest.mark.parametrize("form", ["symmetric", "zero_points", "minimums"])
def test_what_is_packed_is_read_back(tmp_path: Path, form: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = QuantizedWeight(
        torch.randint(0, 16, (13, 96), generator=generator).to(torch.uint8),
        torch.rand(13, 3, generator=generator).half(),
        32,
        torch.randint(0, 16, (13, 3), generator=generator).short() if form == "zero_points" else None,
        torch.randn(13, 3, generator=generator).half() if form == "minimums" else None,
    )
    config = fastserve_config(32) if form == "minimums" else compressed_tensors_config(32, form == "symmetric")
    again = open_quantized(tmp_path, pack_quantized(weight), config).read("q_proj", 13, 96)
    for field in ("codes", "scales", "zero_points", "minimums"):
        ours, theirs = getattr(weight, field), getattr(again, field)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, change(tensors[name]).contiguous())


def spoil(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.float().index_fill(0, torch.tensor([0]), value)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gptq", put("qweight", lambda t: t.T), r"q_proj\.qweight' is torch.int32 \[16, 12\]; expected .*\[12, 16\]"),
        ("gptq", put("qweight", lambda t: t.float()), r"q_proj\.qweight' is torch.float32"),
        ("gptq", put("qzeros", lambda t: t[:2]), r"q_proj\.qzeros' is torch.int32 \[2, 2\]; expected.*\[3, 2\]"),
        ("gptq", without("qzeros"), r"q_proj\.qzeros' is missing"),
        ("gptq", without("scales"), r"q_proj\.scales' is missing \(expected shape \[3, 16\]\)"),
        ("gptq", put("scales", lambda t: t[:, :8]), r"q_proj\.scales' is .*in groups of 32"),
        ("gptq", put("scales", spoil(float("nan"))), r"q_proj\.scales' holds NaN"),
        ("gptq", put("scales", spoil(1e6)), r"q_proj\.scales' holds NaN, infinity or numbers beyond 65504"),
        ("gptq", put("g_idx", lambda t: t + 1), r"q_proj\.g_idx' holds groups 1 to 3; there are groups 0 to 2"),
        ("gptq", put("g_idx", lambda t: t - 1), r"q_proj\.g_idx' holds groups -1 to 1"),
        ("gptq", put("g_idx", lambda t: t * 0), r"q_proj\.g_idx' does not give each group 32 inputs"),
        ("gptq", put("g_idx", lambda t: t[:90]), r"q_proj\.g_idx' is torch.int32 \[90\]"),
        ("awq", put("qweight", lambda t: t[:90]), r"q_proj\.qweight' is torch.int32 \[90, 2\]"),
        ("awq", put("scales", spoil(float("inf"))), r"q_proj\.scales' holds NaN, infinity"),
        (
            "ct",
            put("weight_shape", lambda t: t.flip(0)),
            r"weight_shape' says \[96, 16\]; config.json asks for",
        ),
        ("ct", put("weight_packed", lambda t: t[:, :4]), r"weight_packed' is torch.int32 \[16, 4\]"),
        ("ct", put("weight_scale", spoil(float("nan"))), r"weight_scale' holds NaN"),
        ("ct-asym", without("weight_zero_point"), r"weight_zero_point' is missing"),
        ("ct-asym", put("weight_zero_point", lambda t: t[:1]), r"weight_zero_point' is torch.int32 \[1, 3\]"),
        ("fastserve", put("weight_minimum", spoil(float("-inf"))), r"weight_minimum' holds NaN, infinity"),
    ],
)
def test_a_lying_tensor_is_named(
    tmp_path: Path, kind: str, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    tensors = dict(random_linear(kind, 16, 96, 32).tensors)
    change(tensors)
    source = open_quantized(tmp_path, tensors, quantization_config(kind, 32))
    with pytest.raises(ModelLoadError, match=message):
        source.read("q_proj", 16, 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("weight", lambda t: t[:, :64]), r"q_proj\.weight' is torch.int8 \[16, 64\]; expected .*\[16, 96\]"),
        (without("weight_scale"), r"q_proj\.weight_scale' is missing \(expected shape \[16, 3\]\)"),
        (put("weight_scale", lambda t: t[:, :2]), r"q_proj\.weight_scale' is .*in groups of 32"),
        (put("weight_scale", lambda t: t.to(torch.int8)), r"q_proj\.weight_scale' is torch.int8"),
        (put("weight_scale", spoil(float("nan"))), r"q_proj\.weight_scale' holds NaN"),
    ],
)
def test_a_lying_int8_tensor_is_named(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    tensors = {"weight": torch.zeros(16, 96, dtype=torch.int8), "weight_scale": torch.ones(16, 3).half()}
    change(tensors)
    source = open_quantized(tmp_path, tensors, fastserve_config(32, 8))
    assert source.holds_int8("q_proj")
    with pytest.raises(ModelLoadError, match=message):
        source.read_int8("q_proj", 16, 96)


def test_int8_without_a_config_that_says_so(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "plain", intermediate_size=96)
    quantize_folder(tmp_path / "plain", tmp_path / "int8", "fastserve", 32)
    to_int8(tmp_path / "int8", "embed_tokens")
    shutil.copy(tmp_path / "plain" / "config.json", tmp_path / "int8")
    with pytest.raises(ModelLoadError, match=r"embed_tokens\.weight' is torch.int8; expected float32"):
        ModelRunner(tmp_path / "int8", EngineConfig(device="cpu"))


@pytest.mark.parametrize("kind", ["gptq", "awq", "ct", "fastserve"])
def test_a_lie_in_the_last_layer_is_found_before_the_first_is_loaded(tmp_path: Path, kind: str) -> None:
    make_tiny_checkpoint(tmp_path / "plain", intermediate_size=96)
    quantize_folder(tmp_path / "plain", tmp_path / "int4", kind, 32)
    file = tmp_path / "int4" / "model.safetensors"
    tensors = load_file(file)
    scale = "scales" if kind in ("gptq", "awq") else "weight_scale"
    last = max(name for name in tensors if name.endswith(f"mlp.down_proj.{scale}"))
    save_file(tensors | {last: tensors[last][:-1].contiguous()}, file, metadata={"format": "pt"})
    loaded: list[int] = []
    with pytest.raises(ModelLoadError, match=f"tensor '{last}' is"):
        ModelRunner(tmp_path / "int4", EngineConfig(device="cpu"), lambda done, total: loaded.append(done))
    assert loaded == []


def test_a_symmetric_file_with_zero_points_is_no_symmetric_file(tmp_path: Path) -> None:
    tensors = random_linear("ct-asym", 16, 96, 32).tensors
    source = open_quantized(tmp_path, tensors, quantization_config("ct", 32))
    with pytest.raises(ModelLoadError, match=r"weight_zero_point' is not zero although config\.json says symmetric"):
        source.read("q_proj", 16, 96)


def test_sizes_that_the_format_cannot_hold(tmp_path: Path) -> None:
    source = open_quantized(tmp_path, random_linear("gptq", 16, 96, 32).tensors, quantization_config("gptq", 48))
    with pytest.raises(ModelLoadError, match="q_proj: group size 48 is not supported; multiples of 32 are"):
        source.read("q_proj", 16, 96)
    source = QuantizedCheckpoint(source.checkpoint, parse(quantization_config("gptq", 32)))
    with pytest.raises(ModelLoadError, match="q_proj: 12 outputs do not fill words of 8 nibbles"):
        source.read("q_proj", 12, 96)


def test_the_same_weight_twice(tmp_path: Path) -> None:
    tensors = random_linear("ct", 16, 96, 32).tensors | {"weight": torch.zeros(16, 96)}
    with pytest.raises(ModelLoadError, match=r"both q_proj\.weight and q_proj\.weight_packed"):
        open_quantized(tmp_path, tensors, quantization_config("ct", 32)).holds("q_proj")


GPTQ, AWQ, CT = (quantization_config(kind, 128) for kind in ("gptq", "awq", "ct"))


def ct(**changes: Any) -> dict[str, Any]:
    group = CT["config_groups"]["group_0"]
    return CT | {"config_groups": {"group_0": group | {"weights": group["weights"] | changes}}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "quant_method must be one of gptq, awq, compressed-tensors, fastserve, got nothing"),
        ({"quant_method": "bitsandbytes"}, "quant_method must be one of gptq, .*got 'bitsandbytes'"),
        ({"quant_method": "fp8"}, "quant_method must be one of"),
        (GPTQ | {"bits": 8}, r"bits must be 4 \(int4 is the only width that is read\), got 8"),
        (GPTQ | {"bits": "4"}, "bits must be 4"),
        (GPTQ | {"bits": None}, "bits must be 4"),
        (GPTQ | {"group_size": 0}, "group_size must be an integer from 1"),
        (GPTQ | {"group_size": None}, r"group_size must be -1 \(one group per row\) or an integer"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format must be one of gptq, gptq_v2, got 'marlin'"),
        (GPTQ | {"dynamic": {"layers.0": {"bits": 8}}}, "dynamic must be absent"),
        (GPTQ | {"sym": "yes"}, "sym must be true or false"),
        (AWQ | {"version": "gemv"}, "version must be gemm"),
        (AWQ | {"zero_point": False}, "zero_point must be true"),
        (AWQ | {"bits": 3}, "bits must be 4"),
        (fastserve_config(32, 3), "bits must be 4, or 8 where all quantised matrices are int8, got 3"),
        (CT | {"format": "float-quantized"}, "format must be one of pack-quantized, got 'float-quantized'"),
        (CT | {"config_groups": {}}, "config_groups must be an object with at least one group"),
        (CT | {"config_groups": []}, "config_groups must be an object"),
        (CT | {"config_groups": {"a": 3}}, "a must be an object"),
        (CT | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme must be null"),
        (ct(num_bits=8), "num_bits must be 4"),
        (ct(type="float"), "type must be one of int, got 'float'"),
        (ct(strategy="block"), "strategy must be one of group, channel, got 'block'"),
        (ct(dynamic=True), "dynamic must be false"),
        ({**CT, "config_groups": CT["config_groups"] | ct(group_size=64)["config_groups"] | {
            "b": CT["config_groups"]["group_0"]}}, "groups with the same weights settings"),
        (CT | {"config_groups": {"a": CT["config_groups"]["group_0"] | {"input_activations": {"num_bits": 8}}}},
         "input_activations must be null"),
    ],
)  # fmt: skip
def test_what_is_not_read_says_what_is(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"config\.json: quantization_config.*{message}"):
        parse(config)


def test_the_configs_we_write_are_read() -> None:
    assert parse(fastserve_config(32)) == QuantizationConfig("fastserve", 32)
    assert parse(fastserve_config(32, 8)) == QuantizationConfig("fastserve", 32)
    assert parse(compressed_tensors_config(64, True)) == QuantizationConfig("compressed-tensors", 64, True)
    assert parse(compressed_tensors_config(64, False)) == QuantizationConfig("compressed-tensors", 64, False)
