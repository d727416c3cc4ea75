# SPDX-License-Identifier: Apache-2.0
"""How long a step takes on a GPU: a roofline, summed over a step's matrix products and its attention.

Each kernel needs its arithmetic at the peak rate and its bytes at the peak bandwidth, each times an efficiency that
real kernels reach; what is the longer hides the other, the less so the closer they are. Kernels work in tiles, and a
kernel of fewer tiles than the GPU has multiprocessors leaves some idle. The constants are fitted to published
measurements; docs/simulation.md has the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastserve.simulate.hardware import Gpu, Model

TILE = 128  # rows and columns of a matrix product's tile
DECODE_TILE = 16  # rows of a tile where there are fewer than MIN_TILE_ROWS
MIN_TILE_ROWS = 64
ATTENTION_TILE = 64  # query rows that one pass over the KV of a chunk serves
L2_MISSES = 0.1  # share of the passes after the first that reach memory


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the peaks that kernels reach."""

    linear_flops: float = 0.79
    attention_flops: float = 0.7
    weight_bandwidth: float = 0.68
    kv_bandwidth: float = 0.85
    overlap: float = 5.0  # see _both
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
    def __init__(self, gpu: Gpu, model: Model, efficiency: Efficiency | None = None) -> None:
        self.gpu = gpu
        self.model = model
        self.efficiency = e = efficiency or Efficiency()
        self._linear_rate = gpu.flops * e.linear_flops
        self._weight_rate = gpu.bandwidth * e.weight_bandwidth
        self._launch = model.num_layers * e.kernels_per_layer * e.kernel_gap_s
        self._pair_seconds = 4 * model.num_layers * model.num_heads * model.head_dim / (gpu.flops * e.attention_flops)
        self._kv_seconds = model.kv_bytes_per_token / (gpu.bandwidth * e.kv_bandwidth)
        self._linear_seconds: dict[int, float] = {}  # by tokens
        self._head_seconds: dict[int, float] = {0: 0.0}  # by rows

    def step(self, chunks: Sequence[tuple[int, int]], num_decodes: int, decode_tokens: int, num_rows: int) -> StepCost:
        """`chunks`: (tokens computed, tokens before them) of each prompt; `num_decodes` requests of one token
        that read `decode_tokens` tokens of KV together; `num_rows` rows that give a token."""
        return StepCost(
            linear=self.linear_seconds(num_decodes + sum(count for count, _ in chunks)),
            prefill_attention=self.attention_seconds(chunks),
            decode_attention=decode_tokens * self._kv_seconds,
            head=self._of_head(num_rows),
            launch=self._launch,
        )

    def linear_seconds(self, num_tokens: int) -> float:
        """All matrix products of the layers."""
        seconds = self._linear_seconds.get(num_tokens)
        if seconds is None:
            weight = self.model.weight_bits / 8
            layer = sum(self._product(inputs, outputs, num_tokens, weight) for inputs, outputs in self.model.linears)
            seconds = self._linear_seconds[num_tokens] = layer * self.model.num_layers
        return seconds

    def attention_seconds(self, chunks: Sequence[tuple[int, int]]) -> float:
        """Prompt chunks, (tokens computed, tokens before them) of each, in one kernel a layer."""
        if not chunks:
            return 0.0
        pairs = kv_reads = 0.0
        num_tiles = 0
        for count, before in chunks:
            tiles = -(-count // ATTENTION_TILE)
            num_tiles += tiles
            pairs += count * before + count * (count + 1) / 2
            kv_reads += before + count + (tiles - 1) * L2_MISSES * (before + count / 2)
        idle = max(1.0, self.gpu.num_sms / (num_tiles * self.model.num_heads))
        return self._both(pairs * self._pair_seconds * idle, kv_reads * self._kv_seconds)

    def _of_head(self, num_rows: int) -> float:
        seconds = self._head_seconds.get(num_rows)
        if seconds is None:
            seconds = self._product(self.model.hidden_size, self.model.vocab_size, num_rows, 2.0)
            self._head_seconds[num_rows] = seconds
        return seconds

    def _product(self, inputs: int, outputs: int, rows: int, weight_bytes: float) -> float:
        """257 rows cost the arithmetic of 384, and one tile on one multiprocessor is the least. Kernels for few rows
        divide the inner dimension as well, and no multiprocessor is idle."""
        if rows < MIN_TILE_ROWS:
            flops = 2.0 * inputs * outputs * DECODE_TILE * -(-rows // DECODE_TILE)
        else:
            num_tiles = -(-rows // TILE) * -(-outputs // TILE)
            flops = 2.0 * inputs * TILE * TILE * max(num_tiles, self.gpu.num_sms)
        num_bytes = inputs * outputs * weight_bytes + 2.0 * rows * (inputs + outputs)
        return self._both(flops / self._linear_rate, num_bytes / self._weight_rate)

    def _both(self, arithmetic: float, memory: float) -> float:
        """The longer of two times that overlap, and nearly a sixth more (at overlap 5) where they are equal: a tile's
        first loads and its last arithmetic have nothing to hide behind."""
        power = self.efficiency.overlap
        return float((arithmetic**power + memory**power) ** (1 / power))
