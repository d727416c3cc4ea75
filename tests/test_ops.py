# SPDX-License-Identifier: Apache-2.0
"""Every case of `op_cases` on every instruction set that runs here, with one thread and with two."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import op_cases
from fastserve import _native
from op_cases import Arguments, BadCase, OpCase
from op_checks import (
    SPECS,
    assert_close,
    assert_rows_independent,
    assert_same_bits,
    isas_of,
    reference_inputs,
    run_guarded,
    runs_on_tiles,
)

TABLE = op_cases.load()
OPS = list(dict.fromkeys(case.op for case in TABLE.cases))
SEED = 20240607


@pytest.fixture(autouse=True)
def restore_settings() -> Iterator[None]:
    isa, num_threads = _native.isa(), _native.num_threads()
    yield
    _native.set_isa(isa)
    _native.set_num_threads(num_threads)


def make(case: OpCase | BadCase) -> Arguments:
    return case.make(torch.Generator().manual_seed(SEED))


def on_every_isa(cases: Sequence[OpCase | BadCase]) -> Any:
    """The cases on each instruction set that has a kernel of its own for their op."""
    return pytest.mark.parametrize(
        ("case", "isa"),
        [pytest.param(case, isa, id=f"{case.op}-{case.id}-{isa}") for case in cases for isa in isas_of(case.op)],
    )


@on_every_isa(TABLE.cases)
def test_matches_the_reference_bit_for_bit_reproducibly(case: OpCase, isa: str) -> None:
    _native.set_isa(isa)
    _native.set_num_threads(1)
    arguments = make(case)
    expected = case.reference(reference_inputs(case, arguments, isa))
    result = run_guarded(case.op, arguments)
    for name, value in expected.items():
        label = f"{case.op}-{case.id} on {isa}: {name}"
        assert_close(label, result[name], value, case.length, runs_on_tiles(case, isa))
    if case.rows:
        assert_rows_independent(case, arguments, result)
    _native.set_num_threads(2)
    assert_same_bits(
        f"{case.op}-{case.id} on {isa}, 1 and 2 threads", result, run_guarded(case.op, arguments), list(expected)
    )


# --- arguments that must be refused ---------------------------------------------------------------------------


def sample_case(op: str) -> OpCase:
    """A case with at least two rows and columns, so that strides matter."""
    for case in TABLE.cases:
        if case.op == op and all(
            min(value.shape) > 1 for value in make(case).values() if torch.is_tensor(value) and value.ndim > 1
        ):
            return case
    raise AssertionError(f"no case of {op} has tensors of at least two rows and columns")


def refused(op: str, arguments: Arguments, *parts: str) -> None:
    """The op raises ValueError, and the message names the op and has all `parts`."""
    with pytest.raises(ValueError) as error:
        getattr(_native.ops, op)(**arguments)
    for part in (f"{op}: ", *parts):
        assert part in str(error.value)


def arguments_of(kind: str) -> list[tuple[str, str]]:
    """All (op, argument) pairs; kind is "tensor" or "number"."""
    return [
        (op, name) for op in OPS for name, spec in SPECS[op].items() if (spec["shape"] is None) == (kind == "number")
    ]


def given(tensor: torch.Tensor) -> str:
    return f"given {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on cpu"


def present(op: str, name: str) -> tuple[Arguments, torch.Tensor]:
    """Good arguments of the op in which the (perhaps optional) tensor is given."""
    for case in [sample_case(op), *(case for case in TABLE.cases if case.op == op)]:
        arguments = make(case)
        if arguments.get(name) is not None and arguments[name].numel() > 1:
            return arguments, arguments[name]
    raise AssertionError(f"no case of {op} gives '{name}'")


@pytest.mark.parametrize(("op", "name"), arguments_of("tensor"))
def test_refuses_a_bad_tensor(op: str, name: str) -> None:
    arguments, tensor = present(op, name)
    spec = SPECS[op][name]
    mention = f"argument '{name}'"

    if not spec["optional"]:
        refused(op, {key: value for key, value in arguments.items() if key != name}, mention, "missing")
        refused(op, {**arguments, name: None}, mention, "required")
    refused(op, {**arguments, name: np.zeros(3, np.float32)}, mention, "numpy.ndarray")
    refused(op, {**arguments, name: 3}, mention, "int")

    for bad in (tensor[None], tensor.to(torch.complex64), tensor.to(torch.float64)):
        refused(op, {**arguments, name: bad}, mention)
    refused(op, {**arguments, name: tensor[None]}, mention, given(tensor[None]))
    wrong_dtype = tensor.to(torch.int32 if tensor.dtype == torch.int64 else torch.int64)
    refused(op, {**arguments, name: wrong_dtype}, mention, given(wrong_dtype), "dtype")

    apart = torch.stack([tensor, tensor], dim=-1)[..., 0]  # every other element
    refused(op, {**arguments, name: apart}, mention, "contiguous")
    if tensor.ndim > 1 and min(tensor.shape) > 1:
        refused(op, {**arguments, name: tensor.transpose(0, 1).contiguous().transpose(0, 1)}, mention, "contiguous")


@pytest.mark.parametrize(("op", "name"), arguments_of("tensor"))
def test_refuses_disagreeing_extents(op: str, name: str) -> None:
    arguments, tensor = present(op, name)
    shapes = [spec["shape"] for key, spec in SPECS[op].items() if spec["shape"] and arguments[key] is not None]
    words = " ".join(shapes).split()
    names = [re.sub(r"^\d+\*", "", word) for word in words]
    for dim, word in enumerate(SPECS[op][name]["shape"].split()):
        shared = word.isdigit() or names.count(re.sub(r"^\d+\*", "", word)) > 1
        if not shared:
            continue
        shape = list(tensor.shape)
        shape[dim] += 1
        bad = torch.zeros(shape, dtype=tensor.dtype)
        # The argument named is the first that disagrees, which is this one or one declared after it.
        refused(op, {**arguments, name: bad}, "argument '", "given [", "expected [")


ACTIVATION_DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("op", "name"), arguments_of("tensor"))
def test_never_takes_activations_of_another_dtype(op: str, name: str) -> None:
    """A tensor that the op writes as float32 must not be accepted as a narrower one, nor the reverse."""
    arguments, tensor = present(op, name)
    if not SPECS[op][name]["activation"]:
        return
    for dtype in ACTIVATION_DTYPES:
        if dtype == torch.bfloat16 and SPECS[op][name]["operand"]:
            continue  # test_amx.py
        refused(op, {**arguments, name: tensor.to(dtype)}, f"argument '{name}'", given(tensor.to(dtype)))


@pytest.mark.parametrize(("op", "name"), arguments_of("number"))
def test_refuses_a_bad_number(op: str, name: str) -> None:
    arguments = make(sample_case(op))
    refused(op, {key: value for key, value in arguments.items() if key != name}, f"argument '{name}'", "missing")
    for bad in ("1", None, torch.zeros(3)):
        refused(op, {**arguments, name: bad}, f"argument '{name}'", "number")


@pytest.mark.parametrize("op", OPS)
def test_refuses_bad_calls(op: str) -> None:
    arguments = make(sample_case(op))
    function: Any = getattr(_native.ops, op)
    refused(op, {**arguments, "nonsense": 1}, "nonsense")
    with pytest.raises(ValueError, match=f"{op}: {len(arguments) + 1} arguments given; takes {len(arguments)}"):
        function(*arguments.values(), None)
    first = next(iter(SPECS[op]))  # as declared: positional arguments go by that order
    with pytest.raises(ValueError, match=f"{op}: argument '{first}' given twice"):
        function(arguments[first], **arguments)


@on_every_isa(TABLE.bad_cases)
def test_refuses_bad_values(case: BadCase, isa: str) -> None:
    _native.set_isa(isa)
    with pytest.raises(ValueError, match=case.message):
        run_guarded(case.op, make(case))
