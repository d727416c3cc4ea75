# SPDX-License-Identifier: Apache-2.0
"""Microbenchmarks of the CPU ops: time, rate, and the share of what this machine can do at that moment.

    python bench/ops.py                      all ops
    python bench/ops.py linear --threads 1   ops whose name has "linear" in it, one thread
    python bench/ops.py --isa avx2 --seconds 0.5

Anchors are measured right before each shape, with as many threads: a plain read of memory (torch's sum of 256 MB)
and a large float32 matrix product (torch's, which comes within a few percent of the multiply-add peak). The last
column is the time the anchors allow, the larger of bytes / read rate and flops / product rate, over the op's own
time. With one thread its CPU time counts: on a busy machine others then take caches, memory and clock rate from
anchors and ops alike, but no time. With more threads a busy machine's figures mean little.
Weights rotate over copies of 128 MB in total, as the layers of a model do; "cached" rows use one copy.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from fastserve import _native

ops = _native.ops
ROTATE_BYTES = 128 << 20
# (N, K) of a 135M Llama model: qkv, attention output, gate and up, down, LM head.
LINEAR_SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)]
LINEAR_TOKENS = [1, 8, 32, 64, 512]
HIDDEN, INTERMEDIATE = 576, 1536


@dataclass
class Work:
    """One call of an op, and the bytes and operations that any implementation needs."""

    name: str
    call: Callable[[], None]
    bytes: int
    flops: int = 0


def size_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def sample(call: Callable[[], object], seconds: float, at_least: int = 5, at_most: int = 5000) -> list[float]:
    """Durations of single calls in seconds, after one that is not counted, sorted."""
    clock = time.thread_time if _native.num_threads() == 1 else time.perf_counter
    call()
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while len(durations) < at_least or (time.perf_counter() < end and len(durations) < at_most):
        start = clock()
        call()
        durations.append(clock() - start)
    return sorted(durations)


class Anchors:
    """What torch reaches with as many threads, measured when asked."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._memory = torch.zeros(64 << 20)
        self._matrix = torch.randn(768, 768)

    def read_rate(self) -> float:
        return size_of(self._memory) / statistics.median(sample(self._memory.sum, 0.0))

    def product_rate(self) -> float:
        size = self._matrix.shape[0]
        return 2 * size**3 / statistics.median(sample(lambda: self._matrix @ self._matrix, 0.0))


def rotated(copies: Iterator[torch.Tensor], out: torch.Tensor, x: torch.Tensor, workspace: torch.Tensor) -> None:
    ops.linear(out, x, next(copies), None, workspace)


