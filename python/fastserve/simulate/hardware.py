# SPDX-License-Identifier: Apache-2.0
"""Named GPUs and models, as far as the time and memory of a step depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastserve.errors import InvalidRequest
from fastserve.model_config import ModelConfig


@dataclass(frozen=True)
class Gpu:
    """Peaks as in the vendor's data sheet: dense 16-bit matrix products, memory."""

    name: str
    flops: float  # per second
    bandwidth: float  # bytes per second
    memory_bytes: float
    num_sms: int  # multiprocessors


@dataclass(frozen=True)
class Model:
    """A decoder of the Llama family. Widths count elements."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    weight_bits: float = 16.0  # of the linear layers; embeddings and the head stay at 16

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of one layer's matrices: query/key/value, output, gate/up, down."""
        heads, wide = self.num_heads * self.head_dim, self.intermediate_size
        qkv = heads + 2 * self.num_kv_heads * self.head_dim
        return (
            (self.hidden_size, qkv),
            (heads, self.hidden_size),
            (self.hidden_size, 2 * wide),
            (wide, self.hidden_size),
        )

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 2

    @property
    def weight_bytes(self) -> float:
        layer = sum(inputs * outputs for inputs, outputs in self.linears)
        return self.num_layers * layer * self.weight_bits / 8 + 2 * self.vocab_size * self.hidden_size * 2

    def blocks_on(self, gpu: Gpu, block_size: int) -> int:
        """KV blocks that fit beside the weights in 90 % of the memory; InvalidRequest if none does."""
        free = 0.9 * gpu.memory_bytes - self.weight_bytes
        blocks = int(free // (self.kv_bytes_per_token * block_size))
        if blocks < 1:
            raise InvalidRequest(
                f"{self.name} needs {self.weight_bytes / 1e9:.1f} GB for its weights, and {gpu.name} has "
                f"{gpu.memory_bytes / 1e9:.0f} GB, of which 90 % are used: choose a larger GPU, a smaller model "
                "or fewer weight bits"
            )
        return blocks


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a10", 125e12, 0.600e12, 24e9, 72),
        Gpu("a6000", 155e12, 0.768e12, 48e9, 84),
        Gpu("a100", 312e12, 2.04e12, 80e9, 108),
        Gpu("h100", 989e12, 3.35e12, 80e9, 132),
        Gpu("h200", 989e12, 4.80e12, 141e9, 132),
    )
}
MODELS = {
    model.name: model
    for model in (
        Model("llama-3-8b", 4096, 14336, 32, 32, 8, 128, 128256, 8192),
        Model("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256, 131072),
        Model("llama-2-7b", 4096, 11008, 32, 32, 32, 128, 32000, 4096),
        Model("llama-13b", 5120, 13824, 40, 40, 40, 128, 32000, 4096),
        Model("llama-33b", 6656, 17920, 60, 52, 52, 128, 32000, 4096),
        Model("qwen2.5-7b", 3584, 18944, 28, 28, 4, 128, 152064, 32768),
        Model("smollm2-135m", 576, 1536, 30, 9, 3, 64, 49152, 8192),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU of the table, or "TFLOPS:TB/s:GB:SMS" (312:2.04:80:108) for any other. InvalidRequest lists what there
    is."""
    if name in GPUS:
        return GPUS[name]
    parts = name.split(":")
    try:
        tflops, bandwidth, memory = (float(part) for part in parts[:3])
        (sms,) = (int(part) for part in parts[3:])
    except ValueError:
        tflops = bandwidth = memory = sms = 0
    if not all(0 < value < 1e9 for value in (tflops, bandwidth, memory, sms)):
        raise InvalidRequest(
            f"GPU {name!r} is unknown; known are {', '.join(GPUS)}, or give dense 16-bit TFLOPS, TB/s, GB and "
            "multiprocessors, as in 312:2.04:80:108"
        )
    return Gpu(name, tflops * 1e12, bandwidth * 1e12, memory * 1e9, sms)


def find_model(name: str) -> Model:
    """A model of the table, or a folder with a config.json. InvalidRequest lists what there is."""
    if name in MODELS:
        return MODELS[name]
    if not Path(name).is_dir():
        raise InvalidRequest(f"model {name!r} is unknown; known are {', '.join(MODELS)}, or give a model folder")
    config = ModelConfig.from_dir(name)
    bits = 16.0
    if config.quantization is not None:
        bits = 4.5  # codes, and a 16-bit scale for each group of 32
    return Model(
        Path(name).name,
        config.hidden_size,
        config.intermediate_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.vocab_size,
        config.max_position_embeddings,
        bits,
    )
