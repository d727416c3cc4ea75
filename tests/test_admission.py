# SPDX-License-Identifier: Apache-2.0
"""Who may start: predictions against brute force, and each way in memory that is short."""

import subprocess
import sys
from array import array
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.admission import Memory, admission_names, aggressive, conservative, get_admission, past_future
from fastserve.config import EngineConfig, SamplingParams
from fastserve.engine.output_lengths import GUESSES, OutputLengths
from fastserve.errors import InvalidRequest
from fastserve.request import Request
from scheduler_harness import KV_FACTORIES, Harness


def make_request(number, prompt, output=0, max_tokens=16, blocks=()):
    request = Request(f"r{number}", [1] * prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    request.queue_key = (number,)
    request.token_ids += [2] * output
    request.block_ids = list(blocks)
    return request


def make_memory(num_blocks, *, available=None, block_size=4, history=(), shared=0, needed=1):
    return Memory(
        num_needed=needed,
        num_available=num_blocks if available is None else available,
        num_blocks=num_blocks,
        block_size=block_size,
        max_len=1000,
        output_lengths=array("q", sorted(history)),
        num_shared=lambda request: min(shared, len(request.block_ids)),
    )


def timeline_peak(held, remaining, tables, block_size):
    """Step by step: everybody alive grows by a token and ends after its last; a block in two tables counts once."""
    peak = 0
    for step in range(max(remaining) + 1):
        alive = [j for j in range(len(held)) if remaining[j] >= step]
        shared = {block_id for j in alive for block_id in tables[j]}
        own = sum(-(-(held[j] + step) // block_size) - len(tables[j]) for j in alive)
        peak = max(peak, own + len(shared))
    return peak


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=12),
    st.integers(1, 9),
)
def test_the_peak_is_that_of_the_timeline(lives, block_size):
    held, remaining = (np.array(column) for column in zip(*lives, strict=True))
    peak = past_future.peak_blocks(held, remaining, np.zeros_like(held), block_size)
    assert peak == timeline_peak(held, remaining, [()] * len(held), block_size)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans(), st.integers(1, 9), st.integers(0, 20)),
        min_size=1,
        max_size=8,
    ),
)
def test_shared_blocks_are_counted_once(lives):
    """Two levels: everybody may share blocks 0 to 4, and after all five of them those of one of two families."""
    block_size = 4
    tables, requests, remaining = [], [], []
    for number, (common, more, family, own, rest) in enumerate(lives):
        below = [100 * (1 + family) + i for i in range(more)] if common == 5 else []
        tables.append([*range(common), *below])
        requests.append(make_request(number, block_size * len(tables[-1]) + own, blocks=tables[-1]))
        remaining.append(rest)
    held = [request.num_prompt_tokens for request in requests]
    memory = make_memory(1, block_size=block_size, shared=99)
    spared = past_future._spared_blocks(requests, np.array(remaining), memory)
    peak = past_future.peak_blocks(np.array(held), np.array(remaining), spared, block_size)
    assert peak == timeline_peak(held, remaining, tables, block_size)


def test_predictions_follow_the_history_beyond_what_there_is():
    history = np.array([10, 20, 30, 40])
    outputs, limits = np.array([0, 25, 50, 25]), np.array([1000, 1000, 1000, 35])
    grid = (np.arange(1200) + 0.5) / 1200
    totals = past_future.predicted_lengths(history, outputs, limits, np.repeat(grid[:, None], 4, axis=1))
    fresh, at_25, at_50, cut = totals.T
    assert ((fresh > 0) & (fresh <= 10)).mean() == pytest.approx(1 / 5, abs=1e-3)
    assert (fresh > 40).mean() == pytest.approx(1 / 5, abs=1e-3)
    assert at_25.min() > 25
    assert ((at_25 > 30) & (at_25 <= 40)).mean() == pytest.approx(1 / 3, abs=1e-3)
    assert (at_50.min(), at_50.max()) == (51, 1000)
    assert (cut > 25).all()
    assert cut.max() == 35


def test_without_a_history_every_length_is_as_likely():
    grid = (np.arange(1000)[:, None] + 0.5) / 1000
    totals = past_future.predicted_lengths(np.array([], np.int64), np.array([0]), np.array([100]), grid)
    assert np.bincount(totals[:, 0])[1:].tolist() == [10] * 100


def test_random_numbers_are_uniform_and_stay_with_their_request():
    numbers = np.arange(20_000, dtype=np.uint64)
    drawn = past_future.uniform(numbers, 5)
    assert drawn.shape == (5, 20_000)
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert np.histogram(drawn, 10)[0] == pytest.approx(10_000, rel=0.05)
    assert np.abs(np.corrcoef(drawn) - np.eye(5)).max() < 0.05
    assert (past_future.uniform(numbers[7:9], 5) == drawn[:, 7:9]).all()


