# SPDX-License-Identifier: Apache-2.0
"""The tiny folders of tiny_models.py are what parity tests need: readable here, and far from argmax ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastserve.model_config import ModelConfig
from fastserve.tokenizer import Tokenizer
from fastserve.weights.safetensors import open_checkpoint
from tiny_models import ARCHITECTURES, ROPES, make_tiny_checkpoint

FOLDERS: list[tuple[str, dict[str, Any]]] = [
    *((architecture, {"rope": rope}) for architecture in ARCHITECTURES for rope in ROPES),
    ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("MistralForCausalLM", {"sliding_window": 9}),
    ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ("Qwen3ForCausalLM", {"max_shard_size": "100KB", "dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(("architecture", "options"), FOLDERS)
def test_a_tiny_folder(tmp_path: Path, architecture: str, options: dict[str, Any]) -> None:
    make_tiny_checkpoint(tmp_path, architecture, **options)
    config = ModelConfig.from_dir(tmp_path)
    assert config.architecture == architecture
    assert config.rope.type == options.get("rope", "default")
    assert config.sliding_window == options.get("sliding_window")
    assert config.torch_dtype == str(options.get("dtype", torch.float32)).removeprefix("torch.")
    assert Tokenizer.from_dir(tmp_path).vocab_size <= config.vocab_size
    assert (tmp_path / "model.safetensors").exists() == ("max_shard_size" not in options)

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=config.torch_dtype)
    state = model.state_dict()
    checkpoint = open_checkpoint(tmp_path)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert {*checkpoint.names(), *tied} == set(state)
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), state[name])

    ids = torch.randint(5, 500, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        best = model.float()(ids).logits[0].topk(2, dim=-1)
    margins = best.values[:, 0] - best.values[:, 1]
    assert margins.median() > 0.5  # rounding moves these logits by about 1e-5
    assert len(set(best.indices[:, 0].tolist())) > 20
