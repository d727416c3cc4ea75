# SPDX-License-Identifier: Apache-2.0
"""The sample op: exact kept sets, the right distribution, noise that depends on seed and position only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve import _native
from sampling_reference import RowParams, arguments_of, kept, philox4x32, sample_row


@pytest.fixture(autouse=True)
def restore_settings() -> Iterator[None]:
    isa, num_threads = _native.isa(), _native.num_threads()
    yield
    _native.set_isa(isa)
    _native.set_num_threads(num_threads)


def sample(logits: torch.Tensor, rows: list[RowParams]) -> list[int]:
    arguments = arguments_of(logits, rows, num_threads=_native.num_threads())
    _native.ops.sample(**arguments)
    return arguments["token_ids"].tolist()


def draws(logits: list[float], params: RowParams, count: int) -> list[int]:
    """`count` tokens from the same logits, at as many positions."""
    rows = [replace(params, position=position) for position in range(count)]
    return sample(torch.tensor(logits, dtype=torch.float32).expand(count, -1).contiguous(), rows)


def test_the_reference_gives_the_published_philox_vectors() -> None:
    zeros, ones = np.zeros((1, 4), np.uint64), np.full((1, 4), 0xFFFFFFFF, np.uint64)
    assert [f"{word:08x}" for word in philox4x32(zeros, (0, 0))[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert [f"{word:08x}" for word in philox4x32(ones, (0xFFFFFFFF, 0xFFFFFFFF))[0]] == [
        "408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"
    ]  # fmt: skip


@pytest.mark.parametrize("isa", _native.isas())
def test_what_is_no_number_is_found_wherever_it_lies(isa: str) -> None:
    _native.set_isa(isa)
    vocab = 150  # two blocks of 64, and a rest
    logits = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(4))
    logits[:, ::7] = -torch.inf
    logits[:, 1::9] = -torch.finfo(torch.float32).max
    for value, expected in [
        (torch.nan, [-1] * vocab),
        (torch.inf, [-1] * vocab),
        (torch.finfo(torch.float32).max, list(range(vocab))),
    ]:
        assert sample(logits.diagonal_scatter(torch.full((vocab,), value)), [RowParams()] * vocab) == expected


# --- which tokens are kept ---

TIES = [2.0, 3.0, 3.0, 1.0, 3.0, 2.0]  # order: 1 2 4 | 0 5 | 3


@pytest.mark.parametrize(
    ("logits", "params", "expected"),
    [
        (TIES, {"top_k": 1}, {1}),
        (TIES, {"top_k": 2}, {1, 2}),
        (TIES, {"top_k": 3}, {1, 2, 4}),
        (TIES, {"top_k": 4}, {0, 1, 2, 4}),
        (TIES, {"top_k": 5}, {0, 1, 2, 4, 5}),
        (TIES, {"top_k": 6}, {0, 1, 2, 3, 4, 5}),
        (TIES, {"top_k": 2**31 - 1}, {0, 1, 2, 3, 4, 5}),
        (TIES, {}, {0, 1, 2, 3, 4, 5}),
        ([5.0] * 8, {"top_p": 0.5}, {0, 1, 2, 3}),  # 4 of 8 reach one half exactly
        ([5.0] * 8, {"top_p": 0.500001}, {0, 1, 2, 3, 4}),
        ([5.0] * 8, {"top_p": 0.125}, {0}),
        ([5.0] * 8, {"top_p": 1e-30}, {0}),  # never empty
        ([5.0] * 8, {"top_k": 4, "top_p": 0.5}, {0, 1}),  # one half of the four, not of the eight
        ([5.0, 5.0, 0.0, 0.0, -9.0], {"top_p": 0.9999}, {0, 1, 2, 3}),
        ([0.0, 0.0, 0.0, -100.0], {"min_p": 1.0}, {0, 1, 2}),
        ([0.0, -1.0, -2.0, -3.0], {"min_p": 0.13}, {0, 1, 2}),  # exp(-2) = 0.135
        ([0.0, -1.0, -2.0, -3.0], {"min_p": 0.14}, {0, 1}),
        ([0.0, -1.0, -2.0, -3.0], {"min_p": 0.14, "temperature": 2.0}, {0, 1, 2, 3}),  # exp(-1.5) = 0.22
        ([0.0, -1.0, -2.0, -3.0], {"min_p": 0.14, "top_k": 3, "top_p": 0.73}, {0}),  # 0.731 of what min_p leaves
        ([0.0, -1.0, -2.0, -3.0], {"min_p": 0.14, "top_k": 3, "top_p": 0.74}, {0, 1}),
        ([0.0, -0.0, -0.0, 0.0], {"top_k": 2}, {0, 1}),  # -0 and +0 are equal
        ([float("-inf"), 1.0, float("-inf"), 1.0], {"top_k": 3}, {1, 3}),
    ],
)
def test_kept_sets(logits: list[float], params: dict[str, float], expected: set[int]) -> None:
    p = RowParams(**{"temperature": 1.0, "seed": 11, **params})  # type: ignore[arg-type]
    assert set(kept(np.array(logits, np.float32), p)[0].tolist()) == expected
    assert set(draws(logits, p, 3000)) == expected


def test_top_k_and_top_p_keep_a_prefix_across_blocks() -> None:
    """Ties that straddle blocks of 64 tokens, and more kept tokens than there are blocks."""
    logits = [float(i % 3) for i in range(300)]
    order = [i for i in range(300) if i % 3 == 2] + [i for i in range(300) if i % 3 == 1]
    for k in (1, 3, 63, 64, 100, 101, 170):
        assert set(draws(logits, RowParams(temperature=50.0, top_k=k, seed=5), 6000)) == set(order[:k])
    uniform = [1.0] * 300
    for top_p, count in ((0.01, 3), (0.21, 63), (0.5, 150)):
        assert set(draws(uniform, RowParams(temperature=1.0, top_p=top_p, seed=6), 6000)) == set(range(count))


def test_greedy_takes_the_lowest_id_of_the_largest() -> None:
    logits = torch.zeros(4, 1000)
    logits[0, [999, 500, 64]] = 1.0
    logits[1] = -5.0
    logits[2, 999] = 2.0
    logits[3, 63:65] = 7.0
    assert sample(logits, [RowParams()] * 4) == [64, 0, 999, 63]
    tiny = [RowParams(temperature=9e-6, top_p=0.1, top_k=3, seed=4)] * 4  # greedy below 1e-5
    assert sample(logits, tiny) == [64, 0, 999, 63]


def test_penalties() -> None:
    """Repetition divides what is above 0 and multiplies the rest; frequency and presence count outputs only."""
    logits = torch.tensor([[4.0, 3.5, 3.0, -1.0]])
    p = RowParams(seen={0: 0}, repetition_penalty=1.25)
    assert sample(logits, [p]) == [1]  # 4 / 1.25 = 3.2 < 3.5
    assert sample(logits, [replace(p, repetition_penalty=1.125)]) == [0]
    assert sample(-logits, [replace(p, seen={3: 0}, repetition_penalty=1.5)]) == [3]  # 1 / 1.5 is still the largest
    assert sample(-logits, [replace(p, seen={2: 0}, repetition_penalty=0.5, bias=((3, -9.0),))]) == [2]  # -3 * 0.5
    for penalty in ("presence_penalty", "frequency_penalty"):
        prompt_only = replace(p, repetition_penalty=1.0, **{penalty: 2.0})
        assert sample(logits, [prompt_only]) == [0]
        assert sample(logits, [replace(prompt_only, seen={0: 1})]) == [1]
    assert sample(logits, [RowParams(seen={0: 2, 1: 0}, frequency_penalty=0.25)]) == [0]  # 4 - 0.5 ties, lower id
    assert sample(logits, [RowParams(seen={0: 3, 1: 0}, frequency_penalty=0.25)]) == [1]
    assert sample(logits, [RowParams(seen={0: 9, 1: 0}, presence_penalty=0.25)]) == [0]
    # Bias comes before penalties: (4 - 5) * 2 = -2 and not 4 / 2 - 5 = -3.
    biased = RowParams(bias=((0, -5.0),), seen={0: 0}, repetition_penalty=2.0)
    assert sample(torch.tensor([[4.0, -2.5]]), [biased]) == [0]


# --- how often ---


def chi_square(drawn: list[int], probabilities: np.ndarray) -> float:
    count = len(drawn)
    observed = np.bincount(drawn, minlength=len(probabilities))
    assert observed[probabilities == 0].sum() == 0
    likely = probabilities > 0
    expected = probabilities[likely] * count
    assert expected.min() >= 5
    return float(((observed[likely] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("by", ["position", "seed"])
@pytest.mark.parametrize(
    ("params", "vocab"),
    [
        (RowParams(temperature=1.0), 12),
        (RowParams(temperature=0.7), 150),
        (RowParams(temperature=1.3, min_p=0.05), 150),
        (RowParams(temperature=1.0, top_k=7), 150),
        (RowParams(temperature=1.0, top_p=0.8), 150),
        (RowParams(temperature=2.0, top_k=40, top_p=0.9, min_p=0.01), 150),
    ],
)
def test_draws_follow_the_distribution(params: RowParams, vocab: int, by: str) -> None:
    logits = np.linspace(0, 2.5, vocab).astype(np.float32)
    np.random.default_rng(3).shuffle(logits)
    ids, weights, close = kept(logits, params)
    assert not close
    probabilities = np.zeros(vocab)
    probabilities[ids] = weights / weights.sum()
    count = 20_000
    rows = [replace(params, **{by: i}) for i in range(count)]
    drawn = sample(torch.from_numpy(logits).expand(count, -1).contiguous(), rows)
    degrees = len(ids) - 1
    # Mean `degrees`, variance 2 * degrees. The seeds are fixed: this passes always or never.
    assert abs(chi_square(drawn, probabilities) - degrees) < 4 * (2 * degrees) ** 0.5 + 4


# --- the same token, whatever is around ---


def test_tokens_depend_on_seed_and_position_only() -> None:
    generator = torch.Generator().manual_seed(1)
    batch, vocab = 40, 777
    logits = torch.randn(batch, vocab, generator=generator) * 3
    filters = [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 90, "top_p": 0.7}]
    rows = [RowParams(temperature=1.1, seed=i // 3, position=i % 7, **filters[i % 5]) for i in range(batch)]  # type: ignore[arg-type]
    expected = sample(logits, rows)
    for isa in _native.isas():
        for num_threads in (1, 2, 3):
            _native.set_isa(isa)
            _native.set_num_threads(num_threads)
            assert sample(logits, rows) == expected
            order = torch.randperm(batch, generator=generator)
            assert sample(logits[order], [rows[i] for i in order]) == [expected[i] for i in order]
            assert [sample(logits[i : i + 1], [rows[i]])[0] for i in range(batch)] == expected


def test_every_noise_word_matters() -> None:
    """Another seed (either half), position or token id is other noise."""
    logits = torch.zeros(1, 4096)
    base = RowParams(temperature=1.0, seed=5, position=9)
    others = [replace(base, seed=6), replace(base, seed=5 + 2**32), replace(base, seed=-5), replace(base, position=10)]
    drawn = [sample(logits, [p])[0] for p in (base, *others)]
    assert len(set(drawn)) == len(drawn)


# --- anything against the reference ---

GRID = st.integers(-40, 40).map(lambda i: i / 4)
LOGIT = st.one_of(GRID, st.floats(-60, 60, width=32), st.just(float("-inf")))


@st.composite
def a_row(draw: st.DrawFn) -> tuple[np.ndarray, RowParams]:
    vocab = draw(st.sampled_from([1, 2, 5, 31, 64, 65, 130]))
    pattern = draw(st.lists(LOGIT, min_size=1, max_size=vocab))
    logits = np.resize(np.array(pattern, np.float32), vocab)
    ids = st.integers(0, vocab - 1)
    return logits, RowParams(
        temperature=draw(st.sampled_from([0.0, 1e-5, 0.1, 0.8, 1.0, 3.0, 100.0])),
        top_k=draw(st.one_of(st.just(0), st.integers(1, vocab + 1))),
        top_p=draw(st.one_of(st.just(1.0), st.floats(2.0**-20, 1.0, width=32))),
        min_p=draw(st.one_of(st.just(0.0), st.floats(0.0, 1.0, width=32))),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        repetition_penalty=draw(st.sampled_from([1.0, 0.5, 1.1, 2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.5, 0.3, 2.0])),
        presence_penalty=draw(st.sampled_from([0.0, -1.0, 0.7])),
        seen=draw(st.dictionaries(ids, st.integers(0, 5), max_size=8)),
        bias=tuple(draw(st.lists(st.tuples(ids, GRID | st.just(float("-inf"))), max_size=5))),
        allowed=draw(st.none() | st.frozensets(ids, max_size=vocab)),
    )


@settings(max_examples=400, deadline=None)
@given(a_row(), st.sampled_from(_native.isas()))
def test_any_row_is_sampled_as_the_reference_says(row: tuple[np.ndarray, RowParams], isa: str) -> None:
    logits, params = row
    _native.set_isa(isa)
    rows = [replace(params, position=position) for position in (0, 1, 2, 2**31 - 1)]
    given_tokens = sample(torch.from_numpy(logits).expand(4, -1).contiguous(), rows)
    for token, p in zip(given_tokens, rows, strict=True):
        expected, close = sample_row(logits, p)
        assert token == expected or close
