# SPDX-License-Identifier: Apache-2.0
"""bench/cuda_report.py: shared memory as launches ask for it, occupancy, and the steady loop of a listing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from attention_cases import Shape, cuda_arguments
from cuda_device import SimulatedDevice, find_devices
from int4_cases import SYMMETRIC, linear_case

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools")]

from cuda_report import (  # noqa: E402
    MULTIPROCESSORS,
    blocks_per_multiprocessor,
    read_dynamic_shared,
    read_functions,
    steady_loops,
    template_arguments,
)
from ptxas_check import KernelUse, read_options  # noqa: E402

DEVICES = [device for device in find_devices() if isinstance(device, SimulatedDevice)]
LISTING = """
.text._Z5twicePf:
.L_x_1:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_2:
        /*0010*/                   LDGSTS.E.128 [R2], [R4.64] ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
        /*0030*/                   FSETP.GT.AND P0, PT, R2, RZ, PT ;
        /*0040*/                   FSEL R2, R2, R3, P0 ;
.L_x_3:
        /*0050*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0060*/                   HMMA.16816.F32 R16, R8, R14, R16 ;
        /*0070*/                   NOP ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
        /*0090*/               @P2 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
"""


@pytest.mark.skipif(not DEVICES, reason="needs the simulated device")
@pytest.mark.parametrize("file", ["attention", "linear_int4"])
def test_stated_shared_memory_is_what_launches_ask_for(file: str) -> None:
    generator = torch.Generator().manual_seed(1)
    runs = [cuda_arguments(generator, [1], [40], Shape(dim=dim, dtype=torch.float16, span=64)) for dim in (64, 128)]
    if file == "linear_int4":
        shapes = [(tokens, 40, 256, group, SYMMETRIC) for tokens in (1, 9, 17, 33, 64) for group in (64, 256)]
        runs = [linear_case(*shape, torch.float16).make(generator) for shape in shapes]
    stated = read_dynamic_shared((ROOT / "csrc" / "cuda" / f"{file}.cu").read_text())[f"{file}_kernel"]
    for arguments in runs:
        DEVICES[0].run(file, arguments)
        (launch,) = DEVICES[0].counters()
        instance = template_arguments(launch["kernel"], f"{file}_kernel")
        assert stated.bytes(instance, MULTIPROCESSORS["sm_80"]) == launch["dynamic_shared"], instance


def test_stated_shared_memory_is_arithmetic_only() -> None:
    stated = read_dynamic_shared("// shared: a_kernel <T, n> open('x')\n")["a_kernel"]
    with pytest.raises(SystemExit, match="only arithmetic"):
        stated.bytes("<float, 3>", MULTIPROCESSORS["sm_80"])


@pytest.mark.parametrize(
    ("registers", "dynamic", "arch", "blocks"),
    [(255, 81920, "sm_80", 2), (255, 81920, "sm_86", 1), (168, 49152, "sm_89", 2), (255, 0, "sm_90", 2)],
)
def test_occupancy_is_bounded_by_registers_and_shared_memory(
    registers: int, dynamic: int, arch: str, blocks: int
) -> None:
    use = KernelUse("k", arch, registers, 512, 0, 0)
    assert blocks_per_multiprocessor(use, 128, dynamic, MULTIPROCESSORS[arch]) == blocks


def test_steady_loop_is_the_innermost_with_products_without_its_detours() -> None:
    (function,) = read_functions(LISTING).values()
    assert steady_loops(function) == [["LDGSTS", "BRA", "HMMA", "HMMA", "BRA"]]


def test_options_for_ptxas_are_read_from_the_source() -> None:
    assert read_options("// ptxas options: -a=1 -b\n") == ["-Xptxas=-a=1", "-Xptxas=-b"]
