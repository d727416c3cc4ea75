# SPDX-License-Identifier: Apache-2.0
"""Attention on CUDA: the same bits in any company, cut and order of blocks; what must hold at the edges; and what it
reads, in bytes and sectors."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from attention_cases import Groups, Shape, cuda_arguments, exact, parked_floats, replanned
from cuda_device import SimulatedDevice, find_devices

from op_cases import Arguments
from op_checks import bits

DEVICES = find_devices()
DEVICE = DEVICES[0]
SEED = 11
# Decodes and chunks of at most 16 and of more packed rows, over several spans: up to two trees of four and some more.
ROWS, LENGTHS = [1, 30, 1, 1, 1, 19, 2], [330, 590, 321, 257, 300, 279, 280]
TWO_LEVELS: Groups = [(0, 160, 0, 7), (160, 320, 0, 3), (160, 256, 3, 7)]
SHAPES = [
    Shape(heads=6, kv_heads=2, dim=128, span=64, dtype=torch.float16),
    Shape(heads=8, kv_heads=1, dim=64, span=128, window=400, dtype=torch.bfloat16),
]


def run(arguments: Arguments, device: Any = DEVICE) -> torch.Tensor:
    given = {name: value.clone() if torch.is_tensor(value) else value for name, value in arguments.items()}
    device.run("attention", given)
    return given["out"]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"D{shape.dim}-g{shape.heads // shape.kv_heads}")
def batch(request: pytest.FixtureRequest) -> tuple[Shape, Arguments, torch.Tensor]:
    """All requests in one batch that shares nothing."""
    shape = request.param
    arguments = cuda_arguments(torch.Generator().manual_seed(SEED), ROWS, LENGTHS, shape, TWO_LEVELS)
    starts = [0, *accumulate(ROWS)]
    arguments.update(replanned(starts, LENGTHS, shape))
    return shape, arguments, run(arguments)


@pytest.mark.parametrize(
    ("groups", "num_workers", "options"),
    [
        (TWO_LEVELS, 2, {}),
        (TWO_LEVELS, 64, {}),
        (TWO_LEVELS, 2, {"rows_per_shared_item": 16}),
        (None, 64, {}),
        (None, 1, {"rows_per_item": 16}),  # chunks cut into tiles of a warp
        (TWO_LEVELS, 2, {"rows_per_item": 64, "rows_per_shared_item": 64}),  # a tile on a warp, not two
        (None, 2, {"rows_per_item": 200}),  # items of several tiles of a block
    ],
)
def test_same_bits_however_the_work_is_cut(
    batch: tuple[Shape, Arguments, torch.Tensor], groups: Groups | None, num_workers: int, options: dict[str, int]
) -> None:
    shape, arguments, whole = batch
    starts = [0, *accumulate(ROWS)]
    planned = replanned(starts, LENGTHS, replace(shape, num_workers=num_workers), groups=groups, **options)
    assert (bits(run({**arguments, **planned})) == bits(whole)).all()


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_same_bits_alone_and_in_any_chunks(batch: tuple[Shape, Arguments, torch.Tensor], chunk: int | None) -> None:
    shape, arguments, whole = batch
    for request, (begin, end) in enumerate(pairwise([0, *accumulate(ROWS)])):
        edges = [*range(begin, end, chunk or end - begin), end]
        for first, last in pairwise(edges):
            if chunk == 1 and first not in (begin, begin + 1, end - 1):
                continue  # for time
            alone = {
                **arguments,
                "q": arguments["q"][first:last],
                "block_tables": arguments["block_tables"][request : request + 1],
                **replanned([0, last - first], [LENGTHS[request] - end + last], shape),
            }
            assert (bits(run(alone)) == bits(whole[first:last])).all(), f"request {request}, rows {first} to {last}"


@pytest.mark.skipif(not isinstance(DEVICE, SimulatedDevice), reason="needs a device whose order can be set")
@pytest.mark.parametrize("async_mode", ["late", "early"])
def test_same_bits_in_any_order_of_blocks(batch: tuple[Shape, Arguments, torch.Tensor], async_mode: str) -> None:
    """Partials then come in every order, and whichever block is last merges."""
    shape, arguments, whole = batch
    shared = replanned([0, *accumulate(ROWS)], LENGTHS, replace(shape, num_workers=64), groups=TWO_LEVELS)
    for seed in (1, 2):
        device = SimulatedDevice(DEVICE.module, async_mode, seed)
        assert (bits(run({**arguments, **shared}, device)) == bits(whole)).all()


@pytest.mark.skipif(not isinstance(DEVICE, SimulatedDevice), reason="needs a device whose memory can be weak")
def test_merge_waits_for_the_partials_of_other_blocks(batch: tuple[Shape, Arguments, torch.Tensor]) -> None:
    """Stores of a block stay its own until a fence; and if fences did nothing, that would show."""
    shape, arguments, whole = batch
    shared = replanned([0, *accumulate(ROWS)], LENGTHS, replace(shape, num_workers=64), groups=TWO_LEVELS)
    for seed in (1, 2, 3):
        weak = SimulatedDevice(DEVICE.module, "late", seed, weak_memory=True)
        assert (bits(run({**arguments, **shared}, weak)) == bits(whole)).all()
    mutant = SimulatedDevice(DEVICE.module, "late", 1, weak_memory=True, ignore_order=True)
    with pytest.raises(ValueError, match="race on global memory"):
        run({**arguments, **shared}, mutant)


@pytest.mark.skipif(not isinstance(DEVICE, SimulatedDevice), reason="needs memory that takes no room until it is used")
def test_offsets_beyond_2_to_the_31_elements() -> None:
    """Blocks of the KV cache, and rows of queries and outputs, at the end of tensors of 4 and 8 GB."""
    shape = Shape(heads=2, kv_heads=1, dim=64, block_size=16, span=64, dtype=torch.float16)
    small = cuda_arguments(torch.Generator().manual_seed(SEED), [2, 1], [90, 40], shape)
    want = run(small)
    memories = []

    def there(tensor: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        memories.append(DEVICE.module.ReservedMemory((last + 1) * tensor.itemsize))
        flat = torch.frombuffer(memories[-1], dtype=torch.uint8).view(tensor.dtype)
        view = flat.as_strided(size, stride)
        view[size[0] - len(tensor) :] = tensor
        return view

    big = {
        name: there(value, tuple(value.shape), value.stride())
        for name, value in small.items()
        if torch.is_tensor(value) and value.numel() > 0
    }
    num_blocks, row = 2**20 + 8 + len(small["kv_cache"]), 2**30 + 64
    big["kv_cache"] = there(small["kv_cache"], (num_blocks, 2, 1, 16, 64), small["kv_cache"].stride())
    big["block_tables"] += num_blocks - len(small["kv_cache"])
    for name in ("q", "out"):
        big[name] = there(small[name], tuple(small[name].shape), (row, 64, 1))
    DEVICE.module.configure(DEVICE.async_mode, 0, DEVICE.num_multiprocessors)
    DEVICE.module.launch("attention", {**small, **big})
    DEVICE.module.synchronize()
    assert (bits(big["out"].clone()) == bits(want)).all()


def test_error_against_float64_is_within_the_format() -> None:
    """Root mean square, relative: below 1e-3 in float16 and 1e-2 in bfloat16."""
    for shape, bound in (
        (replace(SHAPES[0], dtype=torch.float16), 1e-3),
        (replace(SHAPES[0], dtype=torch.bfloat16), 1e-2),
    ):
        arguments = cuda_arguments(torch.Generator().manual_seed(SEED), ROWS, LENGTHS, shape)
        want = exact(ROWS, LENGTHS, arguments)["out"].value
        error = (run(arguments).double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error < bound, (shape.dtype, error)


def test_a_row_that_sees_nothing_is_zero_with_a_maximum_of_minus_infinity() -> None:
    """An item whose tokens all lie behind its row: the plan makes none, the kernel must not trip over one."""
    shape = Shape(heads=2, kv_heads=1, dim=64, block_size=16, span=64, dtype=torch.float16)
    arguments = cuda_arguments(torch.Generator().manual_seed(SEED), [1], [150], shape)
    items = torch.tensor([[0, 1, 64, 128, 10, 0, -1, 0, 0, 0]], dtype=torch.int32)
    nothing = torch.zeros(0, 5, dtype=torch.int32)
    alone = {**arguments, "items": items, "merges": nothing, "parts": nothing[:, 0].contiguous()}
    assert (bits(run(alone)) == 0).all()
    # As one of two parts: a partial of nothing, and the row's output is the other one's.
    workspace = torch.zeros(parked_floats(64) + 2 * 2 * 66)
    items = torch.tensor([[0, 1, 0, 64, 149, 0, 0, 1, 0, 1], [0, 1, 64, 128, 10, 0, 1, 1, 0, 1]], dtype=torch.int32)
    merges = torch.tensor([[0, 1, 0, 2, 2]], dtype=torch.int32)
    parts = torch.tensor([0, 1], dtype=torch.int32)
    counters = torch.zeros(3, dtype=torch.int32)
    given = {
        **arguments,
        "items": items,
        "merges": merges,
        "parts": parts,
        "workspace": workspace,
        "counters": counters,
    }
    DEVICE.run("attention", given)
    partials = workspace[parked_floats(64) :]
    out, stats = partials[: 2 * 2 * 64].view(2, 2, 64), partials[2 * 2 * 64 :].view(2, 2, 2)
    assert (out[1] == 0).all()
    assert stats[1].tolist() == [[float("-inf"), 0.0]] * 2
    assert (given["out"] - (out[0] / stats[0, :, 1:])[None]).abs().max() < 1e-3


def test_stale_entries_of_a_block_table_are_never_followed() -> None:
    shape = Shape(heads=4, kv_heads=2, dim=64, block_size=16, span=64, window=40, dtype=torch.float16)
    arguments = cuda_arguments(torch.Generator().manual_seed(SEED), [3, 1], [200, 90], shape)
    clean = run(arguments)
    tables = torch.full((2, 16), 2**30, dtype=torch.int32)
    for request, (rows, length) in enumerate(((3, 200), (1, 90))):
        used = slice((length - rows - 40 + 1) // 16, -(-length // 16))
        tables[request, used] = arguments["block_tables"][request, used]
    assert (bits(run({**arguments, "block_tables": tables})) == bits(clean)).all()


def test_scores_beyond_the_range_of_float16() -> None:
    """Products of 70,000 and more: one key has all the weight."""
    shape = Shape(heads=1, kv_heads=1, dim=64, block_size=16, span=64, dtype=torch.float16)
    arguments = cuda_arguments(torch.Generator().manual_seed(SEED), [1], [40], shape)
    arguments["q"] = torch.full((1, 1, 64), 40.0).half()
    keys = arguments["kv_cache"][:, 0]
    keys[keys.isfinite()] = -30.0
    block = arguments["block_tables"][0, 1]
    arguments["kv_cache"][block, 0, 0, 5] = 40.0
    assert torch.equal(run(arguments)[0, 0], arguments["kv_cache"][block, 1, 0, 5])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_query_breaks_its_own_row_and_head_only(bad: float) -> None:
    shape = Shape(heads=4, kv_heads=2, dim=64, block_size=16, span=64, dtype=torch.float16)
    arguments = cuda_arguments(torch.Generator().manual_seed(SEED), [3, 1], [70, 140], shape)
    clean = run(arguments)
    arguments["q"] = arguments["q"].clone()
    arguments["q"][1, 2, 5] = bad
    out = run(arguments)
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    assert (bits(out) == bits(clean)).all()
