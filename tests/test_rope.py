# SPDX-License-Identifier: Apache-2.0
"""The rotary table against transformers' own rotary module, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastserve.model_config import ModelConfig, RopeConfig
from fastserve.rope import attention_scaling, cos_sin_table, inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
CASES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    LLAMA3,
    {**LLAMA3, "factor": 32, "original_max_position_embeddings": 512, "high_freq_factor": 2.0},
    YARN,
    {**YARN, "attention_factor": 1.25},
    {**YARN, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    {**YARN, "factor": 1.0},
    {**YARN, "truncate": False},
    {**YARN, "factor": 64.0, "original_max_position_embeddings": 32},
]


def raw_config(rope: dict[str, Any], theta: float, head_dim: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2 * head_dim,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "vocab_size": 100,
        "max_position_embeddings": 16384,
        "rope_parameters": {**rope, "rope_theta": theta},
    }


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000, 100_000.5, 22.0])
@pytest.mark.parametrize("rope", CASES, ids=lambda rope: "-".join(str(v) for v in rope.values()))
def test_bit_for_bit_as_transformers(rope: dict[str, Any], theta: float, head_dim: int) -> None:
    raw = raw_config(rope, theta, head_dim)
    reference = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in raw.items() if k != "architectures"}))
    config = ModelConfig.from_dicts(raw)
    assert torch.equal(inverse_frequencies(config.rope, head_dim), reference.inv_freq)
    positions = torch.arange(4097)
    cos, sin = reference(torch.zeros(1, dtype=torch.float32), positions[None])
    table = cos_sin_table(config.rope, head_dim, 4097)
    half = head_dim // 2
    assert table.dtype == torch.float32
    assert table.shape == (4097, head_dim)
    assert torch.equal(table[:, :half], cos[0, :, :half])
    assert torch.equal(table[:, half:], sin[0, :, :half])
    assert torch.equal(cos[0, :, :half], cos[0, :, half:])  # the half-rotation convention itself


def test_a_row_does_not_depend_on_the_length_of_the_table() -> None:
    rope = RopeConfig(theta=100_000.0)
    table = cos_sin_table(rope, 64, 3000)
    for length in (1, 2, 7, 2999):
        assert torch.equal(cos_sin_table(rope, 64, length), table[:length])


def test_only_yarn_scales_the_attention() -> None:
    assert attention_scaling(RopeConfig("linear", factor=8.0)) == 1.0
    assert attention_scaling(RopeConfig("llama3", factor=8.0)) == 1.0
    assert attention_scaling(RopeConfig("yarn", factor=8.0, original_max_position_embeddings=64)) > 1.0


def test_unknown_type() -> None:
    with pytest.raises(ValueError, match="default, linear, llama3, yarn, got 'dynamic'"):
        inverse_frequencies(RopeConfig("dynamic"), 64)
