# SPDX-License-Identifier: Apache-2.0
"""Sampling on CUDA and on the CPU: the same token from the same logits, also where a draw is too close to call; and how
often the logits are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_device import Gpu, SimulatedDevice, find_devices

import op_cases
from fastserve import _native
from op_cases import token_logprobs
from sampling_reference import RowParams, arguments_of

DEVICES = find_devices()[:1]
FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 60, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 2.0, "top_k": 1500, "min_p": 1e-4},
    {"temperature": 0.9, "top_p": 0.999, "repetition_penalty": 1.2, "seen": {7: 2, 11: 0}, "bias": ((3, 2.5),)},
]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("vocab", [1000, 6007])
def test_the_same_tokens_as_on_the_cpu(device: SimulatedDevice | Gpu, vocab: int) -> None:
    generator = torch.Generator().manual_seed(99)
    num_rows = 3 * len(FILTERS)
    logits = torch.randn(num_rows, vocab, generator=generator) * 3
    params = [RowParams(**FILTERS[b % len(FILTERS)], seed=b * 7919, position=b) for b in range(num_rows)]
    here, there = arguments_of(logits, params), arguments_of(logits, params)
    _native.ops.sample(**here)
    device.run("sample", there)
    assert there["token_ids"].tolist() == here["token_ids"].tolist()
    assert here["token_ids"].min() >= 0


@pytest.mark.parametrize("device", [d for d in DEVICES if isinstance(d, SimulatedDevice)], ids=lambda d: d.name)
@pytest.mark.parametrize(
    ("params", "passes"),
    [
        (RowParams(), 1),
        (RowParams(temperature=1.0, seed=1), 2),
        (RowParams(temperature=1.0, seed=1, top_k=40), 2),
        (RowParams(temperature=1.0, seed=1, top_k=40, top_p=0.9), 2),
        (RowParams(temperature=1.0, seed=1, top_k=1500), 2),
        (RowParams(temperature=1.0, seed=1, top_p=0.9), 3),
        (RowParams(temperature=2.0, seed=1, top_p=0.999), 3),
    ],
)
def test_reads_the_logits_so_many_times(device: SimulatedDevice, params: RowParams, passes: int) -> None:
    logits = torch.randn(1, 8192, generator=torch.Generator().manual_seed(5)) * 4
    device.run("sample", arguments_of(logits, [params]))
    (launch,) = device.counters()
    assert launch["buffers"]["logits"]["read"] == passes * logits.numel() * 4
    assert_ideal_accesses(launch)


@pytest.mark.parametrize("device", [d for d in DEVICES if isinstance(d, SimulatedDevice)], ids=lambda d: d.name)
def test_a_short_list_of_candidates_stays_in_shared_memory_and_a_long_one_leaves_it_in_whole_lines(
    device: SimulatedDevice,
) -> None:
    vocab = 8192
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(5)) * 4
    for params, lists in ((RowParams(temperature=1.0, top_k=40, top_p=0.9), 0), (RowParams(2.0, top_p=0.999), 1)):
        device.run("sample", arguments_of(logits, [params] * 2))
        (launch,) = device.counters()
        assert_ideal_accesses(launch)
        written = launch["buffers"].get("workspace", {"written": 0})["written"]
        assert written % 256 == 0  # 32 logits and 32 ids at a time
        assert lists * logits.numel() * 4 <= written <= lists * logits.numel() * 8


def assert_ideal_accesses(launch: dict[str, Any]) -> None:
    """Every sector that was touched was used in full, and no two lanes wanted one bank at a time, atomics included."""
    for kind in ("load", "store"):
        assert launch["global"][kind]["sectors"] == launch["global"][kind]["ideal_sectors"], kind
        assert launch["shared"][kind]["wavefronts"] == launch["shared"][kind]["ideal"], kind


@pytest.mark.parametrize("device", [d for d in DEVICES if isinstance(d, SimulatedDevice)], ids=lambda d: d.name)
def test_token_logprobs_reads_the_logits_twice_and_in_whole_sectors(device: SimulatedDevice) -> None:
    (case,) = [c for c in op_cases.load().cases if (c.op, c.id) == ("token_logprobs", "B3-V5000-L20")]
    arguments = case.make(torch.Generator().manual_seed(5))
    device.run("token_logprobs", arguments)
    (launch,) = device.counters()
    assert_ideal_accesses(launch)
    logits = arguments["logits"]
    # And each of a row's 1,024 threads looks at the logit of the row's token, which is one sector for all of them.
    assert launch["buffers"]["logits"]["read"] == 2 * logits.numel() * 4 + logits.shape[0] * 4 * (1024 + 1)


def staggered(logits: torch.Tensor) -> torch.Tensor:
    """The same rows, each beginning a float further behind a multiple of 16 bytes than the one before."""
    rows, vocab = logits.shape
    wide = torch.full((rows, (vocab + 3) // 4 * 4 + 1), float("nan"))
    wide[:, :vocab] = logits
    return wide[:, :vocab]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("vocab", [3, 130, 4100, 6007])
def test_where_a_row_of_logits_begins_cannot_change_a_bit(device: SimulatedDevice | Gpu, vocab: int) -> None:
    logits = staggered(torch.randn(1, vocab, generator=torch.Generator().manual_seed(3)).mul(3).expand(4, -1))
    for filters in FILTERS[:-1]:
        arguments = arguments_of(logits, [RowParams(**filters, seed=5, position=8)] * 4)
        device.run("sample", arguments)
        assert len(set(arguments["token_ids"].tolist())) == 1, filters
        assert arguments["token_ids"][0] >= 0
    arguments = token_logprobs.arguments_of(logits, [vocab - 1] * 4, min(vocab, 20))
    device.run("token_logprobs", arguments)
    for name in ("logprobs", "ranks", "top_ids", "top_logprobs"):
        assert torch.equal(arguments[name], arguments[name][:1].expand_as(arguments[name])), name
    assert not arguments["logprobs"].isnan().any()


@pytest.mark.parametrize("device", [d for d in DEVICES if isinstance(d, SimulatedDevice)], ids=lambda d: d.name)
def test_unaligned_rows_of_logits_are_read_in_nearly_whole_sectors(device: SimulatedDevice) -> None:
    vocab = 49_153  # three rows of four begin at no multiple of 16 bytes
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(5)) * 4
    sampled = arguments_of(logits, [RowParams(temperature=1.0, seed=1, top_k=40)] * 4)
    device.run("sample", sampled)
    (launch,) = device.counters()
    # Of 32 accesses of 16 bytes that begin in the middle of a sector one more is touched, and the last lane looks
    # beyond its own.
    assert launch["global"]["load"]["sectors"] <= 1.1 * 2 * logits.numel() * 4 / 32
    here = arguments_of(logits, [RowParams(temperature=1.0, seed=1, top_k=40)] * 4)
    _native.ops.sample(**here)
    assert sampled["token_ids"].tolist() == here["token_ids"].tolist()

    device.run("token_logprobs", token_logprobs.arguments_of(logits, [7, 49_152, 0, 1], 20))
    (launch,) = device.counters()
    assert launch["global"]["load"]["sectors"] <= 1.1 * 2 * logits.numel() * 4 / 32