def linear_works(shapes: list[tuple[int, int]]) -> Iterator[Work]:
    dtype = torch.bfloat16
    for rows, depth in shapes:
        packed = torch.empty(_native.packed_linear_shape(rows, depth), dtype=dtype)
        weight = torch.randn(rows, depth).to(dtype)
        yield Work(f"pack_linear {rows}x{depth}", partial(ops.pack_linear, packed, weight), 2 * size_of(packed))
        copies = itertools.cycle([packed, *(packed.clone() for _ in range(ROTATE_BYTES // size_of(packed)))])
        for tokens in LINEAR_TOKENS:
            if tokens * rows > 64 * 49152:
                continue  # no step wants logits of 512 rows
            x, out = torch.randn(tokens, depth), torch.empty(tokens, rows)
            workspace = torch.empty(_native.linear_workspace_bytes(tokens, depth, dtype), dtype=torch.uint8)
            yield Work(
                f"linear bf16 m={tokens} {rows}x{depth}",
                partial(rotated, copies, out, x, workspace),
                size_of(packed) + size_of(x) + size_of(out),
                2 * tokens * rows * depth,
            )
            if tokens == 1 and size_of(packed) < 4 << 20:
                yield Work(
                    f"linear bf16 m={tokens} {rows}x{depth} cached",
                    partial(ops.linear, out, x, packed, None, workspace),
                    size_of(packed) + size_of(x) + size_of(out),
                    2 * tokens * rows * depth,
                )


def row_works() -> Iterator[Work]:
    """Ops whose work is proportional to the rows."""
    table = torch.randn(49152, HIDDEN).bfloat16()
    norm = torch.randn(HIDDEN).bfloat16()
    for tokens in (1, 64, 512):
        x, out = torch.randn(tokens, HIDDEN), torch.empty(tokens, HIDDEN)
        residual = torch.randn(tokens, HIDDEN)
        ids = torch.randint(table.shape[0], (tokens,), dtype=torch.int32)
        gate_up, gated = torch.randn(tokens, 2 * INTERMEDIATE), torch.empty(tokens, INTERMEDIATE)
        row = size_of(x)
        yield Work(f"embedding T={tokens}", partial(ops.embedding, out, ids, table), row + row // 2)
        yield Work(f"rms_norm T={tokens}", partial(ops.rms_norm, out, x, None, norm, 1e-5), 2 * row)
        yield Work(
            f"rms_norm T={tokens} residual",
            partial(ops.rms_norm, out, x, residual, norm, 1e-5),
            4 * row,
        )
        yield Work(
            f"silu_mul T={tokens}",
            partial(ops.silu_mul, gated, gate_up),
            size_of(gate_up) + size_of(gated),
        )


def call_overheads() -> Iterator[Work]:
    """What the binding and the checks of an op call cost, by calls that have next to nothing to compute; and what is
    left of it when they were recorded."""
    x, out, residual, weight = (torch.zeros(1, 1) for _ in range(4))
    norm = partial(ops.rms_norm, out, x, residual, weight[0], 1e-5)
    yield Work("100 calls of 4 tensors", partial(repeat, norm), 0)

    no_rows, codes, group = torch.zeros(0, 32), torch.zeros(32, 32, dtype=torch.uint8), 32
    packed = torch.empty(_native.packed_int4_shape(32, 32, group, 0), dtype=torch.uint8)
    ops.pack_int4(packed, codes, torch.ones(32, 1).half(), None, None, group)
    bias, order = torch.zeros(32), torch.arange(32, dtype=torch.int32)
    workspace = torch.zeros(_native.quantized_workspace_bytes(1, 32, 8), dtype=torch.uint8)
    linear = partial(ops.linear_int4, no_rows, no_rows, packed, bias, order, workspace, group, 0, 8)
    yield Work("100 calls of 6 tensors", partial(repeat, linear), 0)

    arrays = _native.StepArrays(
        [0], block_size=16, span=128, group_size=1, num_kv_heads=1, rows_per_item=48, rows_per_shared_item=384,
        rows_per_warp=0, rows_per_token_read=4, fold_levels=0, max_decodes=0, fixed_shapes=False,
    )  # fmt: skip
    replayed = _native.Recording(arrays)
    with replayed:
        repeat(linear)
    yield Work("100 recorded calls of 6 tensors", replayed.run, 0)


def repeat(call: Callable[[], None]) -> None:
    for _ in range(100):
        call()


def report(work: Work, anchors: Anchors, seconds: float) -> None:
    read_rate, product_rate = anchors.read_rate(), anchors.product_rate()
    durations = sample(work.call, seconds)
    median = statistics.median(durations)
    low, high = durations[len(durations) // 10], durations[-1 - len(durations) // 10]
    by_memory, by_product = work.bytes / read_rate, work.flops / product_rate
    if by_product > by_memory:
        rate, anchor = f"{work.flops / median / 1e9:7.1f} GFLOP/s", f"{product_rate / 1e9:.0f}"
    else:
        rate, anchor = f"{work.bytes / median / 1e9:7.1f} GB/s   ", f"{read_rate / 1e9:.1f}"
    share = 100 * max(by_memory, by_product) / median
    times = f"{median * 1e6:9.1f} us ({low * 1e6:.1f} - {high * 1e6:.1f})"
    print(f"{work.name:42} {times:36} | {rate} | {share:4.0f} % of {anchor}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="", help="part of the names to run")
    parser.add_argument("--threads", type=int, default=_native.num_physical_cores())
    parser.add_argument("--isa", choices=_native.isas(), default=_native.isa())
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each shape")
    args = parser.parse_args()
    _native.set_num_threads(args.threads)
    _native.set_isa(args.isa)
    anchors = Anchors(args.threads)
    print(f"{args.isa}, {args.threads} threads; median (p10 - p90) | rate | share of the anchors")
    for work in itertools.chain(call_overheads(), row_works(), linear_works(LINEAR_SHAPES)):
        if args.name in work.name:
            report(work, anchors, args.seconds)


if __name__ == "__main__":
    main()
