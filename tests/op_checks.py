# SPDX-License-Identifier: Apache-2.0
"""Run one native op on poisoned, guarded memory and compare what it wrote with a float64 reference."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastserve import _native
from op_cases import Arguments, Expected, OpCase

GUARD_BYTES = 256
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECS = {row["op"]: {spec["name"]: spec for spec in row["args"]} for row in _native.op_table()}


def isas_of(op: str) -> list[str]:
    """The instruction sets that run here and have a kernel of their own for the op."""
    own = next(row["cpu"] for row in _native.op_table() if row["op"] == op)
    return [isa for isa in _native.isas() if isa in own]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as integers of its element size: NaNs compare like anything else."""
    return tensor.view(INTEGERS[tensor.element_size()])


@dataclass
class Guarded:
    """A tensor of the same shape, strides and content inside a larger poisoned allocation."""

    view: torch.Tensor
    storage: torch.Tensor
    before: torch.Tensor

    @staticmethod
    def copy_of(tensor: torch.Tensor) -> Guarded:
        guard = GUARD_BYTES // tensor.element_size()
        span = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        storage = poison(torch.empty((span if tensor.numel() else 0) + 2 * guard, dtype=tensor.dtype))
        view = storage.as_strided(tensor.shape, tensor.stride(), guard)
        view.copy_(tensor)
        return Guarded(view, storage, storage.clone())

    def assert_only_view_changed(self, label: str) -> None:
        changed = bits(self.storage) != bits(self.before)
        changed.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(False)
        assert not changed.any(), (
            f"{label}: wrote outside its elements, at element offsets "
            f"{(changed.nonzero().flatten() - self.view.storage_offset()).tolist()[:10]}"
        )

    def assert_unchanged(self, label: str) -> None:
        changed = bits(self.storage) != bits(self.before)
        assert not changed.any(), f"{label}: an input was written at {changed.nonzero().flatten().tolist()[:10]}"


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """NaN, or for integers a value that no index may have."""
    return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def run_guarded(op: str, arguments: Arguments) -> Arguments:
    """Call the op on guarded copies; returns the copies after checking that nothing else was touched."""
    guarded = {name: Guarded.copy_of(value) for name, value in arguments.items() if torch.is_tensor(value)}
    for name, copy in guarded.items():
        if SPECS[op][name]["access"] == "write":
            poison(copy.view)
            copy.before = copy.storage.clone()
    values = {name: guarded[name].view if name in guarded else value for name, value in arguments.items()}
    getattr(_native.ops, op)(**values)
    for name, copy in guarded.items():
        if SPECS[op][name]["access"] == "read":
            copy.assert_unchanged(f"{op}: {name}")
        else:
            copy.assert_only_view_changed(f"{op}: {name}")
    return values


def assert_close(
    label: str, given: torch.Tensor, expected: torch.Tensor | Expected, length: int, on_tiles: bool = False
) -> None:
    """NaN and inf positions first, then the element that exceeds its allowed error the most."""
    if isinstance(expected, torch.Tensor):
        expected = Expected(expected)
    want = expected.value
    assert given.shape == want.shape, f"{label}: shape {list(given.shape)}, expected {list(want.shape)}"
    if not want.is_floating_point():
        different = given != want
        assert not different.any(), f"{label}: differs at {different.nonzero().tolist()[:10]}"
        return
    got = given.double()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        different = kind(got) != kind(want)
        assert not different.any(), (
            f"{label}: {kind.__name__} at {kind(got).nonzero().tolist()[:10]}, expected at "
            f"{kind(want).nonzero().tolist()[:10]}"
        )
    allowed = allowed_error(given.dtype, expected, length)
    if on_tiles and expected.rounded is not None:
        # Weights of a mean: each counts in the numerator and in the sum. 2^-17: products of two such errors.
        allowed = allowed + 2 * (2.0**-9 + 2.0**-17) * torch.nan_to_num(expected.rounded)
    error = torch.where(torch.isfinite(want), (got - want).abs(), 0.0)
    excess = error - allowed
    if excess.numel() and excess.max() > 0:
        index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{label}: {int((excess > 0).sum())} of {excess.numel()} elements are off; worst at {list(index)}: "
            f"given {got[index]:.9g}, expected {want[index]:.9g}, error {error[index]:.3g}, "
            f"allowed {allowed[index]:.3g}"
        )


def allowed_error(dtype: torch.dtype, expected: Expected, length: int) -> torch.Tensor:
    """`length` roundings in float32 of the terms' magnitude, and one rounding of the result if it is narrower."""
    magnitude = expected.value.abs() if expected.magnitude is None else expected.magnitude
    allowed = length * 2.0**-24 * magnitude
    if dtype in (torch.bfloat16, torch.float16) and length > 0:
        format = torch.finfo(dtype)  # below its smallest normal number the steps stop shrinking
        allowed = allowed + format.eps / 2 * expected.value.abs().clamp(min=format.smallest_normal)
    return torch.nan_to_num(allowed)


def runs_on_tiles(case: OpCase, isa: str) -> bool:
    """Whether the instruction set has AMX and the op uses it for this case."""
    return isa.startswith("amx") and bool(case.amx_operands)


def reference_inputs(case: OpCase, arguments: Arguments, isa: str) -> Arguments:
    """What the reference sees: bf16 operands are rounded first where the instruction set multiplies in bf16. Its name
    is there as "isa"."""
    rounded = {**arguments, "isa": isa}
    if "bf16" not in isa:
        return rounded
    for name in case.bf16_operands + (case.amx_operands if runs_on_tiles(case, isa) else ()):
        rounded[name] = arguments[name].bfloat16().to(arguments[name].dtype)
    return rounded


def assert_same_bits(label: str, one: Mapping[str, Any], other: Mapping[str, Any], names: list[str]) -> None:
    for name in names:
        different = bits(one[name].contiguous()) != bits(other[name].contiguous())
        assert not different.any(), (
            f"{label}: {name} differs in {int(different.sum())} of {different.numel()} elements, first at "
            f"{different.nonzero()[0].tolist()}"
        )


def assert_rows_independent(case: OpCase, arguments: Arguments, whole: Mapping[str, Any]) -> None:
    """Rows run alone, in uneven splits and at other offsets give the bits that they have in the whole batch."""
    rows = [name for name in case.rows if arguments[name] is not None]
    outputs = [name for name in rows if SPECS[case.op][name]["access"] != "read"]
    num_rows = arguments[rows[0]].shape[0]
    for cut in row_splits(num_rows):
        pieces = []
        for begin, end in itertools.pairwise(cut):
            sliced = dict(arguments)
            for name in rows:
                sliced[name] = arguments[name][begin:end]
            pieces.append(run_guarded(case.op, sliced))
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in outputs}
        assert_same_bits(f"{case.op} with rows cut at {cut}", joined, whole, outputs)


def row_splits(num_rows: int) -> list[list[int]]:
    """Where to cut a batch: one by one (at most 8 rows alone), in half, and 1 | 2 | 4 | 8 | ... rows."""
    if num_rows < 2:
        return []
    alone = list(range(min(num_rows, 8) + 1))
    doubling = [0]
    while doubling[-1] < num_rows:
        doubling.append(min(num_rows, 2 * doubling[-1] + 1))
    splits = [[*alone, num_rows] if alone[-1] < num_rows else alone, [0, num_rows // 2, num_rows], doubling]
    return [list(cut) for cut in dict.fromkeys(tuple(cut) for cut in splits)]
