# SPDX-License-Identifier: Apache-2.0
"""Attention on a GPU: our kernel beside its roofline, torch and, where installed, FlashInfer and FlashAttention.

Part of `make gpu-report`. Heads and widths of Llama 3 8B: 32 query heads, 8 KV heads, 128 wide, float16, blocks of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_w4a16 import measured_limits, median_seconds

from fastserve import _native
from fastserve._native import AttentionPlan
from fastserve.engine.device import CudaDevice

HEADS, KV_HEADS, WIDTH, BLOCK, SPAN = 32, 8, 128, 16, 512
SCALE = WIDTH**-0.5


@dataclass(frozen=True)
class Workload:
    name: str
    query_lens: list[int]
    seq_lens: list[int]


WORKLOADS = [
    Workload("decode 64 x 4096", [1] * 64, [4096] * 64),
    Workload("decode 1 x 16384", [1], [16384]),
    Workload("chunk 512 on 8192", [512], [8192]),
    Workload("chunk 512 on 8192 + 32 decodes x 2048", [512] + [1] * 32, [8192] + [2048] * 32),
]


@dataclass
class Inputs:
    q: torch.Tensor  # [rows, heads, width]
    cache: torch.Tensor  # [blocks, 2, kv heads, 16, width]
    tables: torch.Tensor  # [requests, blocks of the longest]
    starts: list[int]

    @staticmethod
    def of(work: Workload) -> Inputs:
        starts = [sum(work.query_lens[:i]) for i in range(len(work.query_lens) + 1)]
        longest = max(-(-length // BLOCK) for length in work.seq_lens)
        num_blocks = len(work.seq_lens) * longest
        tables = torch.randperm(num_blocks).int().view(len(work.seq_lens), longest).cuda()
        cache = torch.randn(num_blocks, 2, KV_HEADS, BLOCK, WIDTH, dtype=torch.float16, device="cuda")
        return Inputs(torch.randn(starts[-1], HEADS, WIDTH, dtype=torch.float16, device="cuda"), cache, tables, starts)


def our_call(work: Workload, inputs: Inputs) -> Callable[[], None]:
    num_blocks = 2 * _native.cuda_devices()[0]["multiprocessors"]
    plan = AttentionPlan(
        inputs.starts,
        work.seq_lens,
        block_size=BLOCK,
        span=SPAN,
        group_size=HEADS // KV_HEADS,
        num_kv_heads=KV_HEADS,
        window=0,
        num_workers=num_blocks,
        rows_per_item=128,
        rows_per_shared_item=128,
        rows_per_warp=16,
        rows_per_token_read=64,
        fold_levels=CudaDevice.attention_fold_levels,
    )
    there = [torch.from_numpy(part.copy()).cuda() for part in (plan.items, plan.merges, plan.parts)]
    levels = CudaDevice.attention_fold_levels + 1
    parked = num_blocks * levels * 128 * 4 * 2 * (WIDTH // 8 + 1)  # csrc/cuda/attention_rows.cuh
    workspace = torch.empty(parked + plan.workspace_floats(HEADS, WIDTH), device="cuda")
    arguments: dict[str, Any] = dict(zip(("items", "merges", "parts"), there, strict=True))
    arguments |= {"out": torch.empty_like(inputs.q), "q": inputs.q, "kv_cache": inputs.cache}
    arguments |= {"block_tables": inputs.tables, "workspace": workspace, "scale": SCALE, "span": SPAN, "window": 0}
    names = [arg["name"] for row in _native.op_table() if row["op"] == "attention" for arg in row["args"]]
    if "counters" in names:
        arguments["counters"] = torch.zeros(2 + len(plan.merges) * KV_HEADS, dtype=torch.int32, device="cuda")
    return lambda: _native.ops.attention(**arguments)


def torch_call(work: Workload, inputs: Inputs) -> Callable[[], None]:
    """One call per request, on keys and values that are contiguous already: torch has no paged cache."""
    tasks = []
    for i, length in enumerate(work.seq_lens):
        blocks = inputs.tables[i, : -(-length // BLOCK)].long()
        k, v = (
            inputs.cache[blocks, part].transpose(0, 1).reshape(1, KV_HEADS, -1, WIDTH)[:, :, :length] for part in (0, 1)
        )
        q = inputs.q[inputs.starts[i] : inputs.starts[i + 1]].transpose(0, 1)[None]
        rows = torch.arange(q.shape[2], device="cuda")[:, None] + length - q.shape[2]
        tasks.append((q, k, v, torch.arange(length, device="cuda") <= rows))

    def call() -> None:
        for q, k, v, mask in tasks:
            torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return call


def flashinfer_call(work: Workload, inputs: Inputs) -> Callable[[], None]:
    import flashinfer

    pages = [-(-length // BLOCK) for length in work.seq_lens]
    first = torch.tensor([sum(pages[:i]) for i in range(len(pages) + 1)], dtype=torch.int32, device="cuda")
    ids = torch.cat([inputs.tables[i, :count] for i, count in enumerate(pages)])
    last = torch.tensor([(n - 1) % BLOCK + 1 for n in work.seq_lens], dtype=torch.int32, device="cuda")
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    starts = torch.tensor(inputs.starts, dtype=torch.int32, device="cuda")
    wrapper.plan(starts, first, ids, last, HEADS, KV_HEADS, WIDTH, BLOCK, causal=True, q_data_type=torch.float16)
    return lambda: wrapper.run(inputs.q, inputs.cache)


def flash_attention_call(work: Workload, inputs: Inputs) -> Callable[[], None]:
    from flash_attn import flash_attn_varlen_func

    # Its pages hold multiples of 256 tokens: keys and values are given contiguous.
    def contiguous(part: int) -> torch.Tensor:
        return torch.cat(
            [
                inputs.cache[inputs.tables[i, : -(-n // BLOCK)].long(), part]
                .transpose(1, 2)
                .reshape(-1, KV_HEADS, WIDTH)[:n]
                for i, n in enumerate(work.seq_lens)
            ]
        )

    k, v = contiguous(0), contiguous(1)
    starts = torch.tensor(inputs.starts, dtype=torch.int32, device="cuda")
    ends = torch.tensor([sum(work.seq_lens[:i]) for i in range(len(work.seq_lens) + 1)], dtype=torch.int32).cuda()
    longest = max(work.query_lens), max(work.seq_lens)
    return lambda: flash_attn_varlen_func(inputs.q, k, v, starts, ends, *longest, causal=True)


OTHERS = {"torch": torch_call, "flashinfer": flashinfer_call, "flash_attention": flash_attention_call}


def run() -> list[dict[str, Any]]:
    limits = measured_limits()
    results = []
    for work in WORKLOADS:
        inputs = Inputs.of(work)
        visible = [rows * n - rows * (rows - 1) // 2 for rows, n in zip(work.query_lens, work.seq_lens, strict=True)]
        kv_bytes = sum(work.seq_lens) * 2 * KV_HEADS * WIDTH * 2 + 2 * inputs.q.numel() * 2
        flops = 4 * sum(visible) * HEADS * WIDTH
        roofline = max(kv_bytes / limits["copy_GB_per_s"] / 1e9, flops / limits["product_TFLOP_per_s"] / 1e12)
        seconds = median_seconds([our_call(work, inputs)])
        row: dict[str, Any] = {"workload": work.name, "us": seconds * 1e6, "of_roofline": roofline / seconds}
        for name, make in OTHERS.items():
            try:
                row[f"{name}_us"] = median_seconds([make(work, inputs)]) * 1e6
            except ImportError as error:
                row[f"{name}_us"] = f"not installed: {error}"
            except Exception as error:  # interfaces change between versions; the report says what went wrong
                row[f"{name}_us"] = f"{type(error).__name__}: {error}"
        results.append(row)
    return results
