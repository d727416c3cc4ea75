# SPDX-License-Identifier: Apache-2.0
"""What this machine and this build can do, in words that a bug report can carry."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import fastserve

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "tqdm", "gguf")
MIN_TORCH = (2, 10)


def report(*, ops: bool = False) -> tuple[str, bool]:
    """The text, and whether the engine can run here. `ops` adds the table of ops, devices and dtypes."""
    lines = [f"fastserve {fastserve.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    healthy = True
    versions: list[str] = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            optional = package == "gguf"
            versions.append(f"{package} missing" + (" (only `fastserve convert` needs it)" if optional else ""))
            healthy = healthy and optional
    lines.append("packages: " + ", ".join(versions))
    torch_version = next((v.split()[1] for v in versions if v.startswith("torch ")), "0")
    if torch_version[0].isdigit() and tuple(int(n) for n in torch_version.split(".")[:2]) < MIN_TORCH:
        healthy = False
        lines.append(f"torch {torch_version} is too old: tensors are shared through an interface of torch 2.10")
    try:
        from fastserve import _native
    except ImportError as error:
        lines.append(f"native module: cannot be loaded ({error}); reinstall with `pip install .`")
        return "\n".join(lines), False

    sets = ", ".join(_native.isas())
    lines.append(f"cpu: {cpu_name()}, {_native.num_physical_cores()} physical cores usable")
    lines.append(f"instruction sets that run here: {sets}; in use: {_native.isa()}")
    if _native.isa() == "portable" and platform.machine() in ("x86_64", "AMD64"):
        lines.append("this processor has no AVX2: expect a fraction of the usual speed")
    lines.append("cuda: this build has no CUDA kernels")
    if ops:
        lines += ["", op_table()]
    return "\n".join(lines), healthy


def op_table() -> str:
    """The ops, what they mean and the dtypes that select their kernels per device, as a Markdown table."""
    from fastserve import _native

    rows = ["| op | meaning | selected by | cpu | cuda |", "| --- | --- | --- | --- | --- |"]
    for op in _native.op_table():
        dtypes = set(op["cpu"].values())
        cpu = dtypes.pop() if len(dtypes) == 1 else ", ".join(f"{isa}: {d}" for isa, d in op["cpu"].items())
        cells = (op["op"], op["meaning"], op["variant"], cpu or "-", op["cuda"] or "-")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or sys.platform
