# SPDX-License-Identifier: Apache-2.0
"""A step's integers as flat arrays, against arrays written down one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve import SamplingParams, _native
from fastserve.engine.scheduler import StepItem
from fastserve.request import Request

BLOCK = 4
SPAN = 8
PLAN = {"block_size": BLOCK, "span": SPAN, "group_size": 2, "num_kv_heads": 3}
ROWS = {"rows_per_item": 8, "rows_per_shared_item": 16, "rows_per_warp": 0, "rows_per_token_read": 4, "fold_levels": 0}


def step_arrays(windows: tuple[int, ...] = (0,), max_decodes: int = 64, fixed_shapes: bool = False) -> Any:
    return _native.StepArrays(list(windows), **PLAN, **ROWS, max_decodes=max_decodes, fixed_shapes=fixed_shapes)


def read(arrays: Any, size: int) -> list[np.ndarray]:
    """Copies of the arrays, from memory in which nothing was zero before."""
    memory = torch.full((size,), -77, dtype=torch.int32)
    arrays.write(memory)
    numbers = memory.numpy()
    return [numbers[begin : begin + int(np.prod(shape))].reshape(shape).copy() for begin, shape in arrays.layout()]


def item_of(name: str, blocks: list[int], start: int, count: int, sample: bool) -> StepItem:
    tokens = [(len(name) * 31 + 7 * i) % 1000 for i in range(start + count)]
    request = Request(name, tokens, SamplingParams(), 0.0)
    request.block_ids = blocks
    return StepItem(request, start, count, sample)


@st.composite
def steps(draw: st.DrawFn, decodes: bool = False) -> tuple[StepItem, ...]:
    """Requests some of which begin with the same blocks; in each table a block occurs once."""
    trunk = list(range(1, 7))
    items = []
    for number in range(draw(st.integers(1, 9))):
        count = 1 if decodes else draw(st.integers(1, 9))
        start = draw(st.integers(0, 30))
        needed = -(-(start + count) // BLOCK) + draw(st.integers(0, 1))
        shared = draw(st.integers(0, min(start // BLOCK, len(trunk))))
        blocks = trunk[:shared] + [100 * (number + 1) + i for i in range(needed - shared)]
        items.append(item_of("r" * number, blocks, start, count, decodes or draw(st.booleans())))
    return tuple(items)


def in_order_of(rows: list[int], items: tuple[StepItem, ...]) -> list[int]:
    return sorted(range(len(items)), key=lambda i: rows[i])


def check_unpadded(arrays: Any, items: tuple[StepItem, ...], windows: tuple[int, ...]) -> None:
    kv_tokens, spared = arrays.num_kv_tokens, arrays.num_kv_tokens_spared
    _, num_rows, size, num_slots, num_merges = arrays.build(items, 2)
    token_ids, positions, slots, tables, sample_rows, *work = read(arrays, size)
    starts = arrays.row_starts
    order = in_order_of(starts, items)
    row = 0
    for place in order:  # the requests' rows follow one another without a gap
        item = items[place]
        assert starts[place] == row
        for i in range(item.num_new_tokens):
            position = item.start + i
            assert token_ids[row] == item.request.token_ids[position]
            assert positions[row] == position
            assert slots[row] == item.request.block_ids[position // BLOCK] * BLOCK + position % BLOCK
            row += 1
    assert row == len(token_ids) == len(positions) == len(slots) == num_rows
    width = max(len(item.request.block_ids) for item in items)
    assert tables.shape == (len(items), width)
    for table, place in zip(tables.tolist(), order, strict=True):
        blocks = items[place].request.block_ids
        assert table == blocks + [-1] * (width - len(blocks))
    assert sample_rows.tolist() == [
        first + item.num_new_tokens - 1 for first, item in zip(starts, items, strict=True) if item.sample
    ]
    lens = [items[place].start + items[place].num_new_tokens for place in order]
    assert arrays.num_kv_tokens - kv_tokens == sum(lens)
    # The plans are those that AttentionPlan makes of the same tables.
    given_tables = np.full((len(items), width), -1, np.int32)
    for table, item in zip(given_tables, items, strict=True):
        table[: len(item.request.block_ids)] = item.request.block_ids
    found, groups = _native.prefix_groups(given_tables, [item.start // BLOCK for item in items], block_size=BLOCK)
    assert found.tolist() == order
    query_start = np.cumsum([0, *(items[place].num_new_tokens for place in order)])
    assert len(work) == 3 * len(windows)
    plans = [
        _native.AttentionPlan(
            query_start, lens, **PLAN, **ROWS, window=window, num_workers=2, tokens_per_partial=4, groups=groups
        )
        for window in windows
    ]
    for plan, got in zip(plans, zip(work[::3], work[1::3], work[2::3], strict=True), strict=True):
        for mine, theirs in zip(got, (plan.items, plan.merges, plan.parts), strict=True):
            assert mine.tolist() == theirs.tolist()
    assert num_slots == max(plan.num_slots for plan in plans)
    assert num_merges == max(len(plan.merges) for plan in plans)
    assert arrays.num_kv_tokens_spared - spared == plans[0].num_tokens_spared


@settings(max_examples=150, deadline=None)
@given(items=steps(), windows=st.sampled_from([(0,), (0, 5)]))
def test_arrays_are_those_written_down_token_by_token(items: tuple[StepItem, ...], windows: tuple[int, ...]) -> None:
    arrays = step_arrays(windows)
    arrays.build((item_of("before", [9, 8, 7], 3, 8, True),), 2)  # leaves no trace
    check_unpadded(arrays, items, windows)


@settings(max_examples=100, deadline=None)
@given(items=steps(decodes=True))
def test_padding_adds_rows_that_nobody_reads(items: tuple[StepItem, ...]) -> None:
    plain, padded = step_arrays(), step_arrays(fixed_shapes=True)
    _, _, plain_size, *_ = plain.build(items, 2)
    _, rows, padded_size, *_ = padded.build(items, 2)
    assert padded.row_starts == plain.row_starts
    fillers = [0, 0, -1, -1, 0, 0, 0, 0]
    for small, large, filler in zip(read(plain, plain_size), read(padded, padded_size), fillers, strict=True):
        inner = tuple(slice(0, extent) for extent in small.shape)
        assert np.array_equal(large[inner], small)
        rest = large.copy()
        rest[inner] = filler
        assert (rest == filler).all()
    assert rows in (1, 2, 4, 8, 16)
    assert all(array.shape[0] == rows for array in read(padded, padded_size)[:5])


def decodes(count: int, start: int) -> tuple[StepItem, ...]:
    return tuple(
        item_of(f"{i}", list(range(100 * i, 100 * i + start // BLOCK + 1)), start, 1, True) for i in range(count)
    )


def test_which_steps_can_be_recorded() -> None:
    arrays = step_arrays(max_decodes=4)
    for items, recorded in [
        (decodes(1, 3), True),
        (decodes(4, 3), True),
        (decodes(5, 3), False),  # too many
        ((item_of("a", [1], 0, 3, True),), False),  # a chunk
        ((item_of("a", [1], 0, 1, False),), False),  # samples nothing
        ((*decodes(2, 3), item_of("a", [1], 0, 2, True)), False),
    ]:
        key, *_ = arrays.build(items, 1)
        assert (key is not None) == recorded


def test_a_recording_of_free_shapes_depends_on_the_rows_alone() -> None:
    free, fixed = step_arrays(), step_arrays(fixed_shapes=True)
    keys: dict[str, set[object]] = {"free": set(), "fixed": set()}
    for start in (1, 3, 9, 27):
        for name, arrays in (("free", free), ("fixed", fixed)):
            key, *_ = arrays.build(decodes(3, start), 2)
            keys[name].add(key)
    assert len(keys["free"]) == 1
    assert len(keys["fixed"]) > 1


def test_what_cannot_be_a_step_is_refused() -> None:
    arrays = step_arrays()
    with pytest.raises(ValueError, match="at least one request"):
        arrays.build((), 1)
    with pytest.raises(ValueError, match="its 1 blocks hold 4"):
        arrays.build((item_of("a", [5], 3, 2, True),), 1)
    item = item_of("a", [5, 6], 3, 2, True)
    with pytest.raises(ValueError, match="tokens 4 to 6 are to be computed of 5"):
        arrays.build((item._replace(start=4),), 1)
    with pytest.raises(ValueError, match="tokens -1 to 1"):
        arrays.build((item._replace(start=-1),), 1)
    with pytest.raises(ValueError, match="tokens 3 to 3"):
        arrays.build((item._replace(num_new_tokens=0),), 1)
    with pytest.raises(ValueError, match="tuples"):
        arrays.build(((1, 2),), 1)
    item.request.block_ids = [5, 2**31]
    with pytest.raises(ValueError, match="32 bits"):
        arrays.build((item,), 1)
    with pytest.raises(TypeError):
        arrays.build((item._replace(start="3"),), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window"):
        step_arrays(windows=())
    _, _, size, *_ = arrays.build(decodes(1, 3), 1)
    for memory in (torch.zeros(size - 1, dtype=torch.int32), torch.zeros(size)):
        with pytest.raises(ValueError, match="contiguous int32"):
            arrays.write(memory)
