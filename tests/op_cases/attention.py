# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged cache against dense float64 attention, for any mix of chunks and decodes.

Slots that hold no token of any request are NaN: a kernel that lets one of them into a result is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from fastserve._native import AttentionPlan

from . import Arguments, BadCase, Expected, OpCase, empty, normal, widen_rows
from .paged_kv import cache_from, keys_and_values


@dataclass(frozen=True)
class Shape:
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    block_size: int = 32
    span: int = 128
    window: int = 0
    dtype: torch.dtype = torch.float32
    num_workers: int = 2


Groups = list[tuple[int, int, int, int]]  # kv_begin, kv_end, request_begin, request_end; see prefix_groups


def arguments_for(
    generator: torch.Generator, query_lens: list[int], seq_lens: list[int], shape: Shape, groups: Groups | None = None
) -> Arguments:
    """Random queries and cached tokens; blocks lie anywhere in the cache, three of them belong to nobody.

    Readers of a group have its tokens in the same blocks.
    """
    size = shape.block_size
    blocks_of = [-(-length // size) for length in seq_lens]
    shared = {
        (reader, index): begin
        for kv_begin, kv_end, begin, end in groups or []
        for reader in range(begin + 1, end)
        for index in range(kv_begin // size, kv_end // size)
    }
    order = torch.randperm(sum(blocks_of) - len(shared) + 3, generator=generator).tolist()
    tables = torch.full((len(seq_lens), max([1, *blocks_of])), -1, dtype=torch.int32)
    keys = torch.full((len(order), shape.kv_heads, size, shape.dim), float("nan"))
    values = keys.clone()
    for request, length in enumerate(seq_lens):
        for index in range(blocks_of[request]):
            if (request, index) in shared:
                tables[request, index] = tables[shared[request, index], index]
                continue
            block = order.pop()
            tables[request, index] = block
            used = min(size, length - index * size)
            keys[block, :, :used] = normal(generator, shape.kv_heads, used, shape.dim)
            values[block, :, :used] = normal(generator, shape.kv_heads, used, shape.dim)
    query_start = [0, *accumulate(query_lens)]
    q = normal(generator, query_start[-1], shape.heads, shape.dim, scale=2.0)
    return {
        "q": q,
        "kv_cache": cache_from(keys.to(shape.dtype), values.to(shape.dtype), shape.dtype),
        "block_tables": tables,
        **planned(query_start, seq_lens, shape, groups=groups),
    }


def planned(
    query_start: list[int],
    seq_lens: list[int],
    shape: Shape,
    rows_per_item: int = 48,
    rows_per_shared_item: int = 384,
    groups: Groups | None = None,
    rows_per_warp: int = 0,
    tokens_per_partial: int = 0,
    rows_per_token_read: int = 4,
    fold_levels: int = 0,
) -> Arguments:
    """The arguments that follow from the plan, and outputs for it."""
    plan = AttentionPlan(
        query_start,
        seq_lens,
        block_size=shape.block_size,
        span=shape.span,
        group_size=shape.heads // shape.kv_heads,
        num_kv_heads=shape.kv_heads,
        window=shape.window,
        num_workers=shape.num_workers,
        rows_per_item=rows_per_item,
        rows_per_shared_item=rows_per_shared_item,
        rows_per_warp=rows_per_warp,
        tokens_per_partial=tokens_per_partial,
        rows_per_token_read=rows_per_token_read,
        fold_levels=fold_levels,
        groups=groups,
    )
    return {
        "out": empty(query_start[-1], shape.heads, shape.dim),
        "items": torch.from_numpy(plan.items.copy()),
        "merges": torch.from_numpy(plan.merges.copy()),
        "parts": torch.from_numpy(plan.parts.copy()),
        "workspace": empty(plan.workspace_floats(shape.heads, shape.dim)),
        "counters": empty(2 + len(plan.merges) * shape.kv_heads, dtype=torch.int32),
        "scale": shape.dim**-0.5,
        "span": shape.span,
        "window": shape.window,
    }


def reference(query_lens: list[int], seq_lens: list[int], inputs: Mapping[str, Any]) -> dict[str, Expected]:
    """Each request on its own, whatever the plan says."""
    q = inputs["q"].double()
    _, heads, dim = q.shape
    keys, values = (part.double() for part in keys_and_values(inputs["kv_cache"]))
    exact = torch.full(q.shape, float("nan"), dtype=torch.float64)
    magnitude, rounded = torch.zeros_like(exact), torch.zeros_like(exact)
    group = heads // keys.shape[1]
    row_begin = 0
    for request, (num_rows, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
        blocks = inputs["block_tables"][request, : -(-length // keys.shape[2])].long()
        # [heads, length, dim]
        k, v = (
            part[blocks].transpose(0, 1).reshape(keys.shape[1], -1, dim)[:, :length].repeat_interleave(group, 0)
            for part in (keys, values)
        )
        rows = slice(row_begin, row_begin + num_rows)
        row_begin += num_rows
        if num_rows == 0:
            continue
        x = q[rows].transpose(0, 1) * inputs["scale"]
        key, last = torch.arange(length), torch.arange(length - num_rows, length)[:, None]
        hidden = key > last
        if inputs["window"]:
            hidden |= key <= last - inputs["window"]
        weights = (x @ k.transpose(1, 2)).masked_fill(hidden, float("-inf")).softmax(-1)
        exact[rows] = (weights @ v).transpose(0, 1)
        # An error e of a score changes its weight by the factor 1 + e, and the sum that divides it likewise.
        terms = (x.abs() @ k.abs().transpose(1, 2)).masked_fill(hidden, 0.0).amax(-1, keepdim=True)
        rounded[rows] = (weights @ v.abs()).transpose(0, 1)
        magnitude[rows] = rounded[rows] * (1 + 2 * terms).transpose(0, 1)
    return {"out": Expected(exact, magnitude, rounded)}


def case(
    query_lens: list[int], seq_lens: list[int], shape: Shape, strided: bool = False, groups: Groups | None = None
) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        arguments = arguments_for(generator, query_lens, seq_lens, shape, groups)
        if strided:
            arguments.update({name: widen_rows(arguments[name]) for name in ("q", "out")})
        return arguments

    parts = [
        "_".join(f"{query}of{total}" for query, total in zip(query_lens, seq_lens, strict=True)) or "empty",
        f"{shape.heads}x{shape.kv_heads}x{shape.dim}-S{shape.block_size}-span{shape.span}",
        str(shape.dtype).removeprefix("torch."),
    ]
    parts += [f"window{shape.window}"] * (shape.window > 0) + ["strided"] * strided
    parts += ["shared" + "_".join(f"{end}x{last - first}" for _, end, first, last in groups)] if groups else []
    # A row's weights, their sum and its output are chains of up to max(seq_lens) terms, scores of dim.
    length = shape.dim + max(seq_lens, default=0) + 16
    is_tiled = shape.dtype == torch.bfloat16 and shape.dim % 32 == 0
    return OpCase(
        "attention",
        "-".join(parts),
        make,
        partial(reference, query_lens, seq_lens),
        length,
        amx_operands=("q",) if is_tiled else (),
    )


CASES = [
    case(query_lens, seq_lens, Shape(heads, kv_heads, dim, block_size, span, window, dtype))
    for dtype in (torch.float32, torch.bfloat16)
    for query_lens, seq_lens, heads, kv_heads, dim, block_size, span, window in [
        # Mixed chunks and decodes over several spans; first, because every tensor of it has some extent.
        ([9, 1, 30, 1, 0], [150, 400, 30, 1, 7], 4, 2, 64, 32, 64, 0),
        ([], [], 4, 2, 64, 32, 128, 0),
        ([0], [40], 4, 2, 64, 32, 128, 0),
        ([1], [1], 1, 1, 64, 16, 16, 0),
        # One token short of a block, a block, one over it; the same around tiles and spans.
        ([1, 1, 1], [31, 32, 33], 3, 1, 64, 32, 64, 0),
        ([2, 2, 2], [63, 64, 65], 3, 3, 64, 16, 64, 0),
        ([5, 3], [130, 129], 8, 1, 64, 64, 128, 0),
        ([40], [40], 9, 3, 64, 32, 512, 0),
        # More rows of a KV head than one item holds.
        ([2], [50], 64, 1, 32, 16, 64, 0),
        # Head sizes that are no whole vectors, and the largest.
        ([3, 1], [70, 20], 4, 2, 2, 16, 32, 0),
        ([7, 1], [70, 100], 4, 2, 18, 48, 96, 0),
        ([7, 1], [70, 100], 6, 2, 80, 16, 64, 0),
        ([3, 1], [70, 90], 2, 1, 256, 16, 64, 0),
        # Blocks larger than a tile.
        ([4], [200], 2, 1, 64, 80, 160, 0),
        ([4, 1], [300, 270], 2, 1, 24, 256, 256, 0),
        # Sliding windows: one token, inside a tile, over several spans.
        ([5, 1], [40, 70], 4, 2, 64, 32, 64, 1),
        ([30, 1], [100, 101], 6, 2, 64, 16, 64, 21),
        ([20, 1], [300, 200], 4, 4, 64, 32, 64, 150),
    ]
]
# Several requests whose rows are all split among items: no tensor of the call has fewer than two rows.
CASES += [case([5, 3], [300, 290], Shape(span=64, num_workers=8))]
CASES += [case([9, 1], [50, 60], Shape(dtype=dtype), strided=True) for dtype in (torch.float32, torch.bfloat16)]


# Prefixes that requests share: one level of many decodes; two levels that end inside a span, with a chunk among the
# readers; three levels; a window that all readers' tokens fit in, and one that hides the prefix from some.
ONE_LEVEL: Groups = [(0, 192, 0, 20)]
TWO_LEVELS: Groups = [(0, 160, 0, 7), (160, 320, 0, 3), (160, 256, 3, 7)]
THREE_LEVELS: Groups = [(0, 64, 0, 8), (64, 192, 0, 5), (192, 256, 0, 3), (64, 128, 5, 8)]
CASES += [
    case(query_lens, seq_lens, Shape(heads, kv_heads, 64, 32, 64, window, dtype, workers), groups=groups)
    for dtype in (torch.float32, torch.bfloat16)
    for query_lens, seq_lens, heads, kv_heads, window, workers, groups in [
        ([1] * 20, [*range(193, 213)], 9, 3, 0, 1, ONE_LEVEL),
        ([1, 30, 1, 1, 1, 0, 2], [330, 360, 321, 257, 300, 270, 280], 4, 2, 0, 2, TWO_LEVELS),
        ([1] * 5 + [20, 1, 3], [257, 258, 300, 193, 220, 180, 129, 140], 4, 2, 0, 16, THREE_LEVELS),
        ([1] * 20, [*range(193, 213)], 4, 1, 212, 2, ONE_LEVEL),
        ([1] * 20, [*range(193, 213)], 4, 1, 200, 2, ONE_LEVEL),
    ]
]


def bad(id: str, change: Callable[[Arguments], None], message: str) -> BadCase:
    def make(generator: torch.Generator) -> Arguments:
        arguments = arguments_for(generator, [3, 1], [100, 700], Shape(num_workers=8))
        change(arguments)
        return arguments

    return BadCase("attention", id, make, message)


def field(name: str, index: int, column: int, value: int) -> Callable[[Arguments], None]:
    def change(arguments: Arguments) -> None:
        arguments[name][index, column] = value

    return change


def parts_far_away(arguments: Arguments) -> None:
    arguments["parts"][1] = 1000


def few_kv_heads(arguments: Arguments) -> None:
    arguments["q"] = torch.zeros(4, 5, 64)
    arguments["out"] = torch.zeros(4, 5, 64)


BAD_CASES = [
    bad("rows-outside", field("items", 0, 1, 100), r"items\[0\] has 100 rows from"),
    bad("rows-negative", field("items", 0, 0, -1), r"items\[0\] has 3 rows from -1; the step has 4"),
    bad("range-empty", field("items", 0, 3, 0), r"items\[0\] has KV tokens"),
    bad("position-negative", field("items", 0, 4, -1), r"items\[0\] has KV tokens .* at position -1"),
    bad("request-outside", field("items", 0, 5, 2), r"items\[0\] is of request 2; block_tables has 2"),
    bad("tokens-outside", field("items", 0, 3, 705), r"reads 705 tokens; block_tables has 22 blocks of 32"),
    bad("slot-outside", field("items", 1, 6, 99), r"from slot 99; the workspace has"),
    bad("parts-disagree", field("items", 0, 7, 9), r"stores 9 partials of .* was the plan made with span 128"),
    bad("block-missing", field("block_tables", 1, 0, -1), r"block_tables\[1\]\[0\] is -1; the cache has 29 blocks"),
    bad("block-outside", field("block_tables", 1, 21, 29), r"block_tables\[1\]\[21\] is 29; the cache has 29 blocks"),
    bad("merges-outside", field("items", 0, 9, 9), r"items\[0\] is part of 9 merges from \d+; there are"),
    bad("merge-rows", field("merges", 0, 1, 9), r"merges\[0\] has 9 rows from"),
    bad("merge-parts", field("merges", 0, 3, 99), r"merges\[0\] has parts 0 to 99 of"),
    bad("part-outside", parts_far_away, r"parts\[1\] is 1000 for"),
    bad("span", lambda arguments: arguments.update(span=100), "span is 100; must be a multiple of the block size 32"),
    bad("window", lambda arguments: arguments.update(window=-1), "window is -1; must not be negative"),
    bad("heads", few_kv_heads, "5 query heads and 2 KV heads; must be a whole multiple"),
]
