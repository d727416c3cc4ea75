# SPDX-License-Identifier: Apache-2.0
"""Cases of `attention` with the CUDA layout of the KV cache, [block][K|V][kv_head][slot][dim], in 16-bit formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from fastserve.engine.device import CudaDevice
from op_cases import Arguments, BadCase, Expected, OpCase, empty, widen_rows
from op_cases.attention import Groups, Shape, arguments_for, planned, reference
from op_cases.paged_kv import cache_from, keys_and_values

FORMATS = (torch.float16, torch.bfloat16)
ROWS_PER_ITEM = 128
ROWS_PER_WARP = 16
FOLD_LEVELS = CudaDevice.attention_fold_levels


def parked_floats(dim: int) -> int:
    """What the kernel needs besides the plan's partials, on a device of 8 multiprocessors as the simulated one."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 8
    return 2 * multiprocessors * (FOLD_LEVELS + 1) * 128 * 4 * 2 * (dim // 8 + 1)


def replanned(query_start: list[int], seq_lens: list[int], shape: Shape, **options: Any) -> Arguments:
    """The arguments that follow from a plan for the CUDA kernel."""
    rows = {"rows_per_item": ROWS_PER_ITEM, "rows_per_shared_item": ROWS_PER_ITEM, "rows_per_token_read": 64}
    rows |= {"fold_levels": FOLD_LEVELS, **options}
    arguments = planned(query_start, seq_lens, shape, rows_per_warp=ROWS_PER_WARP, **rows)
    workspace = empty(len(arguments["workspace"]) + parked_floats(shape.dim))
    return {**arguments, "out": arguments["out"].to(shape.dtype), "workspace": workspace}


def cuda_arguments(
    generator: torch.Generator, query_lens: list[int], seq_lens: list[int], shape: Shape, groups: Groups | None = None
) -> Arguments:
    """As on the CPU, in the other layout: also slots that hold no token of any request are NaN."""
    arguments = arguments_for(generator, query_lens, seq_lens, replace(shape, dtype=torch.float32), groups)
    cache = torch.stack(keys_and_values(arguments["kv_cache"]), dim=1).to(shape.dtype).contiguous()
    starts = torch.tensor([0, *query_lens]).cumsum(0).tolist()
    return {
        **arguments,
        "q": arguments["q"].to(shape.dtype),
        "kv_cache": cache,
        **replanned(starts, seq_lens, shape, groups=groups),
    }


def exact(query_lens: list[int], seq_lens: list[int], inputs: Mapping[str, Any]) -> dict[str, Expected]:
    """The CPU's reference on the same numbers."""
    cache = inputs["kv_cache"].float()
    return reference(query_lens, seq_lens, {**inputs, "kv_cache": cache_from(cache[:, 0], cache[:, 1], torch.float32)})


def case(
    query_lens: list[int], seq_lens: list[int], shape: Shape, groups: Groups | None = None, strided: bool = False
) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        arguments = cuda_arguments(generator, query_lens, seq_lens, shape, groups)
        if strided:  # as views of wider rows; whole multiples of 16 bytes
            arguments.update({name: widen_rows(arguments[name], extra=24) for name in ("q", "out")})
        return arguments

    parts = [
        "_".join(f"{query}of{total}" for query, total in zip(query_lens, seq_lens, strict=True)) or "empty",
        f"{shape.heads}x{shape.kv_heads}x{shape.dim}-S{shape.block_size}-span{shape.span}",
        str(shape.dtype).removeprefix("torch."),
    ]
    parts += [f"window{shape.window}"] * (shape.window > 0) + ["strided"] * strided
    parts += ["shared" + "_".join(f"{end}x{last - first}" for _, end, first, last in groups)] if groups else []
    # Float32 sums as on the CPU, and every weight is rounded to the format once: as numerator and in the sum.
    rounding = 2 * torch.finfo(shape.dtype).eps / 2 * 2**24
    length = shape.dim + max(seq_lens, default=0) + 16 + int(rounding)
    return OpCase(
        "attention", "cuda-" + "-".join(parts), make, lambda inputs: exact(query_lens, seq_lens, inputs), length
    )


STEPS: list[tuple[list[int], list[int], int, int, int, int, int, int]] = [
    # Query lengths, sequence lengths, heads, KV heads, head size, block size, span, window.
    # Mixed chunks and decodes over several spans; a request without a row.
    ([9, 1, 30, 1, 0], [150, 400, 30, 1, 7], 4, 2, 128, 32, 64, 0),
    ([], [], 4, 2, 64, 16, 64, 0),
    ([0], [40], 4, 2, 64, 16, 64, 0),
    ([1], [1], 1, 1, 128, 16, 64, 0),
    # One token short of a group, a block, a tile and a span, as many, one over it.
    ([1, 1, 1], [15, 16, 17], 3, 1, 64, 16, 64, 0),
    ([1, 1, 1], [63, 64, 65], 8, 2, 128, 32, 128, 0),
    ([2, 2, 2], [127, 128, 129], 3, 3, 64, 64, 128, 0),
    # Chunks of more than 64 packed rows, from the start and later; rows of a token on both sides of a warp.
    ([40], [40], 9, 3, 64, 32, 256, 0),
    ([70, 33], [300, 33], 6, 1, 128, 16, 128, 0),
    # More query heads of a KV head than a block has rows, and than a warp has.
    ([2, 1], [50, 70], 71, 1, 64, 16, 64, 0),
    ([1, 1], [200, 90], 24, 1, 128, 16, 64, 0),
    # Blocks larger than a tile, and table look-ups of more than 32 blocks.
    ([4, 1], [300, 270], 2, 1, 64, 256, 256, 0),
    ([3, 1], [1200, 1100], 4, 2, 64, 16, 256, 0),
    # Sliding windows: one token, inside a tile, over several spans, and one that begins in a later tile.
    ([5, 1], [40, 70], 4, 2, 64, 32, 64, 1),
    ([30, 1], [100, 101], 6, 2, 128, 16, 64, 21),
    ([20, 1], [300, 200], 4, 4, 64, 32, 64, 150),
    ([70], [400], 2, 2, 128, 16, 128, 100),
]
ATTENTION_CASES = [
    case(query_lens, seq_lens, Shape(heads, kv_heads, dim, block_size, span, window, dtype, num_workers=4))
    for dtype, steps in zip(FORMATS, (STEPS, STEPS[::4]), strict=True)
    for query_lens, seq_lens, heads, kv_heads, dim, block_size, span, window in steps
]
ATTENTION_CASES += [case([9, 1], [50, 60], Shape(dtype=dtype), strided=True) for dtype in FORMATS]

# One level with more readers than an item has rows, two that end inside a span with a chunk among the readers, three;
# a window that all readers' tokens fit in.
ONE_LEVEL: Groups = [(0, 192, 0, 20)]
TWO_LEVELS: Groups = [(0, 160, 0, 7), (160, 320, 0, 3), (160, 256, 3, 7)]
THREE_LEVELS: Groups = [(0, 64, 0, 8), (64, 192, 0, 5), (192, 256, 0, 3), (64, 128, 5, 8)]
SHARED_STEPS: list[tuple[list[int], list[int], int, int, int, int, int, Groups]] = [
    ([1] * 20, [*range(193, 213)], 4, 1, 64, 0, 1, ONE_LEVEL),
    ([1, 30, 1, 1, 1, 0, 2], [330, 360, 321, 257, 300, 270, 280], 4, 2, 128, 0, 2, TWO_LEVELS),
    ([1] * 5 + [20, 1, 3], [257, 258, 300, 193, 220, 180, 129, 140], 4, 2, 64, 0, 16, THREE_LEVELS),
    ([1] * 20, [*range(193, 213)], 4, 1, 64, 212, 2, ONE_LEVEL),
]
ATTENTION_CASES += [
    case(query_lens, seq_lens, Shape(heads, kv_heads, dim, 32, 64, window, dtype, workers), groups)
    for dtype, steps in zip(FORMATS, (SHARED_STEPS, SHARED_STEPS[1:2]), strict=True)
    for query_lens, seq_lens, heads, kv_heads, dim, window, workers, groups in steps
]


def bad(id: str, change: Callable[[Arguments], None], message: str) -> BadCase:
    def make(generator: torch.Generator) -> Arguments:
        arguments = cuda_arguments(generator, [3, 1], [100, 200], Shape(dtype=torch.float16, span=64, num_workers=8))
        change(arguments)
        return arguments

    return BadCase("attention", f"cuda-{id}", make, message)


def head_dim(dim: int) -> Callable[[Arguments], None]:
    def change(arguments: Arguments) -> None:
        arguments.update(
            q=torch.zeros(4, 4, dim).half(),
            out=torch.zeros(4, 4, dim).half(),
            kv_cache=torch.zeros(9, 2, 2, 32, dim).half(),
        )

    return change


def block_size(size: int) -> Callable[[Arguments], None]:
    return lambda arguments: arguments.update(kv_cache=torch.zeros(9, 2, 2, size, 64).half(), span=size * 64)


def misaligned(arguments: Arguments) -> None:
    arguments["q"] = widen_rows(arguments["q"], extra=4)


ATTENTION_BAD_CASES = [
    bad("head-dim", head_dim(80), "head_dim is 80; the cuda kernel takes 64 and 128"),
    bad("block-size-8", block_size(8), "the block size is 8; the cuda kernel takes powers of two from 16"),
    bad("block-size-48", block_size(48), "the block size is 48; the cuda kernel takes powers of two from 16"),
    bad("span", lambda a: a.update(span=96), "span is 96; must be a multiple of the block size 32 and.* of 64"),
    bad("window", lambda a: a.update(window=-1), "window is -1; must not be negative"),
    bad("scale", lambda a: a.update(scale=0.0), "scale is 0; must be above 0"),
    bad("alignment", misaligned, "rows of q and out, and kv_cache, must start at multiples of 16 bytes"),
    bad("no-counters", lambda a: a.pop("counters"), "the cuda kernel needs [0-9]+ counters, zeros at first; given 0"),
    bad("formats", lambda a: a.update(kv_cache=a["kv_cache"].bfloat16()), "q is float16 and kv_cache is bfloat16"),
]