def test_each_way_draws_its_line():
    running = [make_request(i, 8, 4, max_tokens=32) for i in range(3)]
    candidate = make_request(9, 8, max_tokens=32)
    # Blocks of 4: a request holds 3 now and 10 at the end, four of them 40 at worst.
    assert conservative.admit(candidate, running, make_memory(40))
    assert not conservative.admit(candidate, running, make_memory(39))
    assert aggressive.admit(candidate, running, make_memory(39, available=2, needed=2))
    assert not aggressive.admit(candidate, running, make_memory(39, available=1, needed=2))
    # Outputs were of 12 tokens (or a few more): 5 blocks each.
    assert past_future.admit(candidate, running, make_memory(24, history=[12] * 500))
    assert not past_future.admit(candidate, running, make_memory(16, history=[12] * 500))
    assert not past_future.admit(candidate, running, make_memory(24, history=[32] * 500))
    assert not past_future.admit(candidate, running, make_memory(24, history=[12] * 500, available=0))


def test_blocks_kept_for_later_requests_are_not_there():
    running = [make_request(i, 8, max_tokens=9, blocks=[2 * i, 2 * i + 1]) for i in range(3)]
    candidate = make_request(9, 8, max_tokens=9)
    for way in (conservative, past_future):  # four blocks each in the end, and 6 of 30 used now
        empty = make_memory(30, available=24, history=[9] * 500)
        assert way.admit(candidate, running, empty)
        assert way.admit(candidate, running, replace(empty, num_available=24 - 13, num_held=13))
        assert not way.admit(candidate, running, replace(empty, num_available=24 - 15, num_held=15))


def test_a_shared_prefix_leaves_room():
    prefix = range(20)
    running = [make_request(i, 80, max_tokens=5, blocks=prefix) for i in range(3)]
    candidate = make_request(9, 84, max_tokens=4, blocks=prefix)
    for way in (conservative, past_future):
        assert way.admit(candidate, running, make_memory(20 + 3 * 1 + 2 + 1, shared=20))
        assert not way.admit(candidate, running, make_memory(40, shared=0))


def test_what_fits_at_worst_starts_without_a_reserve():
    """Two groups of four that fill the memory to the last block."""
    tables = [list(range(8)), list(range(8, 16))]
    requests = [make_request(i, 40, max_tokens=9, blocks=tables[i % 2]) for i in range(8)]
    memory = make_memory(16 + 8 * 4, shared=8, available=32, history=[9] * 500)
    assert conservative.admit(requests[7], requests[:7], memory)
    assert past_future.admit(requests[7], requests[:7], memory)
    assert not past_future.admit(requests[7], requests[:7], replace(memory, num_blocks=47, num_available=31))


def test_output_lengths_forget_the_oldest():
    lengths = OutputLengths(window=3, guesses=())
    for length in (5, 1, 9, 1, 4):
        lengths.add(length)
    assert list(lengths.ascending) == [1, 4, 9]


def test_lengths_take_the_place_of_guesses():
    lengths = OutputLengths(window=4, guesses=(70, 50))
    assert list(lengths.ascending) == [50, 70]
    lengths.add(3)
    assert list(lengths.ascending) == [3, 50]
    for length in (9, 2, 8):
        lengths.add(length)
    assert list(lengths.ascending) == [2, 3, 8, 9]
    lengths.add(1)
    assert list(lengths.ascending) == [1, 2, 8, 9]
    assert sorted(GUESSES) == list(range(8, 513, 8))


@pytest.mark.parametrize("kv", KV_FACTORIES)
def test_lengths_are_observed_from_outputs_that_ended_by_themselves(kv):
    h = Harness(64, kv=kv)
    for i, max_tokens in enumerate((3, 5)):
        h.add([i], params=SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    h.add([7], params=SamplingParams(max_tokens=30, ignore_eos=True), request_id="aborted")
    for _ in range(6):
        h.step()
    h.scheduler.abort("aborted")
    known = list(h.scheduler._output_lengths.ascending)
    assert len(known) == len(GUESSES)
    assert known[:2] == [3, 5]
    assert 30 not in known


@pytest.mark.parametrize("kv", KV_FACTORIES)
def test_tokens_do_not_depend_on_admission(kv):
    """Memory for about three of twelve."""
    preemptions = {}
    for admission in admission_names():
        h = Harness(20, kv=kv, admission=admission, vocab_size=50, max_num_batched_tokens=40)
        requests = [h.add([i] * 8, params=SamplingParams(max_tokens=24, ignore_eos=True)) for i in range(12)]
        h.drain()
        for request in requests:
            assert list(request.output_token_ids) == h.expected_output(request)
        preemptions[admission] = h.scheduler.stats.num_preemptions
    assert preemptions["conservative"] == 0
    assert preemptions["past_future"] < preemptions["aggressive"] / 2, preemptions


def test_names_are_looked_up_and_misses_list_them():
    assert admission_names() == ["aggressive", "conservative", "past_future"]
    with pytest.raises(InvalidRequest, match="aggressive, conservative, past_future"):
        get_admission("hopeful")
    with pytest.raises(InvalidRequest, match="admission"):
        EngineConfig(admission=3)  # type: ignore[arg-type]


def test_admission_needs_no_torch():
    code = "import sys, fastserve.engine.scheduler, fastserve.admission.past_future; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
