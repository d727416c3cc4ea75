# SPDX-License-Identifier: Apache-2.0
"""Sampler: what a batch of requests asks for becomes the right arguments of the ops, step after step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from fastserve.config import SamplingParams
from fastserve.engine.device import CpuDevice
from fastserve.engine.sampler import Sampler
from fastserve.outputs import NOT_A_NUMBER, NOTHING_ALLOWED, SampledToken
from fastserve.request import Request
from sampling_reference import RowParams, in_order, log_softmax, sample_row

VOCAB = 100
EOS = frozenset({98, 99})


def request(name: str, prompt: list[int], seed: int = 0, **params: Any) -> Request:
    return Request(name, prompt, SamplingParams(**params), seed=seed)


def make_sampler(max_num_rows: int = 16) -> Sampler:
    return Sampler(CpuDevice(None), VOCAB, max_num_rows, EOS)


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def ids(sampled: Iterable[SampledToken]) -> list[int]:
    return [token.token_id for token in sampled]


def expected_token(logits: torch.Tensor, r: Request) -> tuple[int, bool]:
    """From the request's tokens alone, counted anew."""
    p = r.params
    counts = Counter(r.token_ids[r.num_prompt_tokens :])
    bias = list((p.logit_bias or {}).items())
    if len(r.token_ids) - r.num_prompt_tokens < p.min_tokens:
        bias += [(token_id, -math.inf) for token_id in EOS | set(p.stop_token_ids or ())]
    penalised = (p.repetition_penalty, p.frequency_penalty, p.presence_penalty) != (1.0, 0.0, 0.0)
    row = RowParams(
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        seed=r.seed,
        position=len(r.token_ids),
        repetition_penalty=p.repetition_penalty,
        frequency_penalty=p.frequency_penalty,
        presence_penalty=p.presence_penalty,
        seen={token_id: counts[token_id] for token_id in r.token_ids} if penalised else {},
        bias=tuple(bias),
        allowed=frozenset(p.allowed_token_ids) if p.allowed_token_ids is not None else None,
    )
    return sample_row(logits.numpy(), row)


def test_greedy_batch() -> None:
    sampler, logits = make_sampler(), logits_of(3)
    rows = [request(f"r{i}", [1, 2], temperature=0) for i in range(3)]
    before = logits.clone()
    for _ in range(2):
        sampled = sampler.sample(logits, rows)
        assert sampled == [SampledToken(token_id) for token_id in logits.argmax(-1).tolist()]
    assert torch.equal(logits, before)
    assert ids(sampler.sample(logits[1:2], rows[:1])) == [int(logits[1].argmax())]
    assert ids(sampler.sample(logits, tuple(rows))) == logits.argmax(-1).tolist()
    assert sampler.sample(logits[:0], []) == []


def test_any_mix_over_many_steps() -> None:
    """Requests of every kind come, go, sit out (preempted) and change places; each token as if it were alone."""
    generator = np.random.default_rng(0)
    requests = [
        request("greedy", [5, 6], temperature=0),
        request("plain", [5], seed=2**64 - 1),
        request("filters", [5, 5], seed=2**63, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01),
        request("repetition", [1, 2, 3, 1, 1], seed=3, repetition_penalty=1.5),
        request("counts", [1, 1], seed=4, frequency_penalty=0.4, presence_penalty=0.2, temperature=1.4),
        request("greedy-penalties", list(range(90)), temperature=0, frequency_penalty=1.0),
        request("allowed", [3], seed=5, allowed_token_ids=[4, 8, 15, 16, 23, 42, 99]),
        request("allowed-and-penalties", [3], seed=6, allowed_token_ids=range(40), presence_penalty=2.0),
        request("bias", [7], seed=7, logit_bias={3: 5.0, "4": 6.5, 99: -100.0}),
        request("min-tokens", [9], seed=8, min_tokens=6, stop_token_ids=[1, 2], logit_bias={98: 30.0, 1: 30.0}),
    ]
    sampler = make_sampler()
    checked = 0
    for step in range(60):
        chosen = generator.permutation(len(requests))[: generator.integers(1, len(requests) + 1)]
        rows = [requests[i] for i in chosen]
        for _ in range(generator.integers(1, 4)):  # the same batch again, as in decoding
            logits = logits_of(len(rows), 1000 + checked)
            for token, row, r in zip(sampler.sample(logits, rows), logits, rows, strict=True):
                expected, close = expected_token(row, r)
                assert token.token_id == expected or close, (step, r.request_id)
                r.token_ids.append(token.token_id)
                checked += 1
    assert all(len(r.token_ids) > r.num_prompt_tokens + 30 for r in requests)


def test_tokens_taken_back_are_not_counted() -> None:
    sampler, logits = make_sampler(), torch.zeros(1, VOCAB)
    r = request("r", [0], temperature=0, frequency_penalty=1.0)
    for expected in (0, 1, 2, 3):  # each output sinks; the prompt's 0 counts only once it is output
        assert ids(sampler.sample(logits, [r])) == [expected]
        r.token_ids.append(expected)
    del r.token_ids[2:]  # outputs 1, 2 and 3
    assert ids(sampler.sample(logits, [r])) == [1]


