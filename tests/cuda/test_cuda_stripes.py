# SPDX-License-Identifier: Apache-2.0
"""What `linear`, `linear_int4` and `linear_int8` promise beyond their op cases, as products in stripes: the same bits
for every number of rows on a device with any number of multiprocessors, counters that are left as zeros, a workspace
that may hold anything, and parts that are read only once they are there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_device import Gpu, SimulatedDevice, find_devices
from int4_cases import ZERO_POINTS
from int4_cases import linear_case as int4_case
from int8_cases import CODE_BYTES, STAGE_BYTES
from int8_cases import linear_case as int8_case
from linear_cases import FORMATS
from linear_cases import linear_case as dense_case

from fastserve import _native
from op_cases import Arguments, OpCase, empty
from op_checks import assert_close, assert_same_bits

DEVICES = find_devices()
SIMULATED = [device for device in DEVICES if isinstance(device, SimulatedDevice)][:1]
MakeCase = Callable[[int, int, int, torch.dtype], OpCase]  # tokens, rows, depth, dtype
CASES: list[MakeCase] = [
    lambda tokens, rows, depth, dtype: dense_case(tokens, rows, depth, dtype, bias=True),
    lambda tokens, rows, depth, dtype: int4_case(tokens, rows, depth, 64, ZERO_POINTS, dtype, bias=True),
    lambda tokens, rows, depth, dtype: int8_case(tokens, rows, depth, 32, dtype, bias=True),
]
each_op = pytest.mark.parametrize("make_case", CASES, ids=["linear", "linear_int4", "linear_int8"])


def first_rows(op: str, arguments: Arguments, tokens: int, multiprocessors: int) -> Arguments:
    depth = arguments["x"].shape[1]
    num_bytes = (
        _native.cuda_int4_workspace_bytes(tokens, depth, multiprocessors, False)
        if op == "linear_int4"
        else _native.cuda_linear_workspace_bytes(tokens, multiprocessors)
    )
    return {
        **arguments,
        "out": arguments["out"][:tokens].clone(),
        "x": arguments["x"][:tokens].clone(),
        "workspace": torch.full((num_bytes,), 0xFF, dtype=torch.uint8),  # NaN
    }


def on(device: SimulatedDevice, multiprocessors: int, **checks: bool) -> SimulatedDevice:
    other = SimulatedDevice(device.module, "late", 1 if checks else 0, **checks)
    other.num_multiprocessors = multiprocessors
    return other


# One multiprocessor: whole tiles for all batches of more than one tile; many: stripes for all of them.
@each_op
@pytest.mark.parametrize("device", SIMULATED, ids=lambda device: device.name)
@pytest.mark.parametrize("multiprocessors", [1, 3, 8, 24])
def test_row_has_the_same_bits_in_any_batch(device: SimulatedDevice, make_case: MakeCase, multiprocessors: int) -> None:
    device = on(device, multiprocessors)
    case = make_case(130, 160, 832, torch.float16)
    arguments = case.make(torch.Generator().manual_seed(7))
    whole = first_rows(case.op, arguments, 130, multiprocessors)
    device.run(case.op, whole)
    assert not whole["counters"].any()
    for tokens in (1, 8, 17, 33, 64, 65):
        some = first_rows(case.op, arguments, tokens, multiprocessors)
        device.run(case.op, some)
        assert_same_bits(f"{tokens} of 130 rows", some, {"out": whole["out"][:tokens]}, ["out"])


@each_op
@pytest.mark.parametrize("device", SIMULATED, ids=lambda device: device.name)
@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 5, 11, 40])
@pytest.mark.parametrize("tokens", [3, 72])
def test_stripes_of_any_device_give_the_product(
    device: SimulatedDevice, make_case: MakeCase, multiprocessors: int, tokens: int
) -> None:
    case = make_case(tokens, 416, 1216, torch.float16)
    arguments = first_rows(case.op, case.make(torch.Generator().manual_seed(7)), tokens, multiprocessors)
    on(device, multiprocessors).run(case.op, arguments)
    expected = case.reference(arguments)["out"]
    assert_close(f"{multiprocessors} multiprocessors", arguments["out"], expected, length=1217)


@each_op
@pytest.mark.parametrize("device", SIMULATED, ids=lambda device: device.name)
def test_parts_are_added_once_they_are_there(device: SimulatedDevice, make_case: MakeCase) -> None:
    """Stores of a block stay its own until a fence; and if fences did nothing, that would show."""
    case = make_case(5, 160, 832, torch.bfloat16)
    arguments = first_rows(case.op, case.make(torch.Generator().manual_seed(7)), 5, 8)
    device.run(case.op, arguments)
    for seed in (1, 2):
        again = {**arguments, "out": empty(*arguments["out"].shape, dtype=torch.bfloat16)}
        SimulatedDevice(device.module, "late", seed, weak_memory=True).run(case.op, again)
        assert_same_bits("with weak memory", again, arguments, ["out"])
    with pytest.raises(ValueError, match="race on global memory"):
        on(device, 8, weak_memory=True, ignore_order=True).run(case.op, arguments)


@each_op
@pytest.mark.parametrize("device", DEVICES[:1], ids=lambda device: device.name)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workspace": torch.empty(128, dtype=torch.uint8)}, "workspace has 128 bytes; 4 rows of 256 inputs need"),
        ({"counters": None}, "needs 16384 counters, zeros at first; given 0"),
    ],
)
def test_refuses(device: SimulatedDevice | Gpu, make_case: MakeCase, change: Arguments, message: str) -> None:
    case = make_case(4, 64, 256, torch.float16)
    with pytest.raises(ValueError, match=message):
        device.run(case.op, {**case.make(torch.Generator().manual_seed(7)), **change})


@pytest.mark.parametrize("device", SIMULATED, ids=lambda device: device.name)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 33, 64])
@pytest.mark.parametrize("op", ["linear", "linear_int8"])
def test_linears_read_weights_once_without_bank_conflicts(
    device: SimulatedDevice, op: str, dtype: torch.dtype, tokens: int
) -> None:
    is_dense = op == "linear"
    # The largest tile of int8 weights has 48 rows.
    case = dense_case(tokens, 256, 1024, dtype) if is_dense else int8_case(min(tokens, 48), 256, 1024, 32, dtype)
    arguments = case.make(torch.Generator().manual_seed(7))
    device.run(op, arguments)
    (launch,) = device.counters()
    assert launch["grid"][0] == 8  # two column tiles: each in four parts
    packed = arguments["packed"]
    # Eight lanes read the same scales at once, which the counter takes for eight reads.
    again = 0 if is_dense else packed.numel() // STAGE_BYTES * (STAGE_BYTES - CODE_BYTES) * 7
    assert launch["buffers"]["packed"]["read"] == packed.numel() * packed.itemsize + again
    for kind in ("async", "load"):
        assert launch["global"][kind]["sectors"] == launch["global"][kind]["ideal_sectors"], kind
    for kind in ("async", "load", "ldmatrix", "store"):
        assert launch["shared"][kind]["wavefronts"] == launch["shared"][kind]["ideal"], kind
