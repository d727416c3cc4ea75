# SPDX-License-Identifier: Apache-2.0
"""One report of everything that needs a GPU: `make gpu-report`.

    python bench/gpu_report.py --out build/gpu_report            on the first GPU of this machine
    python bench/gpu_report.py --out build/gpu_report --simulated     a rehearsal on the simulated device

Builds the kernels for that GPU, runs the whole test suite on it, the CUDA ops under compute-sanitizer if there is one,
and the CUDA benchmarks, each beside its roofline and the engines that are installed. Writes report.md and report.json,
also when steps fail; the exit status is then 1. Nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEEP_LINES = 40  # of a step's output


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


def machine(simulated: bool) -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "commit": output_of(["git", "rev-parse", "HEAD"]),
        "changes": output_of(["git", "status", "--short"]),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if not simulated:
        query = "--query-gpu=name,compute_cap,driver_version,memory.total,power.limit,clocks.max.sm"
        facts["gpus"] = output_of(["nvidia-smi", query, "--format=csv,noheader"]).splitlines()
        facts["nvcc"] = output_of(["nvcc", "--version"]).splitlines()[-1:]
    return facts


def run_command(command: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    print("$", " ".join(command), flush=True)
    run = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )
    tail = run.stdout.splitlines()[-KEEP_LINES:]
    print("\n".join(tail[-3:]), flush=True)
    return {"command": " ".join(command), "status": run.returncode, "output": tail}


def build() -> dict[str, Any]:
    capability = output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]).splitlines()[0]
    flags = f"-DFASTSERVE_CUDA=ON -DFASTSERVE_CUDA_ARCHS={capability.replace('.', '')}"
    return run_command([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], {"CMAKE_ARGS": flags})


def tests(simulated: bool) -> dict[str, Any]:
    # The rehearsal runs the tests of the CUDA ops only: the others have nothing to do with the device.
    which = ["tests/cuda/test_cuda_int4.py", "tests/cuda/test_int4_layers.py"] if simulated else []
    return run_command([sys.executable, "-m", "pytest", "-q", *which])


def sanitizer(tool: str) -> dict[str, Any]:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"skipped": "compute-sanitizer is not installed"}
    command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "pytest", "-q", "-x"]
    return run_command([*command, "tests/cuda/test_cuda_ops.py"])


def kernel_use(build_folder: Path) -> dict[str, Any]:
    return run_command([sys.executable, "bench/cuda_report.py", "--build", str(build_folder)])


def steps(simulated: bool) -> dict[str, Callable[[], Any]]:
    sys.path.insert(0, str(ROOT / "tests" / "cuda"))
    sys.path.insert(0, str(ROOT / "tests"))

    def w4a16() -> Any:
        import gpu_w4a16

        if not simulated:
            return gpu_w4a16.run()
        from cuda_device import SimulatedDevice, find_devices

        devices = [device for device in find_devices() if isinstance(device, SimulatedDevice)]
        if not devices:
            raise RuntimeError("there is no build/sim: run `make simulated`")
        return {"counted": gpu_w4a16.counted(devices[0])}

    def attention() -> Any:
        import gpu_attention

        return gpu_attention.run() if not simulated else {"skipped": "times need a GPU"}

    if simulated:
        return {"tests": lambda: tests(True), "w4a16": w4a16, "attention": attention}
    return {
        "build": build,
        "kernels": lambda: kernel_use(next(iter(ROOT.glob("build/native*/cuda")), ROOT / "build" / "cuda").parent),
        "tests": lambda: tests(False),
        **{tool: lambda tool=tool: sanitizer(tool) for tool in ("memcheck", "racecheck")},
        "w4a16": w4a16,
        "attention": attention,
    }


def failed(result: Any) -> bool:
    return isinstance(result, dict) and (result.get("status", 0) != 0 or "error" in result)


def table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0])
    shown = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(names), *shown)]


def markdown(value: Any, heading: int = 3) -> list[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [*table(value), ""]
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [line for rows in value for line in markdown(rows, heading)]
    if not isinstance(value, dict):
        return [str(value), ""]
    lines = []
    for name, part in value.items():
        if name in ("output", "error", "gpus", "nvcc"):
            text = part if isinstance(part, list) else str(part).splitlines()
            lines += [f"{name}:", "", "```", *text, "```", ""]
        elif isinstance(part, dict | list):
            lines += ["#" * heading + f" {name}", "", *markdown(part, heading + 1)]
        else:
            lines += [f"- {name}: {part:.4g}" if isinstance(part, float) else f"- {name}: {part}"]
    return [*lines, ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_report", help="folder of the report")
    parser.add_argument("--simulated", action="store_true", help="rehearse on the simulated device")
    parser.add_argument("--only", nargs="*", help="names of steps; default: all")
    arguments = parser.parse_args()
    if not arguments.simulated and shutil.which("nvidia-smi") is None:
        raise SystemExit("there is no nvidia-smi, so no GPU; --simulated rehearses on the simulated device")
    report: dict[str, Any] = {"simulated": arguments.simulated, "machine": machine(arguments.simulated), "steps": {}}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, step in steps(arguments.simulated).items():
        if arguments.only and name not in arguments.only:
            continue
        print(f"== {name}", flush=True)
        start = time.monotonic()
        try:
            result = step()
        except Exception:  # whatever it is: the machine is rented, and the other steps can still be measured
            result = {"error": traceback.format_exc()}
        report["steps"][name] = {"seconds": round(time.monotonic() - start, 1), "result": result}
        # After each step, so that a machine that hangs leaves what it got to.
        (arguments.out / "report.json").write_text(json.dumps(report, indent=1))
        lines = ["# fastserve on a " + ("simulated device" if arguments.simulated else "GPU"), ""]
        lines += ["## machine", "", *markdown(report["machine"])]
        for done, outcome in report["steps"].items():
            mark = "failed" if failed(outcome["result"]) else "done"
            lines += [f"## {done}: {mark}, {outcome['seconds']} s", "", *markdown(outcome["result"])]
        (arguments.out / "report.md").write_text("\n".join(lines))
    print(f"report: {arguments.out}/report.md and report.json")
    return int(any(failed(outcome["result"]) for outcome in report["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
