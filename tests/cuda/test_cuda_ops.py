# SPDX-License-Identifier: Apache-2.0
"""Every op case on the CUDA kernels, on a GPU or on the simulated device (late and early async copies, race detector,
bounds, uninitialised memory), against the float64 reference; rows alone give the same bits as in company (on the first
device only, for time); and what the kernels move, in bytes and sectors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_cases import ATTENTION_BAD_CASES, ATTENTION_CASES
from cuda_cases import CUDA_CASES
from cuda_device import Gpu, SimulatedDevice, find_devices
from int4_cases import INT4_CASES
from int8_cases import INT8_CASES
from linear_cases import LINEAR_CASES
from narrowed import ACTIVATIONS, narrowed

import op_cases
from op_cases import Arguments, BadCase, OpCase
from op_checks import Guarded, assert_close, assert_same_bits, row_splits

DEVICES = find_devices()
ON_CUDA = set(DEVICES[0].ops()) if DEVICES else set()
SEED = 20240607
# Ops whose CPU cases state the CPU's own layout of the KV cache or of weights.
LINEARS = {"linear", "pack_linear", "linear_int4", "pack_int4", "linear_int8", "pack_int8"}
OTHER_LAYOUT = {"rope_kv_write", "attention", *LINEARS}


def all_cases() -> list[OpCase]:
    cases = []
    for case in op_cases.load().cases:
        if case.op not in ON_CUDA or case.op in OTHER_LAYOUT:
            continue
        cases.append(case)
        if case.op in ACTIVATIONS:
            cases += [narrowed(case, dtype) for dtype in (torch.float16, torch.bfloat16)]
    cuda_cases = CUDA_CASES + LINEAR_CASES + INT4_CASES + INT8_CASES + ATTENTION_CASES
    return cases + [case for case in cuda_cases if case.op in ON_CUDA]


def make(case: OpCase) -> Arguments:
    return case.make(torch.Generator().manual_seed(SEED))


def run_guarded(device: SimulatedDevice | Gpu, op: str, arguments: Arguments) -> Arguments:
    """The arguments after the op, in copies; nothing but the elements of its outputs changed."""
    guarded = {name: Guarded.copy_of(value) for name, value in arguments.items() if torch.is_tensor(value)}
    values: dict[str, Any] = {
        name: guarded[name].view if name in guarded else value for name, value in arguments.items()
    }
    device.run(op, values)
    for name, copy in guarded.items():
        copy.assert_only_view_changed(f"{op}: {name}")
    return values


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: f"{case.op}-{case.id}")
def test_matches_the_reference(case: OpCase, device: SimulatedDevice | Gpu) -> None:
    arguments = make(case)
    result = run_guarded(device, case.op, arguments)
    for name, value in case.reference(arguments).items():
        assert_close(f"{case.op}-{case.id} on {device.name}: {name}", result[name], value, case.length)
    if "counters" in result:
        assert not result["counters"].any()  # ready for the next launch
    if device is not DEVICES[0]:
        return
    rows = [name for name in case.rows if arguments[name] is not None]
    for cut in row_splits(arguments[rows[0]].shape[0])[:1] if rows else []:
        pieces = []
        for begin, end in pairwise(cut):
            sliced = {name: value[begin:end] if name in rows else value for name, value in arguments.items()}
            pieces.append(run_guarded(device, case.op, sliced))
        outputs = [name for name in case.reference(arguments) if name in rows]
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in outputs}
        assert_same_bits(f"{case.op}-{case.id} alone", joined, result, outputs)


@pytest.mark.parametrize("case", ATTENTION_BAD_CASES, ids=lambda case: f"{case.op}-{case.id}")
def test_refuses_what_the_kernel_cannot_do(case: BadCase) -> None:
    with pytest.raises(ValueError, match=case.message):
        DEVICES[0].run(case.op, case.make(torch.Generator().manual_seed(SEED)))


# --- what is moved ---------------------------------------------------------------------------------------------------


def exact_bytes(arguments: Arguments, *names: str) -> int:
    given = [arguments[name] for name in names if arguments[name] is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in given)


def fewest_bytes(case: OpCase, arguments: Arguments) -> tuple[dict[str, int], dict[str, int]]:
    """What must at least be read and written, by buffer or by buffers that one instruction may touch together."""
    if case.op == "embedding":
        return {"weight": arguments["out"].numel() * arguments["weight"].element_size()}, {
            "out": exact_bytes(arguments, "out")
        }
    if case.op == "embedding_int8":
        tokens, hidden = arguments["out"].shape
        return {"codes": tokens * hidden}, {"out": exact_bytes(arguments, "out")}
    if case.op == "rms_norm":
        residual = {"residual": exact_bytes(arguments, "residual")} if arguments["residual"] is not None else {}
        return {"x": exact_bytes(arguments, "x"), **residual}, {"out": exact_bytes(arguments, "out"), **residual}
    if case.op == "silu_mul":
        return {"gate_up": exact_bytes(arguments, "gate_up")}, {"out": exact_bytes(arguments, "out")}
    assert case.op == "rope_kv_write"
    angles = arguments["q"].shape[0] * arguments["cos_sin"].shape[1] * 4
    cached = (arguments["k"].numel() + arguments["v"].numel()) * arguments["kv_cache"].element_size()
    return {"q k v": exact_bytes(arguments, "q", "k", "v"), "cos_sin": angles}, {
        "q kv_cache": exact_bytes(arguments, "q") + cached
    }


SIMULATED = [device for device in DEVICES if isinstance(device, SimulatedDevice)][:1]


@pytest.mark.parametrize("device", SIMULATED, ids=lambda device: device.name)
@pytest.mark.parametrize(
    "case",
    [case for case in CUDA_CASES if case.op in ON_CUDA and "aligned" in case.id],
    ids=lambda case: f"{case.op}-{case.id}",
)
def test_moves_the_fewest_bytes(case: OpCase, device: SimulatedDevice) -> None:
    arguments = make(case)
    device.run(case.op, arguments)
    (launch,) = device.counters()
    for direction, expected in zip(("read", "written"), fewest_bytes(case, arguments), strict=True):
        for names, bytes_ in expected.items():
            moved = sum(launch["buffers"].get(name, {}).get(direction, 0) for name in names.split())
            assert moved == bytes_, f"{names}: {moved} bytes {direction}, {bytes_} would do"
    for direction in ("load", "store"):
        moved = launch["global"][direction]
        assert moved["sectors"] == moved["ideal_sectors"], (direction, moved)
        banks = launch["shared"][direction]
        assert banks["wavefronts"] == banks["ideal"], (direction, banks)
