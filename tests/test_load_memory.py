# SPDX-License-Identifier: Apache-2.0
"""Loading needs the weights once, as they are packed, and a few times the largest layer beside them: never a second
copy of the model, whatever it is stored as."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastserve.model_config import ModelConfig
from fastserve.models.llama import projections
from fastserve.weights.safetensors import open_checkpoint
from int4_formats import quantization_config
from tiny_models import make_tiny_checkpoint

WIDTH, MLP, GROUP = 1024, 3072, 128

LOAD = """
import json, sys
from pathlib import Path
from fastserve.config import EngineConfig
from fastserve.engine.memory import peak_memory_bytes
from fastserve.engine.runner import ModelRunner

options = dict(num_blocks=2, max_model_len=32, max_num_seqs=1, max_num_batched_tokens=32)
ModelRunner(sys.argv[1], EngineConfig(**options)).close()  # what is set up once is there
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = peak_memory_bytes()
runner = ModelRunner(sys.argv[2], EngineConfig(**options))
maps = Path("/proc/self/maps").read_text()
print(json.dumps([peak_memory_bytes() - before, runner.memory_plan.weight_bytes, maps.count(".safetensors")]))
"""


def quantized(name: str, rows: int, depth: int) -> dict[str, torch.Tensor]:
    """All weights 0, as GPTQ stores them."""
    return {
        f"{name}.qweight": torch.full((depth // 8, rows), -2004318072, dtype=torch.int32),  # 0x88888888
        f"{name}.qzeros": torch.full((depth // GROUP, rows // 8), 0x77777777, dtype=torch.int32),
        f"{name}.scales": torch.ones(depth // GROUP, rows, dtype=torch.float16),
    }


def make_model(folder: Path, kind: str, num_layers: int, vocab_size: int, **given: Any) -> Path:
    """A model of zeros, as wide as many small ones."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": MLP, "head_dim": 128, "num_attention_heads": 8, **given}
    make_tiny_checkpoint(
        folder, num_hidden_layers=0, tokenizer=False, dtype=torch.bfloat16, vocab_size=vocab_size, **sizes
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] = num_layers
    if kind == "gptq":
        config["quantization_config"] = quantization_config("gptq", GROUP)
    path.write_text(json.dumps(config))
    model_config = ModelConfig.from_dir(folder)
    with open_checkpoint(folder) as checkpoint:
        tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint}
    for index in range(num_layers):
        for parts, depth in projections(model_config, index).values():
            for name, rows in parts:
                if kind == "gptq":
                    tensors |= quantized(name, rows, depth)
                else:
                    tensors[f"{name}.weight"] = torch.zeros(rows, depth, dtype=torch.bfloat16)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{norm}.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("kind", "num_layers"), [("bf16", 12), ("gptq", 24)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_load_holds_the_weights_once(tmp_path: Path, kind: str, num_layers: int, tied: bool) -> None:
    small = make_model(tmp_path / "small", kind, 1, 512, tie_word_embeddings=tied)
    large = make_model(tmp_path / "large", kind, num_layers, 8192, tie_word_embeddings=tied)
    done = subprocess.run([sys.executable, "-c", LOAD, small, large], capture_output=True, text=True, check=True)
    peak, weights, num_mapped = json.loads(done.stdout)
    largest = 2 * MLP * WIDTH  # gate and up, numbers
    assert num_mapped == 0
    assert weights > 6 * largest
    assert weights < peak < weights + 4 * 2 * largest
