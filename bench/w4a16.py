# SPDX-License-Identifier: Apache-2.0
"""int4 weights on this machine's processor: `linear_int4` beside `linear` in bf16 and torch's int8 product.

    python bench/w4a16.py                                  the demo model's layers
    python bench/w4a16.py --model 8b --tokens 1,8,512      an 8B model's; 70b: a 70B model's
    python bench/w4a16.py --form symmetric --group-size 128 --activation-bits 16 --threads 1

One line per layer shape and number of tokens, medians. Few tokens are bound by memory: GB/s of packed weights, which
rotate over 600 MB, beside a plain read (torch's sum of 512 MB). Many are bound by multiplications: GOP/s beside torch's
int8 product of the same shape, which has neither groups nor scales, and `linear` with bf16 weights. All are measured
right after one another. ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 keeps torch from using AMX.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Callable, Iterator

import torch
from ops import sample, size_of

from fastserve import _native

ROTATE_BYTES = 600 << 20
# (N, K): qkv, attention output, gate and up, down
SHAPES = {
    "demo": [(960, 576), (576, 576), (3072, 576), (576, 1536)],
    "8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
}
FORMS = ("symmetric", "zero_points", "minimums")


def median(call: Callable[[], object], seconds: float) -> float:
    return statistics.median(sample(call, seconds))


def copies(tensor: torch.Tensor, rotate: bool) -> Iterator[torch.Tensor]:
    """The weight again and again, from memory as in a model of many layers or from the cache."""
    more = ROTATE_BYTES // size_of(tensor) if rotate else 0
    return itertools.cycle([tensor, *(tensor.clone() for _ in range(more))])


def int4_seconds(rows: int, depth: int, x: torch.Tensor, arguments: argparse.Namespace) -> tuple[float, int]:
    """Seconds of a call, and the bytes of the packed weight."""
    group_size, form, bits = arguments.group_size, FORMS.index(arguments.form), arguments.activation_bits
    tokens, out = x.shape[0], torch.empty(x.shape[0], rows)
    packed = torch.zeros(_native.packed_int4_shape(rows, depth, group_size, form), dtype=torch.uint8)
    workspace = torch.empty(_native.quantized_workspace_bytes(tokens, depth, bits), dtype=torch.uint8)
    weights = copies(packed, tokens < 8)

    def call() -> None:
        _native.ops.linear_int4(out, x, next(weights), None, None, workspace, group_size, form, bits)

    return median(call, arguments.seconds), size_of(packed)


def bf16_seconds(rows: int, depth: int, x: torch.Tensor, seconds: float) -> float:
    tokens, out = x.shape[0], torch.empty(x.shape[0], rows)
    packed = torch.zeros(_native.packed_linear_shape(rows, depth), dtype=torch.bfloat16)
    workspace = torch.empty(_native.linear_workspace_bytes(tokens, depth, "bfloat16"), dtype=torch.uint8)
    weights = copies(packed, tokens < 8)
    return median(lambda: _native.ops.linear(out, x, next(weights), None, workspace), seconds)


def torch_seconds(rows: int, depth: int, tokens: int, seconds: float) -> float:
    x = torch.randint(-127, 128, (tokens, depth), dtype=torch.int8)
    weights = copies(torch.randint(-127, 128, (rows, depth), dtype=torch.int8), tokens < 8)
    return median(lambda: torch._int_mm(x, next(weights).T), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="demo")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,512", help="numbers of rows")
    parser.add_argument("--form", choices=FORMS, default="minimums")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--activation-bits", type=int, choices=(8, 12, 16), default=8)
    parser.add_argument("--threads", type=int, default=_native.num_physical_cores())
    parser.add_argument("--isa", choices=_native.isas(), default=_native.isa())
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each measurement")
    arguments = parser.parse_args()
    _native.set_num_threads(arguments.threads)
    _native.set_isa(arguments.isa)
    torch.set_num_threads(arguments.threads)
    memory = torch.zeros(128 << 20)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "its own choice")
    print(f"{arguments.isa}, {arguments.threads} threads, {arguments.form}, groups of {arguments.group_size}, ", end="")
    print(f"{arguments.activation_bits}-bit activations; torch's int8 on {limit}")
    for rows, depth in SHAPES[arguments.model]:
        for tokens in map(int, arguments.tokens.split(",")):
            x = torch.randn(tokens, depth)
            read_rate = size_of(memory) / median(memory.sum, 0.0)
            seconds, num_bytes = int4_seconds(rows, depth, x, arguments)
            bf16, int8 = (
                bf16_seconds(rows, depth, x, arguments.seconds),
                torch_seconds(rows, depth, tokens, arguments.seconds),
            )
            share = 100 * num_bytes / seconds / read_rate
            print(
                f"{rows:6} x {depth:<6} m={tokens:<4} {seconds * 1e6:9.1f} us | {num_bytes / seconds / 1e9:6.1f} GB/s, "
                f"{share:4.0f} % of {read_rate / 1e9:.1f} | {2 * tokens * rows * depth / seconds / 1e9:6.0f} GOP/s | "
                f"{bf16 / seconds:5.2f} x bf16 | {int8 / seconds:5.2f} x torch int8",
                flush=True,
            )


if __name__ == "__main__":
    main()
