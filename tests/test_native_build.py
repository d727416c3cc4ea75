# SPDX-License-Identifier: Apache-2.0
"""What must hold of the native sources and objects themselves."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastserve import _native

ROOT = Path(__file__).resolve().parent.parent
KERNEL_OBJECTS = sorted((ROOT / "build").glob("native-*/CMakeFiles/fastserve_cpu_*/csrc/cpu/*.o"))


def test_no_torch_header_in_native_code() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert len(sources) > 30
    for path in sources:
        assert not re.search(r'#include *[<"](torch|ATen|c10)/', path.read_text()), path


WIDE_ISAS = ["avx2", "avx512", "avx512bf16", "amxbf16"] if platform.machine() in ("x86_64", "AMD64") else []


@pytest.mark.parametrize("isa", WIDE_ISAS)
def test_no_symbol_of_a_wide_instruction_set_can_replace_a_shared_one(isa: str) -> None:
    """A weak function outside the kernels' own namespace, compiled for AVX-512, could be the copy that the linker
    keeps for every machine."""
    objects = [path for path in KERNEL_OBJECTS if f"fastserve_cpu_{isa}.dir" in str(path)]
    nm = shutil.which("nm")
    assert nm is not None, "nm (binutils) is part of every compiler installation"
    assert objects, "no kernel objects under build/; run `make native`"
    listing = subprocess.run([nm, "-C", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    assert f"fs::{isa}::" in listing
    data = re.compile(r"fs::Slot<.*>::cpu$|^DW\.ref\.|^guard variable for fs::")
    for line in listing.splitlines():
        match = re.match(r"[0-9a-f ]{16} ([WwVvu]) (.*)", line)
        if match and f"fs::{isa}::" not in match[2]:
            assert match[1] in "uV", line
            assert data.search(match[2]), line


def test_every_op_has_a_kernel_for_every_instruction_set() -> None:
    # AMX is for the ops that gain from it; the others run the kernels of avx512bf16.
    for op in _native.op_table():
        without_amx = {isa for isa in _native.isas() if not isa.startswith("amx")}
        assert set(op["cpu"]) >= without_amx, op["op"]
        assert op["op"] != "linear" or set(op["cpu"]) >= set(_native.isas())


def test_the_binary_has_no_torch_symbol() -> None:
    module = Path(_native.__file__)
    needed = subprocess.run(["readelf", "-d", str(module)], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed
    assert "torch" not in needed
    assert "c10" not in needed


@pytest.mark.parametrize("name", ["isa", "thread_pool"])
def test_other_processors_get_no_warning_either(name: str, tmp_path: Path) -> None:
    """The files that name x86 compile without it; the standard headers, which name it too, have been read by then."""
    other = tmp_path / "other_processor.h"
    other.write_text("#include <bits/stdc++.h>\n#undef __x86_64__\n")
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", "-include", str(other)]
    source = ROOT / "csrc" / "core" / f"{name}.cpp"
    done = subprocess.run(
        [os.environ.get("CXX", "c++"), *flags, "-S", "-o", os.devnull, str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
