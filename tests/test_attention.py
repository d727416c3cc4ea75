# SPDX-License-Identifier: Apache-2.0
"""A request's attention has the same bits whatever company, chunk, cut and thread count it is computed in."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

import pytest
import torch

from fastserve import _native
from op_cases.attention import TWO_LEVELS, Groups, Shape, arguments_for, planned
from op_checks import bits, run_guarded

SEED = 7
LENGTHS = [290, 130, 1, 64, 65]
SHAPES = [
    Shape(heads=9, kv_heads=3, span=64, dtype=torch.float32),
    Shape(heads=9, kv_heads=3, span=64, dtype=torch.bfloat16),
    Shape(heads=8, kv_heads=2, dim=24, block_size=16, span=128, window=70, dtype=torch.bfloat16),
]
SHARED_SHAPES = [
    Shape(heads=9, kv_heads=3, span=64, dtype=torch.float32),
    Shape(heads=9, kv_heads=3, span=64, dtype=torch.bfloat16),
    Shape(heads=8, kv_heads=2, dim=24, span=64, window=400, dtype=torch.bfloat16),
]


@pytest.fixture(autouse=True)
def restore_settings() -> Iterator[None]:
    isa, num_threads = _native.isa(), _native.num_threads()
    yield
    _native.set_isa(isa)
    _native.set_num_threads(num_threads)


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"D{shape.dim}-{shape.dtype}-window{shape.window}")
def test_same_bits_in_any_company(shape: Shape, isa: str) -> None:
    _native.set_isa(isa)
    _native.set_num_threads(2)
    # The last `rows` rows of every request, all in one batch of whole chunks.
    rows = [min(length, 40) for length in LENGTHS]
    batch = arguments_for(torch.Generator().manual_seed(SEED), rows, LENGTHS, shape)
    whole = run_guarded("attention", batch)["out"].split(rows)
    queries = batch["q"].split(rows)

    def run(steps: list[tuple[int, int, int]], rows_per_item: int = 48, num_workers: int = 2) -> None:
        """Run steps of (request, first row, end row) in one batch and compare with the whole chunks' bits."""
        starts, lens, tables, q, want = [0], [], [], [], []
        for request, begin, end in steps:
            starts.append(starts[-1] + end - begin)
            lens.append(LENGTHS[request] - rows[request] + end)
            tables.append(batch["block_tables"][request])
            q.append(queries[request][begin:end])
            want.append(whole[request][begin:end])
        changed = Shape(**{**vars(shape), "num_workers": num_workers})
        arguments = {
            "q": torch.cat(q),
            "kv_cache": batch["kv_cache"],
            "block_tables": torch.stack(tables),
            **planned(starts, lens, changed, rows_per_item),
        }
        out = run_guarded("attention", arguments)["out"]
        assert (bits(out) == bits(torch.cat(want))).all(), f"steps {steps} on {isa}"

    everything = [(request, 0, count) for request, count in enumerate(rows)]
    run(everything[::-1])
    for rows_per_item in (1, 7, 200):
        run(everything, rows_per_item)
    for num_workers in (1, 64):
        run(everything, num_workers=num_workers)
    _native.set_num_threads(1)
    run(everything)
    for step in everything:
        run([step], num_workers=64)
    for chunk in (1, 7, 16, 39):
        for begin in range(0, 40, chunk):
            run([(request, begin, min(begin + chunk, count)) for request, count in enumerate(rows) if begin < count])


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("shape", SHARED_SHAPES, ids=lambda shape: f"D{shape.dim}-{shape.dtype}-window{shape.window}")
def test_same_bits_whether_a_prefix_is_shared(shape: Shape, isa: str) -> None:
    """Shared at two levels by chunks and decodes, cut into items in any way, read by each reader, and each alone."""
    _native.set_isa(isa)
    rows, lengths = [1, 30, 1, 1, 1, 19, 2], [330, 360, 321, 257, 300, 279, 280]
    batch = arguments_for(torch.Generator().manual_seed(SEED), rows, lengths, shape, TWO_LEVELS)
    starts = [0, *accumulate(rows)]

    def run(groups: Groups | None, **cut: int) -> torch.Tensor:
        changed = Shape(**{**vars(shape), "num_workers": cut.pop("num_workers", 2)})
        arguments = {**batch, **planned(starts, lengths, changed, groups=groups, **cut)}
        ends = {(begin, begin + count) for begin, count, *_ in arguments["items"].tolist()}
        is_shared = any(begin < start < end for begin, end in ends for start in starts)  # rows of two requests
        assert is_shared or groups is None or cut.get("rows_per_shared_item") == 1
        return run_guarded("attention", arguments)["out"]

    _native.set_num_threads(2)
    unshared = run(None)
    for num_workers in (1, 2, 64):
        for rows_per_shared_item in (1, 60, 1000):
            shared = run(TWO_LEVELS, num_workers=num_workers, rows_per_shared_item=rows_per_shared_item)
            assert (bits(shared) == bits(unshared)).all()
    _native.set_num_threads(1)
    assert (bits(run(TWO_LEVELS)) == bits(unshared)).all()
    for request, (begin, end) in enumerate(pairwise(starts)):
        alone = {
            "q": batch["q"][begin:end],
            "kv_cache": batch["kv_cache"],
            "block_tables": batch["block_tables"][request : request + 1],
            **planned([0, end - begin], [lengths[request]], shape),
        }
        assert (bits(run_guarded("attention", alone)["out"]) == bits(unshared[begin:end])).all()


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(bad: float, isa: str) -> None:
    """A broken query gives a broken output of its own row and head only."""
    _native.set_isa(isa)
    arguments = arguments_for(torch.Generator().manual_seed(SEED), [3, 1], [70, 40], Shape())
    clean = run_guarded("attention", arguments)["out"]
    arguments["q"] = arguments["q"].clone()
    arguments["q"][1, 2, 5] = bad
    out = run_guarded("attention", arguments)["out"]
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    assert (bits(out) == bits(clean)).all()
