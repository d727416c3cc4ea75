# SPDX-License-Identifier: Apache-2.0
"""AttentionPlan through its binding: the same properties as in tests/cpp, found by hypothesis, and its views."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve._native import AttentionPlan, prefix_groups

ITEM_FIELDS = (
    *("row_begin", "num_rows", "kv_begin", "kv_end", "position", "request", "slot", "num_parts"),
    *("merge_begin", "num_merges"),
)


def plan_items(plan: AttentionPlan) -> list[dict[str, int]]:
    return [dict(zip(ITEM_FIELDS, row, strict=True)) for row in plan.items.tolist()]


# (choices that lead down the tree of shared blocks, further tokens, query rows)
requests = st.lists(
    st.tuples(st.lists(st.integers(0, 1), max_size=4), st.integers(0, 60), st.integers(0, 40)), max_size=7
)


def shared_tables(
    requests: list[tuple[list[int], int, int]], blocks_per_choice: int, block_size: int
) -> tuple[np.ndarray, list[int], list[int], list[int]]:
    """Block tables of requests that share a block exactly if all their choices up to it are the same; how many of
    its blocks each may share, its rows, its length."""
    blocks: dict[tuple[int, ...], int] = {}
    tables, rows, lengths = [], [], []
    for index, (choices, more, num_rows) in enumerate(requests):
        before = len(choices) * blocks_per_choice * block_size + more
        rows.append(num_rows)
        lengths.append(before + num_rows)
        path: list[int] = []
        table = []
        for block in range(-(-lengths[-1] // block_size)):
            shared = block < len(choices) * blocks_per_choice
            path.append(choices[block // blocks_per_choice] if shared else 2 + index)
            table.append(blocks.setdefault(tuple(path), len(blocks)))
        tables.append(table)
    array = np.full((len(tables), max(map(len, tables), default=0)), -1, np.int32)
    for row, table in zip(array, tables, strict=True):
        row[: len(table)] = table
    return array, [(n - r) // block_size for n, r in zip(lengths, rows, strict=True)], rows, lengths


@settings(max_examples=150, deadline=None)
@given(
    requests=requests,
    block_size=st.sampled_from([1, 4, 16]),
    blocks_per_span=st.integers(1, 5),
    window=st.sampled_from([0, 1, 2, 17, 100]),
    group_size=st.integers(1, 9),
    rows_per_item=st.integers(1, 64),
    num_workers=st.integers(1, 64),
    rows_per_shared_item=st.integers(1, 200),
    rows_per_warp=st.sampled_from([0, 1, 16]),
    tokens_per_partial=st.integers(0, 4),
    fold_levels=st.integers(0, 3),
    blocks_per_choice=st.integers(1, 12),
)
def test_every_visible_pair_once_and_each_partial_in_order(
    requests: list[tuple[list[int], int, int]],
    block_size: int,
    blocks_per_span: int,
    window: int,
    group_size: int,
    rows_per_item: int,
    num_workers: int,
    rows_per_shared_item: int,
    rows_per_warp: int,
    tokens_per_partial: int,
    fold_levels: int,
    blocks_per_choice: int,
) -> None:
    span = block_size * blocks_per_span
    tables, num_shareable, rows_of, lengths = shared_tables(requests, blocks_per_choice, block_size)
    order, groups = prefix_groups(tables, num_shareable, block_size=block_size)
    assert sorted(order.tolist()) == list(range(len(requests)))
    tables = tables[order]
    query_start = np.cumsum([0] + [rows_of[b] for b in order]).tolist()
    seq_lens = [lengths[b] for b in order]
    row_request = [b for b in range(len(order)) for _ in range(rows_of[order[b]])]
    plan = AttentionPlan(
        query_start,
        seq_lens,
        block_size=block_size,
        span=span,
        group_size=group_size,
        num_kv_heads=2,
        window=window,
        num_workers=num_workers,
        rows_per_item=rows_per_item,
        rows_per_shared_item=rows_per_shared_item,
        rows_per_warp=rows_per_warp,
        tokens_per_partial=tokens_per_partial,
        fold_levels=fold_levels,
        groups=groups,
    )
    for_warp = [item["num_rows"] * group_size <= rows_per_warp for item in plan_items(plan)]
    assert for_warp == sorted(for_warp)  # the others come first
    for item, alone in zip(plan_items(plan), for_warp, strict=True):
        assert not alone or item["num_parts"] in (0, -(-item["kv_end"] // span) - item["kv_begin"] // span)
        assert not alone or item["num_parts"] > 0 or item["kv_end"] - 1 < (item["kv_begin"] // span + 1) * span
    reads = np.zeros((query_start[-1], max(seq_lens, default=0)), dtype=np.int64)
    seen = np.zeros_like(reads)
    for row, b in enumerate(row_request):
        last = seq_lens[b] - query_start[b + 1] + row
        seen[row, max(0, last - window + 1) if window else 0 : last + 1] = 1

    slots: dict[int, tuple[int, int, int]] = {}  # slot -> row, KV range
    outputs = [0] * query_start[-1]
    for item in plan_items(plan):
        first_span = item["kv_begin"] // span
        edges = [item["kv_begin"], *range((first_span + 1) * span, item["kv_end"], span), item["kv_end"]]
        if item["num_parts"] == 1:
            edges = [item["kv_begin"], item["kv_end"]]
        for i in range(item["num_rows"]):
            row = item["row_begin"] + i
            visible_end = item["position"] + i + 1
            visible_begin = max(0, visible_end - window) if window else 0
            # The item's KV is the row's own: the same blocks.
            used = slice(item["kv_begin"] // block_size, -(-min(item["kv_end"], visible_end) // block_size))
            assert (tables[item["request"], used] == tables[row_request[row], used]).all()
            reads[row, max(item["kv_begin"], visible_begin) : max(0, min(item["kv_end"], visible_end))] += 1
            if item["num_parts"] == 0:
                outputs[row] += 1
                continue
            assert len(edges) == item["num_parts"] + 1
            for part in range(item["num_parts"]):
                slot = item["slot"] + part * item["num_rows"] + i
                assert slot not in slots
                slots[slot] = (row, edges[part], edges[part + 1])
    np.testing.assert_array_equal(reads, seen)
    assert sorted(slots) == list(range(plan.num_slots))

    read_slots = []
    for index, (row_begin, num_rows, parts_begin, parts_end, num_items) in enumerate(plan.merges.tolist()):
        assert num_items == sum(
            item["merge_begin"] <= index < item["merge_begin"] + item["num_merges"] for item in plan_items(plan)
        )
        for i in range(num_rows):
            mine = [part % 2**28 + i for part in plan.parts[parts_begin:parts_end].tolist()]
            read_slots += mine
            outputs[row_begin + i] += 1
            for left, right in itertools.pairwise(mine):
                assert slots[left][0] == slots[right][0] == row_begin + i
                assert slots[left][2] == slots[right][1]
                assert slots[right][1] % span == 0
                assert slots[right][2] - slots[right][1] <= 2**fold_levels * span
    assert sorted(read_slots) == sorted(slots)
    assert outputs == [1] * query_start[-1]


def options(**changes: int) -> dict[str, int]:
    return {"block_size": 16, "span": 64, "group_size": 1, "num_kv_heads": 1, **changes}


def test_sharing_reads_each_prefix_once() -> None:
    lengths, groups = [1024 + 64] * 64, [[0, 1024, 0, 64]]
    shared = AttentionPlan(list(range(65)), lengths, **options(span=256), groups=groups)
    unshared = AttentionPlan(list(range(65)), lengths, **options(span=256))
    assert (shared.num_tokens_read, unshared.num_tokens_read) == (1024 + 64 * 64, 64 * 1088)
    assert (shared.num_tokens_spared, unshared.num_tokens_spared) == (63 * 1024, 0)
    assert shared.num_shared_items > 0
    assert unshared.num_shared_items == 0


def test_prefix_groups_refuses_with_what_was_given() -> None:
    with pytest.raises(ValueError, match="request 1 may share 3 blocks; its table has 2"):
        prefix_groups(np.zeros((2, 2), np.int32), [1, 3], block_size=16)
    with pytest.raises(ValueError, match=r"block_tables must be \[requests, blocks\]"):
        prefix_groups(np.zeros(4, np.int32), [1, 1], block_size=16)


def test_views_keep_the_plan_alive() -> None:
    items = AttentionPlan([0, 1, 4], [100, 50], **options()).items
    gc.collect()
    assert items.dtype == np.int32
    assert items.flags.c_contiguous
    assert set(items[:, 5].tolist()) == {0, 1}


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_takes_any_integer_arrays(dtype: type) -> None:
    plan = AttentionPlan(np.array([0, 2], dtype=dtype), np.array([9], dtype=dtype), **options())
    assert plan.items.tolist() == [[0, 2, 0, 9, 7, 0, -1, 0, 0, 0]]
    assert plan.merges.shape == (0, 5)
    assert plan.parts.shape == (0,)


@pytest.mark.parametrize(
    ("query_start", "seq_lens", "changes", "message"),
    [
        ([0.0, 1.5], [3], {}, "query_start must hold integers"),
        ([[0, 1]], [3], {}, "query_start must be a sequence of integers"),
        ([0, 1], [2**40], {}, r"seq_lens\[0\] is 1099511627776; must fit 32 bits"),
        ([0, 1], [3], {"span": 40}, "span is 40; must be a multiple of the block size 16"),
        ([0, 1], [3], {"rows_per_warp": -1}, "rows_per_warp is -1; must not be negative"),
        ([0, 1], [3], {"fold_levels": 5}, "fold_levels is 5; must be from 0 to 4"),
        ([0, 4], [3], {}, "request 0 has 4 query rows and only 3 tokens"),
        ([], [], {}, "must have one more"),
        ([0, 1], [3], {"groups": [[0, 16, 0]]}, "groups must be rows of 4 integers"),
        ([0, 1], [3], {"groups": [[0, 16, 0, 1]]}, "request 0 shares 16 tokens in groups"),
    ],
)
def test_refuses_with_what_was_given(
    query_start: object, seq_lens: object, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionPlan(query_start, seq_lens, **options(**changes))
