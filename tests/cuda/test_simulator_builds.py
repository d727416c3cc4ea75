# SPDX-License-Identifier: Apache-2.0
"""The builds of the simulated device (AVX-512, AVX2, portable) are one device: on the kernels of this project they give
the same bits, counters and faults. What each instruction does is tested per build in tests/ptxsim/tests."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import ATTENTION_CASES
from cuda_cases import CUDA_CASES
from cuda_device import SimulatedDevice, load_simulated
from int4_cases import ZERO_POINTS
from int4_cases import linear_case as int4_case
from linear_cases import linear_case

import op_cases
from op_cases import OpCase

BUILDS = ["portable", "avx2", "avx512"]
NEEDS = {"portable": set(), "avx2": {"avx2", "fma", "f16c"}, "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}}


def runs_here() -> list[str]:
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return [build for build in BUILDS if NEEDS[build] <= flags]


def cases() -> Iterator[OpCase]:
    """Some of every op."""
    yield from CUDA_CASES[::5]
    yield from ATTENTION_CASES[::7]
    yield from [c for c in op_cases.load().cases if c.op in ("sample", "token_logprobs")][::4]
    yield int4_case(5, 160, 832, 64, ZERO_POINTS, torch.float16)
    yield int4_case(40, 96, 320, 32, ZERO_POINTS, torch.bfloat16)
    yield linear_case(40, 160, 832, torch.float16)


def bits_of(arguments: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(arguments.items()):
        if torch.is_tensor(value):
            elements = torch.cat([value.flatten()])  # a copy, so that its strides are those of an array
            digest.update(name.encode() + elements.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def print_trace() -> None:
    """What the build that PTXSIM_ISA names makes of the cases, and of a kernel whose fences do nothing."""
    module = load_simulated()
    assert module is not None
    trace: dict[str, Any] = {}
    for case in cases():
        arguments = case.make(torch.Generator().manual_seed(7))
        device = SimulatedDevice(module, "random", seed=5)
        device.run(case.op, arguments)
        counters = [{k: v for k, v in launch.items() if k != "seconds"} for launch in device.counters()]
        trace[f"{case.op}-{case.id}"] = [bits_of(arguments), counters]
    case = linear_case(5, 160, 832, torch.bfloat16)
    try:
        SimulatedDevice(module, "late", 1, weak_memory=True, ignore_order=True).run(
            case.op, case.make(torch.Generator().manual_seed(7))
        )
    except ValueError as error:
        trace["fault"] = re.sub(r"0x[0-9a-f]{6,}", "ADDRESS", str(error))
    print(json.dumps(trace))


@pytest.mark.skipif(load_simulated() is None, reason="the simulated device is not built")
@pytest.mark.skipif(len(runs_here()) < 2, reason="this machine can run one build only")
def test_builds_agree_on_bits_counters_and_faults() -> None:
    command = [sys.executable, "-c", "import test_simulator_builds; test_simulator_builds.print_trace()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    running = {
        build: subprocess.Popen(command, env={**environment, "PTXSIM_ISA": build}, stdout=subprocess.PIPE, text=True)
        for build in runs_here()
    }
    output = {build: process.communicate(timeout=300)[0] for build, process in running.items()}
    assert {process.returncode for process in running.values()} == {0}
    traces = {build: json.loads(text) for build, text in output.items()}
    reference = traces.pop("portable")
    assert "race on global memory" in reference["fault"]
    assert len({name.split("-")[0] for name in reference}) >= 9  # of every op
    for build, trace in traces.items():
        assert trace.keys() == reference.keys()
        for name, seen in trace.items():
            assert seen == reference[name], f"{name} on the {build} build and on the portable one"
