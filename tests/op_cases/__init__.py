# SPDX-License-Identifier: Apache-2.0
"""The op-case table: one list of cases per op drives its tests on every device and its microbenchmarks.

A module of this package that has a list `CASES` (and perhaps `BAD_CASES`) is found by its file name; to add an
op, add a file. A case makes its own inputs from a seeded generator and states the exact answer in float64; how
it is run, poisoned, guarded and compared is `op_checks.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """An output's exact value in float64, and per element the sum of the magnitudes of the terms it is made of.

    An error of `length` roundings is at most `length * eps * magnitude`, so `magnitude` is what the tolerance
    scales with; without it |value| is used, which is right where nothing cancels.
    """

    value: torch.Tensor
    magnitude: torch.Tensor | None = None
    # The same of those terms that an op with `amx_operands` rounds to bfloat16 on AMX: by at most 2^-9 each.
    rounded: torch.Tensor | None = None


@dataclass(frozen=True)
class OpCase:
    op: str
    id: str
    # All arguments by name. Outputs are given too (their content does not matter unless the op updates them).
    make: Callable[[torch.Generator], Arguments]
    # The outputs by name: a float64 tensor, or Expected; integer tensors are compared exactly.
    reference: Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor | Expected]]
    # How many roundings of the accumulator one output element sees (its accumulation length plus a few);
    # 0: the output must be exact.
    length: int
    # Arguments whose first dimension is the row of the batch: their rows must not influence one another.
    rows: tuple[str, ...] = ()
    # Arguments that instruction sets with a bf16 dot product round to bf16 first.
    bf16_operands: tuple[str, ...] = ()
    # Arguments that only AMX rounds to bf16 first; see also `Expected.rounded`.
    amx_operands: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadCase:
    """Arguments that the op must refuse with a ValueError whose text matches `message` (a regular expression)."""

    op: str
    id: str
    make: Callable[[torch.Generator], Arguments]
    message: str


@dataclass
class CaseTable:
    cases: list[OpCase] = field(default_factory=list)
    bad_cases: list[BadCase] = field(default_factory=list)


def load() -> CaseTable:
    table = CaseTable()
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        table.cases += getattr(module, "CASES", [])
        table.bad_cases += getattr(module, "BAD_CASES", [])
    return table


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator) * scale


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An output."""
    return torch.zeros(*shape, dtype=dtype)


def widen_rows(tensor: torch.Tensor, extra: int = 5) -> torch.Tensor:
    """The same values as rows of a wider matrix: row stride = width + extra."""
    wide = torch.zeros(tensor.shape[0], tensor[0:1].numel() + extra, dtype=tensor.dtype)
    strides = (wide.stride(0), *tensor.stride()[1:])
    view = wide.as_strided(tensor.shape, strides)
    view.copy_(tensor)
    return view
