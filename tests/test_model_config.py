# SPDX-License-Identifier: Apache-2.0
"""config.json: what real files say is understood as transformers understands it, and lies are named."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from fastserve.errors import ModelLoadError
from fastserve.model_config import ARCHITECTURES, GenerationDefaults, ModelConfig, RopeConfig

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
MODEL_TYPES = dict(zip(ARCHITECTURES, ("llama", "mistral", "qwen2", "qwen3"), strict=True))


def config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    named = {"architectures": [architecture], "model_type": MODEL_TYPES.get(architecture, "llama")}
    return {**BASE, **named, **changes}


def read(architecture: str = "LlamaForCausalLM", **changes: Any) -> ModelConfig:
    return ModelConfig.from_dicts(config(architecture, **changes))


def write(folder: Path, data: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(data))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_both_spellings_give_the_same_config(tmp_path: Path) -> None:
    llama3 = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4096,
    }
    old = read(torch_dtype="bfloat16", rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **llama3})
    older = read(torch_dtype="bfloat16", rope_theta=500000, rope_scaling={"type": "llama3", **llama3})
    new = read(dtype="bfloat16", rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **llama3})
    both = read(
        dtype="bfloat16",
        torch_dtype="bfloat16",
        rope_theta=500000.0,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **llama3},
    )
    assert old == older == new == both
    assert new.rope == RopeConfig("llama3", 500000.0, 32.0, 1.0, 4.0, 4096)
    assert new.torch_dtype == "bfloat16"


def test_plain_llama(tmp_path: Path) -> None:
    model = ModelConfig.from_dir(write(tmp_path, config(rope_scaling=None, head_dim=None, quantization_config=None)))
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (9, 3, 64)
    assert model.rope == RopeConfig(theta=10000.0, original_max_position_embeddings=8192)
    assert model.layer_windows == (None,) * 30
    assert model.sliding_window is None
    assert model.tie_word_embeddings
    assert (model.qkv_bias, model.o_bias, model.mlp_bias, model.qk_norm) == (False,) * 4
    assert (model.bos_token_id, model.eos_token_ids, model.torch_dtype) == (1, (2,), None)
    assert model.generation == GenerationDefaults()
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.hidden_size = 1  # type: ignore[misc]


def test_llama_1_without_kv_heads_has_one_per_query_head() -> None:
    assert read(num_key_value_heads=None).num_kv_heads == 9


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("LlamaForCausalLM", {"attention_bias": True}, {"qkv_bias": True, "o_bias": True}),
        ("LlamaForCausalLM", {"mlp_bias": True}, {"mlp_bias": True, "qkv_bias": False}),
        ("Qwen2ForCausalLM", {}, {"qkv_bias": True, "o_bias": False, "qk_norm": False}),
        ("Qwen3ForCausalLM", {}, {"qkv_bias": False, "qk_norm": True, "head_dim": 128}),
        ("Qwen3ForCausalLM", {"attention_bias": True}, {"qkv_bias": True, "o_bias": True}),
        ("MistralForCausalLM", {}, {"sliding_window": 4096, "layer_windows": (4096,) * 30}),
        ("MistralForCausalLM", {"sliding_window": None}, {"sliding_window": None}),
        ("MistralForCausalLM", {"sliding_window": 33}, {"sliding_window": 33}),
        ("Qwen2ForCausalLM", {"sliding_window": 33}, {"sliding_window": None}),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 33, "use_sliding_window": True, "max_window_layers": 28},
            {"layer_windows": (None,) * 28 + (33, 33)},
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 33,
                "use_sliding_window": True,
                "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            {"layer_windows": (33, None), "sliding_window": 33},
        ),
    ],
)
def test_features_of_the_families(architecture: str, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    model = read(architecture, **changes)
    for name, value in expected.items():
        assert getattr(model, name) == value, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_files_that_transformers_writes_and_what_it_reads_from_them(tmp_path: Path, architecture: str) -> None:
    raw = config(architecture, rope_theta=77777.0, use_sliding_window=True, max_window_layers=3)
    if architecture != "LlamaForCausalLM":
        raw["sliding_window"] = 100
    reference = AutoConfig.from_pretrained(write(tmp_path, raw))
    before = ModelConfig.from_dir(tmp_path)
    reference.save_pretrained(tmp_path)
    after = ModelConfig.from_dir(tmp_path)
    assert before == after
    assert after.head_dim == (getattr(reference, "head_dim", None) or 64)
    assert after.rope.theta == reference.rope_parameters["rope_theta"] == 77777.0
    assert after.num_kv_heads == reference.num_key_value_heads
    assert after.rms_norm_eps == reference.rms_norm_eps
    assert after.sliding_window == getattr(reference, "sliding_window", None)


def test_generation_config(tmp_path: Path) -> None:
    generation = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "eos_token_id": [2, 7, 2],
        "do_sample": True,
    }
    model = ModelConfig.from_dir(write(tmp_path, BASE, generation))
    assert model.generation == GenerationDefaults(temperature=0.6, top_p=0.95, top_k=20)
    assert model.eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("temperature", v) for v in (-1, "hot", [1], True, float("nan"), float("inf"))),
        *(("top_p", v) for v in (-0.1, 1.5, "1")),
        *(("top_k", v) for v in (-2, 1.5, 10**30)),
        *(("eos_token_id", v) for v in (-1, 49152, "2", [2, None], [[2]], True, 10**400)),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
    ],
)
def test_lies_in_the_generation_config(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelLoadError, match=rf"generation_config\.json: {key} must be"):
        ModelConfig.from_dir(write(tmp_path, BASE, {key: value}))


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -576, 576.0, "576", True, [576], 10**12, 10**400, float("nan")])
def test_lies_about_sizes(key: str, value: Any) -> None:
    with pytest.raises(ModelLoadError, match=f"{key} must be an integer from 1 to"):
        read(**{key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "one of LlamaForCausalLM, Mistral.*got .'GPT2LMHeadModel'"),
        ({"architectures": []}, "architectures must be"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures must be"),
        ({"architectures": None}, "architectures must be"),
        (
            {"num_key_value_heads": 4},
            r"num_key_value_heads must be a divisor of num_attention_heads \(9\), got 4",
        ),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, r"hidden_size must be a multiple .*\(7\)"),
        ({"head_dim": 63}, "must be even"),
        ({"hidden_size": 9}, "must be even, from 2 to 4096, got 1"),
        ({"head_dim": 0}, "head_dim must be"),
        ({"head_dim": 2**20}, "head_dim must be"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of silu, swish, got 'gelu'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"torch_dtype": "int8"}, "torch_dtype must be one of float32"),
        ({"dtype": ["float32"]}, "dtype must be one of float32"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method must be one of gptq, awq"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"sliding_window": 128}, "sliding_window must be null for LlamaForCausalLM"),
        ({"layer_types": ["sliding_attention"] * 30}, "layer_types must be full_attention"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types must be a list of 30 entries"),
        ({"layer_types": ["chunked_attention"] * 30}, "layer_types must be a list of full_attention"),
        ({"layer_types": [["full_attention"]] * 30}, "layer_types must be a list of full_attention"),
        ({"eos_token_id": 49152}, "eos_token_id must be a token id.*49151, got 49152"),
        ({"bos_token_id": -1}, "bos_token_id must be a token id"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings must be"),
        ({"rope_theta": 0}, "rope_theta must be"),
        ({"rope_theta": float("inf")}, "rope_theta must be"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}}, "rope_theta must be absent, or equal"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "type must be one of default, linear, llama3, yarn",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type must be one of"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type must be one of"),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a number from 1 to"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor must be a number"),
        (
            {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24]}},
            "mrope_section must be absent",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}}, "beta_fast must be absent"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention must be absent"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor must be 1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be a number"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "high_freq_factor must be greater than low_freq_factor",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": "no"}},
            "truncate must be true or false",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1}, "greater than 1 for yarn"),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling must be absent, or equal",
        ),
    ],
)
def test_lies_and_unsupported_features(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("MistralForCausalLM", {"attention_bias": True}, "attention_bias must be false for Mistral"),
        ("Qwen2ForCausalLM", {"attention_bias": False}, "attention_bias must be true for Qwen2"),
        ("Qwen3ForCausalLM", {"mlp_bias": True}, "mlp_bias must be false for Qwen3"),
        ("Qwen3ForCausalLM", {"num_key_value_heads": None}, "num_key_value_heads must be"),
        ("MistralForCausalLM", {"sliding_window": -1}, "sliding_window must be an integer"),
        ("MistralForCausalLM", {"layer_types": ["full_attention"] * 30}, "the same for all layers"),
        ("Qwen2ForCausalLM", {"use_sliding_window": "yes"}, "use_sliding_window must be true or false"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 30}, "full_attention throughout"),
    ],
)
def test_unsupported_in_one_family(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read(architecture, **changes)


def test_yarn_with_a_null_factor_takes_the_ratio_of_the_contexts() -> None:
    rope = read(rope_parameters={"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 2048}).rope
    assert rope.factor == 4.0


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere: not a folder"):
        ModelConfig.from_dir(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match=r"config\.json: does not exist"):
        ModelConfig.from_dir(tmp_path)
    for broken in ("", "{", "[]", '{"a": 1, "a": 2}', '{"a": ' + "[" * 200_000):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ModelLoadError, match=r"config\.json"):
            ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_bytes(b"{" + b" " * (17 * 2**20) + b"}")
    with pytest.raises(ModelLoadError, match="at most 16777216 are allowed"):
        ModelConfig.from_dir(tmp_path)


def test_code_beside_the_weights_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto_map names code to import; other engines ran it although remote code was switched off."""
    canary = tmp_path / "fired"
    (tmp_path / "modeling_canary.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Model: pass\n")
    auto_map = {"AutoConfig": "modeling_canary.Model", "AutoModelForCausalLM": "modeling_canary.Model"}
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path, config(auto_map=auto_map, custom_generate="modeling_canary"), {"auto_map": auto_map})
    assert ModelConfig.from_dir(folder).num_layers == 30
    assert "modeling_canary" not in sys.modules
    assert not canary.exists()