def test_a_bad_word_is_banned_only_where_it_would_be_completed() -> None:
    sampler = make_sampler()
    # "ab" is [10, 11], with a space before it [20, 11]; " c" begins with the token of a space, which stays allowed
    words = {"ab": [10, 11], " ab": [20, 11], "c": [30], " c": [21, 30], "d": [40], " d": [41]}
    sampler.encode = words.__getitem__
    row = request("r", [10], temperature=0, bad_words=["ab", " c", "d"])
    other = request("other", [10], temperature=0)

    def banned() -> set[int]:
        found = set()
        for token_id in range(VOCAB):
            logits = torch.zeros(2, VOCAB)
            logits[:, token_id] = 5.0
            mine, others = ids(sampler.sample(logits, [row, other]))
            assert others == token_id
            if mine != token_id:
                found.add(token_id)
        return found

    assert banned() == {30, 40, 41}  # the prompt's 10 is no beginning of a bad word
    row.token_ids.append(10)
    assert banned() == {30, 40, 41, 11}
    row.token_ids.append(5)
    assert banned() == {30, 40, 41}
    row.token_ids.append(20)
    assert banned() == {30, 40, 41, 11}
    sampler.forget("r")
    assert sampler._states == {}


def test_min_tokens_bans_every_end_until_reached() -> None:
    sampler, logits = make_sampler(), torch.zeros(2, VOCAB)
    logits[:, 98], logits[:, 99], logits[:, 7] = 3.0, 2.0, 1.0
    rows = [request("r", [1], temperature=0, min_tokens=2, stop_token_ids=[7]), request("other", [1], temperature=0)]
    for expected in (0, 0, 98, 98):
        assert ids(sampler.sample(logits, rows)) == [expected, 98]
        for r in rows:
            r.token_ids.append(0)


def test_failures_stay_in_their_row() -> None:
    sampler, logits = make_sampler(), logits_of(3)
    logits[0, 5] = float("nan")
    rows = [
        request("nan", [1], temperature=0, logprobs=3),
        request("empty", [1], min_tokens=1, allowed_token_ids=[98, 99], logprobs=3),
        request("fine", [1], temperature=0, logprobs=0),
    ]
    first, second, third = sampler.sample(logits, rows)
    assert first == SampledToken(NOT_A_NUMBER)
    assert second == SampledToken(NOTHING_ALLOWED)
    assert third.token_id == int(logits[2].argmax())
    assert third.rank == 1


def test_forget() -> None:
    sampler, logits = make_sampler(), torch.zeros(1, VOCAB)
    old = request("r", [0, 0], temperature=0, repetition_penalty=0.5, allowed_token_ids=[3, 4])
    logits[0, :10] = -1.0
    assert ids(sampler.sample(logits, [old])) == [3]
    new = request("r", [4], temperature=0, repetition_penalty=0.5, allowed_token_ids=[5, 6])
    assert ids(sampler.sample(logits, [new])) == [5]  # the same name, another request
    assert len(sampler._states) == 1
    sampler.forget("r")
    sampler.forget("r")
    assert not sampler._states
    assert not sampler._batch.rows
    assert ids(sampler.sample(logits, [new])) == [5]


# --- logprobs ---


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_logprobs_are_those_of_the_raw_logits(temperature: float) -> None:
    sampler, logits = make_sampler(), logits_of(4, seed=9)
    logits[:, 10] = logits[:, 11]
    nums = [0, None, 5, -1]
    changes = {"temperature": temperature, "logit_bias": {3: 9.0}, "repetition_penalty": 2.0}
    rows = [request(f"r{i}", [1], seed=i, logprobs=num, **changes) for i, num in enumerate(nums)]
    for token, row, num in zip(sampler.sample(logits, rows), logits.numpy(), nums, strict=True):
        if num is None:
            assert token == SampledToken(token.token_id)
            continue
        exact, order = log_softmax(row), in_order(row)
        assert token.logprob == pytest.approx(exact[token.token_id], abs=2e-6)
        assert token.rank == order.tolist().index(token.token_id) + 1
        expected_ids = order[: VOCAB if num == -1 else num].tolist()
        assert [entry[0] for entry in token.top] == expected_ids
        assert [entry[1] for entry in token.top] == pytest.approx(exact[expected_ids].tolist(), abs=2e-6)
        assert [entry[2] for entry in token.top] == list(range(1, len(expected_ids) + 1))
        if token.rank <= len(expected_ids):
            assert token.top[token.rank - 1] == (token.token_id, token.logprob, token.rank)


def test_prompt_logprobs_do_not_depend_on_company() -> None:
    sampler, logits = make_sampler(), logits_of(7, seed=4)
    next_ids = [0, 99, 3, 3, 50, 51, 52]
    whole = sampler.prompt_logprobs(logits, next_ids, 4)
    assert whole == [sampler.prompt_logprobs(logits[i : i + 1], next_ids[i : i + 1], 4)[0] for i in range(7)]
    assert ids(whole) == next_ids
    for token, row in zip(whole, logits.numpy(), strict=True):
        assert token.logprob == pytest.approx(log_softmax(row)[token.token_id], abs=2e-6)
        assert len(token.top) == 4
    assert sampler.prompt_logprobs(logits[:0], [], 4) == []
    everything = sampler.prompt_logprobs(logits, next_ids, -1)
    assert all(len(token.top) == VOCAB for token in everything)


def test_many_rows_of_whole_vocabulary_logprobs_are_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, logits = make_sampler(), logits_of(7, seed=4)
    at_once = sampler.prompt_logprobs(logits, [1] * 7, -1)
    monkeypatch.setattr("fastserve.engine.sampler._MAX_TOP_ENTRIES", 3 * VOCAB)
    assert sampler.prompt_logprobs(logits, [1] * 7, -1) == at_once
