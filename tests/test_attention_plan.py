# SPDX-License-Identifier: Apache-2.0
"""AttentionPlan through its binding: the same properties as in tests/cpp, found by hypothesis, and its views."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve._native import AttentionPlan

ITEM_FIELDS = (
    *("row_begin", "num_rows", "kv_begin", "kv_end", "position", "request", "slot", "num_parts"),
    *("merge_begin", "num_merges"),
)


def plan_items(plan: AttentionPlan) -> list[dict[str, int]]:
    return [dict(zip(ITEM_FIELDS, row, strict=True)) for row in plan.items.tolist()]


requests = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 150)), max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    requests=requests,
    block_size=st.sampled_from([1, 4, 16]),
    blocks_per_span=st.integers(1, 5),
    window=st.sampled_from([0, 1, 2, 17, 100]),
    group_size=st.integers(1, 9),
    rows_per_item=st.integers(1, 64),
    num_workers=st.integers(1, 64),
)
def test_every_visible_pair_once_and_each_partial_in_order(
    requests: list[tuple[int, int]],
    block_size: int,
    blocks_per_span: int,
    window: int,
    group_size: int,
    rows_per_item: int,
    num_workers: int,
) -> None:
    span = block_size * blocks_per_span
    query_start = np.cumsum([0] + [rows for rows, _ in requests]).tolist()
    seq_lens = [rows + before for rows, before in requests]
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
    )
    reads = np.zeros((query_start[-1], max(seq_lens, default=0)), dtype=np.int64)
    seen = np.zeros_like(reads)
    for b, (rows, before) in enumerate(requests):
        for i in range(rows):
            seen[query_start[b] + i, max(0, before + i - window + 1) if window else 0 : before + i + 1] = 1

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
            mine = [slot + i for slot in plan.parts[parts_begin:parts_end].tolist()]
            read_slots += mine
            outputs[row_begin + i] += 1
            for left, right in itertools.pairwise(mine):
                assert slots[left][0] == slots[right][0] == row_begin + i
                assert slots[left][2] == slots[right][1]
                assert slots[right][1] % span == 0
                assert slots[right][2] - slots[right][1] <= span
    assert sorted(read_slots) == sorted(slots)
    assert outputs == [1] * query_start[-1]


def options(**changes: int) -> dict[str, int]:
    return {"block_size": 16, "span": 64, "group_size": 1, "num_kv_heads": 1, **changes}


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
        ([0, 4], [3], {}, "request 0 has 4 query rows and only 3 tokens"),
        ([], [], {}, "must have one more"),
    ],
)
def test_refuses_with_what_was_given(
    query_start: object, seq_lens: object, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionPlan(query_start, seq_lens, **options(**changes))
