# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels need, from the compiler alone: no GPU takes part.

    python bench/cuda_report.py                        registers, shared memory, occupancy of every built kernel
    python bench/cuda_report.py --sass rms_norm        the instruction mix of its hot loop (or whole kernel)

The first reads what the build kept of ptxas (folder --build, FASTSERVE_CUDA=ON). ptxas knows static shared memory only:
where a file's kernels get theirs at the launch, the occupancy is an upper bound, marked with "<=". The second compiles
the file for one architecture and needs nvdisasm: pip install nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from ptxas_check import KernelUse, kernel_name, read_report, read_statements  # noqa: E402


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor has; sizes in bytes."""

    warps: int
    blocks: int
    shared: int
    registers: int = 65536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 << 10),
    "sm_86": Multiprocessor(48, 16, 100 << 10),
    "sm_89": Multiprocessor(48, 24, 100 << 10),
    "sm_90": Multiprocessor(64, 32, 228 << 10),
    "sm_100": Multiprocessor(64, 32, 228 << 10),
    "sm_120": Multiprocessor(48, 24, 100 << 10),
}
RESERVED_SHARED = 1 << 10  # per block
SHARED_UNIT = 128
REGISTER_UNIT = 256  # per warp


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_multiprocessor(use: KernelUse, threads: int, has: Multiprocessor) -> int:
    """How many blocks of `threads` threads are resident at once."""
    warps = round_up(threads, 32) // 32
    registers = warps * round_up(use.registers * 32, REGISTER_UNIT)
    shared = round_up(use.static_shared_bytes + RESERVED_SHARED, SHARED_UNIT)
    return min(has.blocks, has.warps // warps, has.registers // registers, has.shared // shared)


def template_arguments(symbol: str, name: str) -> str:
    """The readable template arguments of a mangled kernel, "" if it has none."""
    tool = shutil.which("c++filt")
    if tool is None:
        return symbol
    demangled = subprocess.run([tool, symbol], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"{name}(<.*?>)\(", demangled)
    return found[1].replace("fs::cuda::", "") if found else ""


def print_usage(build: Path) -> None:
    reports = sorted(build.glob("cuda/*.ptxas"))
    if not reports:
        raise SystemExit(
            f"no {build}/cuda/*.ptxas: build with FASTSERVE_CUDA=ON, or name the build folder with --build"
        )
    print(f"{'kernel':52} {'arch':7} {'regs':>4} {'shared':>6} {'threads':>7} {'blocks/SM':>9} {'occupancy':>9}")
    for report in reports:
        sources = [ROOT / "csrc" / "cuda" / f"{report.stem}{ending}" for ending in (".cu", ".cuh")]
        statements = read_statements(sources[0].read_text())
        dynamic = any("extern __shared__" in path.read_text() for path in sources if path.exists())
        for use in read_report(report.read_text()):
            name = kernel_name(use.symbol, list(statements))
            if name is None or use.arch not in MULTIPROCESSORS:
                continue
            threads = statements[name].threads
            has = MULTIPROCESSORS[use.arch]
            blocks = blocks_per_multiprocessor(use, threads, has)
            occupancy = blocks * threads / 32 / has.warps
            label = name.removesuffix("_kernel") + template_arguments(use.symbol, name)
            print(
                f"{label:52} {use.arch:7} {use.registers:4} {use.static_shared_bytes:6} {threads:7} {blocks:9} "
                f"{'<=' if dynamic else '':3}{occupancy:6.0%}"
            )


# --- machine code ----------------------------------------------------------------------------------------------------

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")
FUNCTION = re.compile(r"^\.text\.(\w+):")
LABEL = re.compile(r"^(\.L\w+):")
TARGET = re.compile(r"`\((\.L\w+)\)")


@dataclass
class Loop:
    opcodes: list[str]
    is_loop: bool


def hot_loops(listing: str) -> dict[str, Loop]:
    """Function -> the instructions of its longest loop (backward branch), or all of them if it has none."""
    loops: dict[str, Loop] = {}
    name = ""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        line = line.strip()
        if function := FUNCTION.match(line):
            name, opcodes, labels = function[1], [], {}
            loops[name] = Loop(opcodes, False)
        elif label := LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif (instruction := INSTRUCTION.search(line)) and name:
            opcodes.append(instruction[1])
            target = TARGET.search(instruction[2])
            if instruction[1] != "BRA" or target is None or target[1] not in labels:
                continue
            body = opcodes[labels[target[1]] :]
            # The jump to itself after the last instruction is padding.
            if len(body) > 1 and (not loops[name].is_loop or len(body) > len(loops[name].opcodes)):
                loops[name] = Loop(body, True)
    return loops


def find_nvdisasm() -> str:
    if tool := shutil.which("nvdisasm"):
        return tool
    try:
        spec = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        spec = None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "bin" / "nvdisasm").exists():
            return str(Path(folder) / "bin" / "nvdisasm")
    raise SystemExit("nvdisasm was not found: pip install nvidia-cuda-nvdisasm")


def print_mix(kernel_file: str, arch: str, nvcc: str) -> None:
    source = ROOT / "csrc" / "cuda" / f"{kernel_file}.cu"
    statements = read_statements(source.read_text())
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        flags = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-arch={arch}"]
        subprocess.run([nvcc, *flags, "-cubin", str(source), "-o", str(cubin)], check=True)
        disassemble = [find_nvdisasm(), "-c", str(cubin)]
        listing = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    for symbol, loop in hot_loops(listing).items():
        name = kernel_name(symbol, list(statements))
        if name is None:
            continue
        counts = Counter(opcode for opcode in loop.opcodes if opcode != "NOP")
        mix = ", ".join(f"{opcode} {count}" for opcode, count in counts.most_common(16))
        what = "longest loop" if loop.is_loop else "whole kernel"
        label = name.removesuffix("_kernel") + template_arguments(symbol, name)
        print(f"{label} on {arch}, {what}, {len(loop.opcodes)} instructions:\n    {mix}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "sim", help="build folder (default build/sim)")
    parser.add_argument("--sass", metavar="FILE", help="a file of csrc/cuda, without its ending")
    parser.add_argument("--arch", default="sm_80", choices=list(MULTIPROCESSORS), help="for --sass")
    parser.add_argument("--nvcc", default=shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", help="for --sass")
    arguments = parser.parse_args()
    if arguments.sass:
        print_mix(arguments.sass, arguments.arch, arguments.nvcc)
    else:
        print_usage(arguments.build)


if __name__ == "__main__":
    main()
