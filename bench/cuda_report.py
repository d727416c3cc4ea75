# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels need, from the compiler alone: no GPU takes part.

    python bench/cuda_report.py                        registers, shared memory, occupancy of every built kernel
    python bench/cuda_report.py --sass attention       machine instructions of the steady loops, or of the kernel
    python bench/cuda_report.py --sass attention --arch sm_90

The first reads what the build kept of ptxas (folder --build, FASTSERVE_CUDA=ON). ptxas knows static shared memory only;
what a launch asks for besides is stated by the file in a line like this one, in terms of the template arguments:

    // shared: attention_kernel <T, kDim> 49152 + 256 * kDim if is_wide else 49152

(`is_wide`: the multiprocessor has more than 100 KB). tests/cuda compares the line with real launches.

The second compiles the file for one architecture and needs nvdisasm: pip install nvidia-cuda-nvdisasm. A steady loop is
an innermost loop with tensor-core products (MMA). What is counted is one way around it: the one with the most products,
then with all its copies, then with the fewest instructions, so that what happens at edges only is left out.
"""

from __future__ import annotations

import argparse
import ast
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

from ptxas_check import KernelUse, kernel_name, read_options, read_report, read_statements  # noqa: E402


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


def blocks_per_multiprocessor(use: KernelUse, threads: int, dynamic_shared: int, has: Multiprocessor) -> int:
    """How many blocks of `threads` threads are resident at once."""
    warps = round_up(threads, 32) // 32
    registers = warps * round_up(use.registers * 32, REGISTER_UNIT)
    shared = round_up(use.static_shared_bytes + dynamic_shared + RESERVED_SHARED, SHARED_UNIT)
    return min(has.blocks, has.warps // warps, has.registers // registers, has.shared // shared)


def template_arguments(symbol: str, name: str) -> str:
    """The readable template arguments of a mangled kernel, "" if it has none."""
    tool = shutil.which("c++filt")
    if tool is None:
        return symbol
    demangled = subprocess.run([tool, symbol], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"{name}(<.*?>)\(", demangled)
    return found[1].replace("fs::cuda::", "") if found else ""


# --- shared memory that a launch asks for -----------------------------------------------------------------------------

SHARED = re.compile(r"^// shared: (\w+) <([^>]*)> (.+)$", re.MULTILINE)
ARITHMETIC = (
    ast.Expression,
    ast.BinOp,
    ast.IfExp,
    ast.Compare,
    ast.Name,
    ast.Constant,
    ast.operator,
    ast.cmpop,
    ast.Load,
)


@dataclass(frozen=True)
class DynamicShared:
    parameters: list[str]
    formula: str

    def bytes(self, arguments: str, has: Multiprocessor) -> int:
        """For template arguments as `template_arguments` gives them."""
        values = [argument.strip().split(")")[-1] for argument in arguments.strip("<>").split(",")]
        names: dict[str, int] = {"is_wide": has.shared > 100 << 10}
        for parameter, value in zip(self.parameters, values, strict=True):
            if value in ("true", "false"):
                names[parameter] = value == "true"
            elif value.isdigit():
                names[parameter] = int(value)
        tree = ast.parse(self.formula, mode="eval")
        for node in ast.walk(tree):
            if not isinstance(node, ARITHMETIC):
                raise SystemExit(f"shared memory stated as {self.formula!r}: only arithmetic is understood")
        return int(eval(compile(tree, "formula", "eval"), {"__builtins__": {}}, names))


def read_dynamic_shared(source: str) -> dict[str, DynamicShared]:
    """Kernel name -> what the CUDA source states about its launches; none: no shared memory but static."""
    return {
        name: DynamicShared([p.strip() for p in parameters.split(",")], formula)
        for name, parameters, formula in SHARED.findall(source)
    }


def print_usage(build: Path) -> None:
    reports = sorted(build.glob("cuda/*.ptxas"))
    if not reports:
        raise SystemExit(
            f"no {build}/cuda/*.ptxas: build with FASTSERVE_CUDA=ON, or name the build folder with --build"
        )
    print(f"{'kernel':52} {'arch':7} {'regs':>4} {'shared':>6} {'threads':>7} {'blocks/SM':>9} {'occupancy':>9}")
    for report in reports:
        source = (ROOT / "csrc" / "cuda" / f"{report.stem}.cu").read_text()
        statements, stated_shared = read_statements(source), read_dynamic_shared(source)
        for use in read_report(report.read_text()):
            name = kernel_name(use.symbol, list(statements))
            if name is None or use.arch not in MULTIPROCESSORS:
                continue
            threads = statements[name].threads
            has = MULTIPROCESSORS[use.arch]
            arguments = template_arguments(use.symbol, name)
            dynamic = stated_shared[name].bytes(arguments, has) if name in stated_shared else 0
            blocks = blocks_per_multiprocessor(use, threads, dynamic, has)
            occupancy = blocks * threads / 32 / has.warps
            print(
                f"{name.removesuffix('_kernel') + arguments:52} {use.arch:7} {use.registers:4} "
                f"{use.static_shared_bytes + dynamic:6} {threads:7} {blocks:9} {occupancy:9.0%}"
            )


# --- machine code ----------------------------------------------------------------------------------------------------

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
FUNCTION = re.compile(r"^\.text\.(\w+):")
LABEL = re.compile(r"^(\.L\w+):")
TARGET = re.compile(r"`\((\.L\w+)\)")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # without modifiers
    is_conditional: bool
    target: str  # label, or ""


@dataclass
class Function:
    code: list[Instruction]
    labels: dict[str, int]

    def successors(self, at: int) -> list[int]:
        instruction = self.code[at]
        ends = instruction.opcode in ("BRA", "EXIT", "RET") and not instruction.is_conditional
        following = [] if ends or at + 1 == len(self.code) else [at + 1]
        jumps = instruction.opcode == "BRA" and instruction.target in self.labels
        return [*following, self.labels[instruction.target]] if jumps else following


def read_functions(listing: str) -> dict[str, Function]:
    """The functions of what `nvdisasm -c` prints."""
    functions: dict[str, Function] = {}
    current: Function | None = None
    for line in map(str.strip, listing.splitlines()):
        if function := FUNCTION.match(line):
            current = functions[function[1]] = Function([], {})
        elif current is None:
            continue
        elif label := LABEL.match(line):
            current.labels[label[1]] = len(current.code)
        elif found := INSTRUCTION.search(line):
            predicate, opcode, operands = found.groups()
            # A branch may take its predicate as an operand; BRA.DIV is taken by a warp that has diverged.
            also = opcode.startswith("BRA.DIV") or re.match(r"\s*!?U?P\d", operands) is not None
            target = TARGET.search(operands)
            base = opcode.split(".")[0]
            current.code.append(
                Instruction(base, bool(predicate) or (base == "BRA" and also), target[1] if target else "")
            )
    return functions


def is_product(opcode: str) -> bool:
    return "MMA" in opcode


def way_around(function: Function, begin: int, end: int) -> list[str]:
    """The opcodes of the steady way from `begin` back to it, through instructions up to `end`; [] if there is none."""
    best: dict[int, tuple[int, int, int]] = {begin: (0, 0, 0)}  # products, copies, less instructions
    before: dict[int, int] = {}
    last: tuple[tuple[int, int, int], int] | None = None
    for at in range(begin, end + 1):
        if at not in best:
            continue
        opcode = function.code[at].opcode
        products, copies, others = best[at]
        score = (products + is_product(opcode), copies + (opcode == "LDGSTS"), others - (opcode != "NOP"))
        for to in function.successors(at):
            if to == begin and (last is None or score > last[0]):
                last = (score, at)
            elif at < to <= end and (to not in best or score > best[to]):
                best[to] = score
                before[to] = at
    if last is None:
        return []
    way = [last[1]]
    while way[-1] != begin:
        way.append(before[way[-1]])
    return [function.code[at].opcode for at in reversed(way) if function.code[at].opcode != "NOP"]


def steady_loops(function: Function) -> list[list[str]]:
    """One way around each innermost loop that has products, in the order of the code."""
    ends: dict[int, int] = {}
    for at in range(len(function.code)):
        for to in function.successors(at):
            if to < at:
                ends[to] = max(ends.get(to, 0), at)
    loops = {(begin, end): way_around(function, begin, end) for begin, end in sorted(ends.items())}
    loops = {place: way for place, way in loops.items() if any(is_product(opcode) for opcode in way)}
    return [
        way
        for (begin, end), way in loops.items()
        if not any(other != (begin, end) and begin <= other[0] and other[1] <= end for other in loops)
    ]


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


def describe(what: str, opcodes: list[str]) -> str:
    counts = Counter(opcode for opcode in opcodes if opcode != "NOP")
    products = sum(count for opcode, count in counts.items() if is_product(opcode))
    per_product = f", {counts.total() / products:.2f} for each of {products} MMA" if products else ""
    mix = ", ".join(f"{opcode} {count}" for opcode, count in counts.most_common(14))
    return f"    {what}: {counts.total()} instructions{per_product}\n        {mix}"


def print_mix(kernel_file: str, arch: str, nvcc: str) -> None:
    source = ROOT / "csrc" / "cuda" / f"{kernel_file}.cu"
    statements = read_statements(source.read_text())
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        flags = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-arch={arch}", *read_options(source.read_text())]
        subprocess.run([nvcc, *flags, "-cubin", str(source), "-o", str(cubin)], check=True)
        disassemble = [find_nvdisasm(), "-c", str(cubin)]
        listing = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    for symbol, function in read_functions(listing).items():
        name = kernel_name(symbol, list(statements))
        if name is None:
            continue
        print(f"{name.removesuffix('_kernel') + template_arguments(symbol, name)} on {arch}")
        loops = steady_loops(function)
        for loop in loops:
            print(describe("steady loop", loop))
        if not loops:
            print(describe("whole kernel", [instruction.opcode for instruction in function.code]))


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
