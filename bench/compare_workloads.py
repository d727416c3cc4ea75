# SPDX-License-Identifier: Apache-2.0
"""What compare.py measures, and what this machine would allow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastserve.bench.offline import cut_prompts
from fastserve.engine.huge_pages import HugePages


@dataclass(frozen=True)
class Workload:
    num: int
    length: int  # own tokens of a prompt
    num_output: int
    figure: str  # decode, prefill (tokens/s) or total (seconds)
    num_shared: int = 0
    warm: bool = False  # the prompts of the run before, once more
    neighbour: bool = False  # beside a process that always wants a core

    @property
    def unit(self) -> str:
        return "s" if self.figure == "total" else "tok/s"


WORKLOADS = {
    "single": Workload(1, 128, 128, "decode"),
    "prefill512": Workload(1, 512, 1, "prefill"),
    "prefill2048": Workload(1, 2048, 1, "prefill"),
    "batch8": Workload(8, 128, 128, "decode"),
    "batch32": Workload(32, 128, 128, "decode"),
    "batch64": Workload(64, 128, 128, "decode"),
    "neighbour": Workload(8, 128, 128, "total", neighbour=True),
    "shared_cold": Workload(64, 32, 64, "total", num_shared=1024),
    "shared_warm": Workload(64, 32, 64, "total", num_shared=1024, warm=True),
}
PLACE = 67 * 128 + 1  # apart in the text: no two runs have prompts that begin alike, so no cache helps


def prompts_of(name: str, turn: int, ids: list[int], *, other: bool = False) -> list[list[int]]:
    """The prompts of a run; `other`: as many that share nothing with them."""
    w = WORKLOADS[name]
    place = 2 * (list(WORKLOADS).index(name) - w.warm + len(WORKLOADS) * turn) + other
    return cut_prompts(ids, w.num, w.length, w.num_shared, offset=(1 + place) * PLACE)


# --- the machine ---


def machine_rates(threads: int) -> dict[str, float]:
    """Now: bytes/s of a plain read (huge pages), operations/s of torch's best bfloat16 and int8 products."""
    torch.set_num_threads(threads)
    memory = HugePages().empty((2**27,), torch.float32).fill_(1)
    bf16 = torch.randn(2048, 2048).bfloat16()
    int8 = torch.randint(-127, 127, (2048, 2048), dtype=torch.int8)
    flops = 2 * 2048**3
    return {
        "read_bytes_per_s": memory.numel() * 4 / _best(memory.sum, 8),
        "bf16_flops_per_s": flops / _best(lambda: bf16 @ bf16, 8),
        "int8_ops_per_s": flops / _best(lambda: torch._int_mm(int8, int8), 8),
    }


def _best(work: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


@dataclass(frozen=True)
class Mode:
    """How an engine that only waits for memory or multipliers would hold the model: bytes a weight, and whose rate."""

    block_bytes: float  # of a weight of the layers
    head_bytes: float
    rate: str  # of machine_rates, for products with weights; attention is bfloat16


MODES = {
    "bf16": Mode(2, 2, "bf16_flops_per_s"),
    "int8": Mode(8.5 / 8, 8.5 / 8, "int8_ops_per_s"),
    "int4": Mode(5 / 8, 8.5 / 8, "int8_ops_per_s"),
}


@dataclass(frozen=True)
class Shape:
    """What a step costs, from a model's config.json: weights of the layers and of the head, bytes of keys and values
    of a token in bfloat16, operations of attention for a pair of query and key."""

    blocks: int
    head: int
    kv_bytes: int
    attention: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        h, m, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        dim = config.get("head_dim") or h // heads
        blocks = layers * (h * dim * (2 * heads + 2 * kv_heads) + 3 * h * m)
        return cls(blocks, h * config["vocab_size"], layers * 2 * kv_heads * dim * 2, layers * 4 * heads * dim)

    def weight_bytes(self, mode: Mode) -> float:
        return mode.block_bytes * self.blocks + mode.head_bytes * self.head


def demand_of(name: str, shape: Shape, mode: Mode) -> tuple[float, float] | None:
    """(operations, bytes) a token of decoding or prefill; None for workloads of both."""
    w = WORKLOADS[name]
    if w.figure == "decode":
        context = w.length + w.num_output / 2
        operations = 2 * (shape.blocks + shape.head) + shape.attention * context
        return operations, shape.weight_bytes(mode) / w.num + shape.kv_bytes * context
    if w.figure == "prefill":
        return 2 * shape.blocks + shape.attention * w.length / 2, shape.weight_bytes(mode) / w.length
    return None


def floor_of(name: str, shape: Shape, mode: Mode, rates: dict[str, float]) -> float:
    """The workload's figure at the limit of the machine, with a bfloat16 cache, a shared prefix read once for all."""
    w = WORKLOADS[name]
    read, product, attention_rate = rates["read_bytes_per_s"], rates[mode.rate], rates["bf16_flops_per_s"]

    def step(num: int, context: int, shared: int) -> float:
        read_s = (shape.weight_bytes(mode) + shape.kv_bytes * (shared + num * (context - shared))) / read
        products = 2 * (shape.blocks + shape.head) / product
        return max(read_s, num * (products + shape.attention * context / attention_rate))

    def prefill(tokens: int, context: float) -> float:
        return tokens * (2 * shape.blocks / product + shape.attention * context / attention_rate)

    middle = w.num_shared + w.length + w.num_output // 2
    if w.figure == "decode":
        return w.num / step(w.num, middle, 0)
    if w.figure == "prefill":
        return w.length / prefill(w.length, w.length / 2)
    begin = 0.0 if w.warm else prefill(w.num_shared, w.num_shared / 2)
    begin += 0.0 if w.warm else w.num * prefill(w.length, w.num_shared + w.length / 2)
    return begin + w.num_output * step(w.num, middle, w.num_shared)
