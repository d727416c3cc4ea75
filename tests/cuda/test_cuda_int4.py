# SPDX-License-Identifier: Apache-2.0
"""What `linear_int4` promises beyond its op cases and test_cuda_stripes.py: the same bits for every number of rows in
every form, workspaces that serve call after call, and how much it moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_device import Gpu, SimulatedDevice, find_devices
from int4_cases import FORMATS, MINIMUMS, SYMMETRIC, ZERO_POINTS, linear_case

from fastserve import _native
from op_cases import Arguments, empty
from op_checks import assert_same_bits

DEVICES = find_devices()
SIMULATED = [device for device in DEVICES if isinstance(device, SimulatedDevice)]


def make(*shape: int, dtype: torch.dtype, ordered: bool = False) -> Arguments:
    """shape: tokens, rows, depth, group size, form."""
    case = linear_case(*shape, dtype, bias=True, ordered=ordered)
    return case.make(torch.Generator().manual_seed(7))


def first_rows(arguments: Arguments, tokens: int, multiprocessors: int) -> Arguments:
    depth, ordered = arguments["x"].shape[1], arguments["input_order"] is not None
    workspace = _native.cuda_int4_workspace_bytes(tokens, depth, multiprocessors, ordered)
    return {
        **arguments,
        "out": arguments["out"][:tokens].clone(),
        "x": arguments["x"][:tokens].clone(),
        "workspace": empty(workspace, dtype=torch.uint8),
    }


def assert_rows_keep_their_bits(device: SimulatedDevice | Gpu, arguments: Arguments) -> None:
    most = arguments["x"].shape[0]
    whole = first_rows(arguments, most, device.num_multiprocessors)
    device.run("linear_int4", whole)
    for tokens in (1, 5, 8, 9, 16, 17, 32, 33, 48, 49, 64, 65, 128):
        some = first_rows(arguments, tokens, device.num_multiprocessors)
        device.run("linear_int4", some)
        expected = {"out": whole["out"][:tokens]}
        assert_same_bits(f"{tokens} of {most} rows on {device.name}", some, expected, ["out"])


@pytest.mark.parametrize("device", DEVICES[:1], ids=lambda device: device.name)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("group", "form"), [(128, SYMMETRIC), (32, MINIMUMS), (832, ZERO_POINTS)])
def test_row_has_the_same_bits_in_any_batch(
    device: SimulatedDevice | Gpu, dtype: torch.dtype, group: int, form: int
) -> None:
    assert_rows_keep_their_bits(device, make(130, 160, 832, group, form, dtype=dtype))


@pytest.mark.parametrize("device", DEVICES[:1], ids=lambda device: device.name)
@pytest.mark.parametrize(("tokens", "ordered"), [(16, False), (70, True)])
def test_counters_and_workspace_are_ready_for_the_next_call(
    device: SimulatedDevice | Gpu, tokens: int, ordered: bool
) -> None:
    first = make(tokens, 160, 832, 128, SYMMETRIC, dtype=torch.bfloat16, ordered=ordered)
    device.run("linear_int4", first)
    assert not first["counters"].any()
    assert first["workspace"].any()  # parts were left there
    again = {**first, "out": empty(*first["out"].shape, dtype=torch.bfloat16)}
    device.run("linear_int4", again)
    assert_same_bits("second call", again, first, ["out"])


@pytest.mark.parametrize("device", DEVICES[:1], ids=lambda device: device.name)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 48}, "group_size is 48"),
        ({"group_size": 64}, "packed is .* needs"),
        ({"form": 3}, "form is 3"),
        ({"x": empty(4, 256), "out": empty(4, 64)}, "x is float32"),
    ],
)
def test_refuses(device: SimulatedDevice | Gpu, change: dict[str, Any], message: str) -> None:
    arguments = make(4, 64, 256, 128, SYMMETRIC, dtype=torch.float16)
    with pytest.raises(ValueError, match=message):
        device.run("linear_int4", {**arguments, **change})


@pytest.mark.parametrize("device", SIMULATED[:1], ids=lambda device: device.name)
@pytest.mark.parametrize(
    ("group", "form", "tokens"),
    [(128, SYMMETRIC, tokens) for tokens in (1, 8, 16, 32, 48, 64)]
    + [(64, ZERO_POINTS, 16), (2048, SYMMETRIC, 64), (32, MINIMUMS, 1), (32, MINIMUMS, 32)],
)
def test_reads_weights_once_without_bank_conflicts(device: SimulatedDevice, group: int, form: int, tokens: int) -> None:
    # Every half of a part reads the scales of groups of a whole column.
    arguments = make(tokens, 256, max(1024, group), group, form, dtype=torch.float16)
    device.run("linear_int4", arguments)
    (launch,) = device.counters()
    weight = arguments["packed"].numel()
    assert weight <= launch["buffers"]["packed"]["read"] <= 1.02 * weight
    for kind in ("async", "load", "store"):
        assert launch["global"][kind]["sectors"] == launch["global"][kind]["ideal_sectors"], kind
    for kind in ("async", "load", "ldmatrix", "store"):
        assert launch["shared"][kind]["wavefronts"] == launch["shared"][kind]["ideal"], kind
