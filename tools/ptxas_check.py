# SPDX-License-Identifier: Apache-2.0
"""Compiles one CUDA file and holds its kernels to what the file states about them.

    ptxas_check.py --source rms_norm.cu --report rms_norm.ptxas -- nvcc ... -Xptxas -v ... rms_norm.cu

A file states a limit for each of its kernels in a comment, for all architectures and template instances:

    // ptxas: rms_norm_kernel <= 64 registers, 256 threads

(the threads of a block at usual shapes, for the occupancy in bench/cuda_report.py). A line

    // ptxas options: --register-usage-level=2

is passed on to ptxas. The build fails if a kernel
spills registers to memory, uses more registers than stated, or has no such line. What ptxas said is kept in the
report; bench/cuda_report.py reads it with `read_report`.
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USAGE = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
STATED = re.compile(r"^// ptxas: (\w+) <= (\d+) registers, (\d+) threads$", re.MULTILINE)


OPTIONS = re.compile(r"^// ptxas options: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class KernelUse:
    """What one instance of a kernel uses on one architecture."""

    symbol: str
    arch: str
    registers: int
    static_shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def read_report(text: str) -> list[KernelUse]:
    """The kernels in the output of `ptxas -v`, in its order."""
    kernels = []
    symbol = arch = ""
    stack = spilled = 0
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            symbol, arch = entry.groups()
        elif spills := SPILLS.search(line):
            stack = int(spills[1])
            spilled = int(spills[2]) + int(spills[3])
        elif (usage := USAGE.search(line)) and symbol:
            shared = SHARED.search(line)
            kernels.append(KernelUse(symbol, arch, int(usage[1]), int(shared[1]) if shared else 0, stack, spilled))
            symbol = ""
    return kernels


@dataclass(frozen=True)
class Statement:
    registers: int
    threads: int


def read_statements(source: str) -> dict[str, Statement]:
    """Kernel name -> what the CUDA source states about it."""
    return {name: Statement(int(registers), int(threads)) for name, registers, threads in STATED.findall(source)}


def read_options(source: str) -> list[str]:
    """What the source wants nvcc to be called with besides."""
    return [f"-Xptxas={option}" for line in OPTIONS.findall(source) for option in line.split()]


def kernel_name(symbol: str, names: list[str]) -> str | None:
    """Which of the names a mangled symbol stands for (a name is preceded by its length there)."""
    matches = [name for name in names if f"{len(name)}{name}" in symbol]
    return max(matches, key=len) if matches else None


def violations(source: str, kernels: list[KernelUse]) -> list[str]:
    """One line for each kernel that breaks its statement, and for each statement about no kernel."""
    stated = read_statements(source)
    problems = []
    for kernel in kernels:
        label = f"{kernel.symbol} on {kernel.arch}"
        name = kernel_name(kernel.symbol, list(stated))
        if name is None:
            problems.append(f"{label}: no line '// ptxas: NAME <= N registers, M threads' states its limits")
        elif kernel.registers > stated[name].registers:
            problems.append(f"{label}: uses {kernel.registers} registers; the file states {stated[name].registers}")
        if kernel.spill_bytes or kernel.stack_bytes:
            problems.append(f"{label}: {kernel.spill_bytes} bytes spilled, stack of {kernel.stack_bytes} bytes")
    used = {kernel_name(kernel.symbol, list(stated)) for kernel in kernels}
    problems += [f"{name}: stated, but no such kernel was compiled" for name in stated if name not in used]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the CUDA file with the statements")
    parser.add_argument("--report", type=Path, required=True, help="where to keep the output of ptxas")
    parser.add_argument("command", nargs="+", help="the compiler call, with -Xptxas -v")
    arguments = parser.parse_args()

    command = arguments.command + read_options(arguments.source.read_text())
    compiled = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    kernels = read_report(compiled.stderr)
    noise = re.compile(r"^ptxas info|bytes stack frame")
    for line in compiled.stderr.splitlines():
        if not noise.search(line.strip()):
            print(line, file=sys.stderr)
    if compiled.returncode != 0:
        return compiled.returncode
    arguments.report.write_text(compiled.stderr)
    problems = violations(arguments.source.read_text(), kernels)
    for problem in problems:
        print(f"{arguments.source.name}: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
