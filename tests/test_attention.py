# SPDX-License-Identifier: Apache-2.0
"""A request's attention has the same bits whatever company, chunk, cut and thread count it is computed in."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from itertools import accumulate, pairwise

import pytest
import torch

from fastserve import _native
from op_cases.attention import TWO_LEVELS, Groups, Shape, arguments_for, planned, reference
from op_cases.paged_kv import cache_from, keys_and_values
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


DECODE_SHAPES = [
    Shape(heads=3, kv_heads=1, dim=32, span=128, block_size=16, dtype=torch.bfloat16),
    Shape(heads=4, kv_heads=2, dim=64, span=512, block_size=64, dtype=torch.bfloat16),
    Shape(heads=2, kv_heads=2, dim=96, span=256, dtype=torch.bfloat16, window=300),
    Shape(heads=4, kv_heads=1, dim=128, span=256, dtype=torch.bfloat16),
    Shape(heads=6, kv_heads=2, dim=256, span=128, block_size=16, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("shape", DECODE_SHAPES, ids=lambda shape: f"D{shape.dim}-block{shape.block_size}")
def test_decodes_have_the_bits_of_chunks(shape: Shape, isa: str) -> None:
    """Decodes of one step in any order, between chunks, and groups of them over one prefix."""
    _native.set_isa(isa)
    _native.set_num_threads(1)
    lengths = [513, 40, 1, 290, 32, 700, 257, 181]
    rows = [min(length, 20) for length in lengths]
    batch = arguments_for(torch.Generator().manual_seed(SEED), rows, lengths, shape)
    whole = run_guarded("attention", batch)["out"].split(rows)
    for order, chunk in [(range(8), None), (range(7, -1, -1), 3), ((5, 5, 5, 0, 0, 1), None), ((6, 2, 2, 3), 1)]:
        starts, picked, want = [0], [], []
        for place, request in enumerate(order):
            count = rows[request] if place == chunk else 1
            starts.append(starts[-1] + count)
            picked.append(batch["q"].split(rows)[request][-count:])
            want.append(whole[request][-count:])
        arguments = {
            "q": torch.cat(picked),
            "kv_cache": batch["kv_cache"],
            "block_tables": batch["block_tables"][list(order)],
            **planned(starts, [lengths[request] for request in order], shape),
        }
        assert (bits(run_guarded("attention", arguments)["out"]) == bits(torch.cat(want))).all(), f"order {order}"


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(bad: float, dtype: torch.dtype, isa: str) -> None:
    """A broken query gives a broken output of its own row and head only."""
    _native.set_isa(isa)
    arguments = arguments_for(torch.Generator().manual_seed(SEED), [3, 1], [70, 40], Shape(dtype=dtype))
    clean = run_guarded("attention", arguments)["out"]
    arguments["q"] = arguments["q"].clone()
    arguments["q"][1, 2, 5] = bad
    out = run_guarded("attention", arguments)["out"]
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    assert (bits(out) == bits(clean)).all()


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_with_rows_that_see_it(bad: float, dtype: torch.dtype, isa: str) -> None:
    """A broken value or key of a chunk's token, or of one that has left the window, leaves other rows their bits."""
    _native.set_isa(isa)
    shape = Shape(heads=6, kv_heads=2, dtype=dtype, window=50)
    arguments = arguments_for(torch.Generator().manual_seed(SEED), [40], [140], shape)
    clean = run_guarded("attention", arguments)["out"]
    for is_value in (False, True):
        parts = [part.clone() for part in keys_and_values(arguments["kv_cache"])]
        for token in (61, 117):
            parts[is_value][arguments["block_tables"][0, token // 32], :, token % 32, 3] = bad
        out = run_guarded("attention", {**arguments, "kv_cache": cache_from(*parts, dtype)})["out"]
        # Row r is token 100 + r and sees 50 tokens: 61 is hidden from rows 11 on, 117 from rows below 17.
        assert (bits(out[11:17]) == bits(clean[11:17])).all()
        if is_value or bad != bad:  # an infinite key may also get no weight
            assert not out[:11].isfinite().all(-1).any()
            assert not out[17:].isfinite().all(-1).any()


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 40, 63])
def test_row_that_sees_nothing_is_zero_with_maximum_minus_infinity(position: int, dtype: torch.dtype, isa: str) -> None:
    """An item over tokens [64, 192), two spans, whose row i sees tokens up to position + i."""
    _native.set_isa(isa)
    shape = Shape(heads=2, kv_heads=1, span=128, dtype=dtype)
    arguments = arguments_for(torch.Generator().manual_seed(SEED), [80], [200], shape)
    arguments["merges"], arguments["parts"] = torch.zeros(0, 5, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    last_seen = torch.arange(80) + position

    arguments["items"] = torch.tensor([[0, 80, 64, 192, position, 0, -1, 0, 0, 0]], dtype=torch.int32)
    out = run_guarded("attention", arguments)["out"]
    assert (out[last_seen < 64] == 0).all()
    assert (out[last_seen >= 64] != 0).any(-1).all()

    arguments["items"] = torch.tensor([[0, 80, 64, 192, position, 0, 0, 2, 0, 0]], dtype=torch.int32)
    arguments["workspace"] = torch.zeros(2 * 80 * shape.heads * (shape.dim + 2))
    partials = run_guarded("attention", arguments)["workspace"].view(2, 80, shape.heads, shape.dim + 2)
    for partial, begin in zip(partials, (64, 128), strict=True):
        blind = last_seen < begin
        assert (partial[blind, :, :-2] == 0).all()
        assert (partial[blind, :, -2] == float("-inf")).all()
        assert (partial[blind, :, -1] == 0).all()
        assert (partial[~blind, :, -1] > 0).all()


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_relative_error_of_a_row(dtype: torch.dtype, bound: float, isa: str) -> None:
    """Against float64 on what the cache holds; queries as they are before any rounding."""
    _native.set_isa(isa)
    queries, lengths = [1, 40, 1, 9], [700, 300, 33, 1000]
    arguments = arguments_for(torch.Generator().manual_seed(SEED), queries, lengths, Shape(span=256, dtype=dtype))
    exact = reference(queries, lengths, arguments)["out"].value
    error = (run_guarded("attention", arguments)["out"].double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < bound


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_of_more_than_2_31_elements(dtype: torch.dtype, isa: str) -> None:
    """Tokens whose blocks lie beyond 2^31 elements have the bits of tokens in the first blocks. No memory but that of
    the blocks in use is touched."""
    _native.set_isa(isa)
    heads, kv_heads, size, dim, length = 4, 2, 16, 32, 40
    shape = Shape(heads, kv_heads, dim, size, span=64, dtype=dtype)
    num_blocks = 2**31 // (2 * kv_heads * size * dim) + 8
    num_bytes = num_blocks * 2 * kv_heads * size * dim * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, num_bytes, flags=flags)
    huge = torch.frombuffer(memory, dtype=dtype).view(num_blocks, 2, kv_heads, size, dim)
    generator = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(length, n, dim, generator=generator) for n in (heads, kv_heads, kv_heads))
    positions = torch.arange(length, dtype=torch.int32)
    cos_sin = torch.randn(length, dim, generator=generator)
    outs = []
    for cache, blocks in ((huge[:3], [0, 2, 1]), (huge, [num_blocks - 1, num_blocks - 3, num_blocks - 2])):
        table = torch.tensor([blocks], dtype=torch.int32)
        slots = table[0].repeat_interleave(size)[:length] * size + positions % size
        rotated = q.clone()
        _native.ops.rope_kv_write(rotated, k, v, positions, slots, cos_sin, cache, None, None, 1e-6)
        arguments = planned([0, length], [length], shape)
        _native.ops.attention(q=rotated, kv_cache=cache, block_tables=table, **arguments)
        outs.append(arguments["out"])
    assert outs[0].isfinite().all()
    assert (bits(outs[0]) == bits(outs[1])).all()
