# SPDX-License-Identifier: Apache-2.0
"""How long a step takes on a GPU: the roofline, summed over a step's matrix products and its attention.

Each matrix product takes the longer of its arithmetic at the peak rate and its bytes at the peak bandwidth, both
times an efficiency that real kernels reach. The constants are fitted to published measurements;
docs/simulation.md has the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastserve.simulate.hardware import Gpu, Model


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the peaks that kernels reach."""

    linear_flops: float = 0.65
    attention_flops: float = 0.45
    bandwidth: float = 0.78
    kernel_gap_s: float = 4e-6  # from the end of a kernel to the start of the next
    kernels_per_layer: int = 10


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one step, by what they go to."""

    linear: float
    prefill_attention: float
    decode_attention: float
    head: float
    launch: float

    @property
    def total(self) -> float:
        return self.linear + self.prefill_attention + self.decode_attention + self.head + self.launch


class CostModel:
    ROWS_PER_TILE = 128  # query rows that one pass over the KV of a chunk serves
    L2_MISSES = 0.5  # share of the passes over a chunk's KV that reach memory

    def __init__(self, gpu: Gpu, model: Model, efficiency: Efficiency | None = None) -> None:
        self.gpu = gpu
        self.model = model
        self.efficiency = e = efficiency or Efficiency()
        self._linear_rate = gpu.flops * e.linear_flops
        self._bandwidth = gpu.bandwidth * e.bandwidth
        self._launch = model.num_layers * e.kernels_per_layer * e.kernel_gap_s
        self._pair_seconds = 4 * model.num_layers * model.num_heads * model.head_dim / (gpu.flops * e.attention_flops)
        self._kv_seconds = model.kv_bytes_per_token / self._bandwidth
        self._linear_seconds: dict[int, float] = {}  # by tokens

    def step(self, chunks: Sequence[tuple[int, int]], num_decodes: int, decode_tokens: int, num_rows: int) -> StepCost:
        """`chunks`: (tokens computed, tokens before them) of each prompt; `num_decodes` requests of one token
        that read `decode_tokens` tokens of KV together; `num_rows` rows that give a token."""
        num_tokens = num_decodes + sum(count for count, _ in chunks)
        prefill = 0.0
        for count, before in chunks:
            pairs = count * before + count * (count + 1) / 2
            passes = -(-count // self.ROWS_PER_TILE) * self.L2_MISSES
            prefill += max(pairs * self._pair_seconds, (before + count) * passes * self._kv_seconds)
        return StepCost(
            linear=self.linear_seconds(num_tokens),
            prefill_attention=prefill,
            decode_attention=decode_tokens * self._kv_seconds,
            head=self._product(self.model.hidden_size, self.model.vocab_size, num_rows, 2.0) if num_rows else 0.0,
            launch=self._launch,
        )

    def linear_seconds(self, num_tokens: int) -> float:
        """All matrix products of the layers. Tensor cores work on tiles: 257 tokens cost as much as 384."""
        seconds = self._linear_seconds.get(num_tokens)
        if seconds is None:
            tile = 128 if num_tokens > 64 else 16
            rows = -(-num_tokens // tile) * tile
            weight = self.model.weight_bits / 8
            layer = sum(self._product(inputs, outputs, rows, weight) for inputs, outputs in self.model.linears)
            seconds = self._linear_seconds[num_tokens] = layer * self.model.num_layers
        return seconds

    def _product(self, inputs: int, outputs: int, rows: int, weight_bytes: float) -> float:
        flops = 2.0 * inputs * outputs * rows
        num_bytes = inputs * outputs * weight_bytes + 2.0 * rows * (inputs + outputs)
        return max(flops / self._linear_rate, num_bytes / self._bandwidth)
