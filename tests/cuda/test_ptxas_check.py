# SPDX-License-Identifier: Apache-2.0
"""The build step that holds CUDA kernels to their stated registers."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from ptxas_check import KernelUse, Statement, read_report, read_statements, violations  # noqa: E402

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2fs4cuda12scale_kernelIfEEvPf' for 'sm_80'
ptxas info    : Function properties for _ZN2fs4cuda12scale_kernelIfEEvPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 128 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN2fs4cuda12scale_kernelIfEEvPf' for 'sm_90'
ptxas info    : Function properties for _ZN2fs4cuda12scale_kernelIfEEvPf
    16 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 400 bytes cmem[0]
"""
STATES_40 = "// ptxas: scale_kernel <= 40 registers, 64 threads\n"
SYMBOL = "_ZN2fs4cuda12scale_kernelIfEEvPf"


def test_reads_what_ptxas_says() -> None:
    assert read_report(REPORT) == [
        KernelUse(SYMBOL, "sm_80", 24, 128, 0, 0),
        KernelUse(SYMBOL, "sm_90", 40, 0, 16, 28),
    ]


def test_statement_is_a_whole_comment_line() -> None:
    source = "// ptxas: scale_kernel <= 40 registers, 64 threads\n//ptxas: other <= 1 registers, 32 threads\n"
    assert read_statements(source) == {"scale_kernel": Statement(registers=40, threads=64)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (STATES_40, ["28 bytes spilled"]),
        (
            "// ptxas: scale_kernel <= 39 registers, 64 threads",
            ["uses 40 registers; the file states 39", "28 bytes spilled"],
        ),
        ("", ["no line", "no line", "28 bytes spilled"]),
        (
            "// ptxas: scale_kernel <= 40 registers, 64 threads\n// ptxas: gone <= 8 registers, 64 threads",
            ["28 bytes spilled", "gone: stated"],
        ),
    ],
)
def test_names_each_violation(source: str, expected: list[str]) -> None:
    found = violations(source, read_report(REPORT))
    assert len(found) == len(expected)
    assert all(text in line for text, line in zip(expected, found, strict=True))


@pytest.mark.parametrize(("limit", "status"), [(40, 1), (24, 0), (23, 1)])
def test_fails_the_build(tmp_path: Path, limit: int, status: int) -> None:
    source = tmp_path / "scale.cu"
    source.write_text(f"// ptxas: scale_kernel <= {limit} registers, 64 threads\n")
    said = REPORT if limit == 40 else REPORT[: REPORT.index("ptxas info    : Compiling", 100)]
    compiler = [sys.executable, "-c", f"import sys; sys.stderr.write({said!r})"]
    tool = [sys.executable, str(ROOT / "tools/ptxas_check.py"), "--source", str(source)]
    run = subprocess.run([*tool, "--report", str(tmp_path / "report"), "--", *compiler], capture_output=True, text=True)
    assert run.returncode == status
    assert ("scale.cu:" in run.stderr) == (status == 1)
    assert (tmp_path / "report").read_text() == said
