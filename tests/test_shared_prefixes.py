# SPDX-License-Identifier: Apache-2.0
"""A batch that is known in advance: each shared prefix is computed once and held exactly as long as it is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve import LLM, SamplingParams
from fastserve.config import RequestOutputKind
from fastserve.engine.prefix_plan import plan_prefixes
from fastserve.errors import InvalidRequest, QueueFull
from scheduler_harness import KV_FACTORIES, Harness
from tiny_models import make_tiny_checkpoint


class Batch:
    """Requests of a plan on a harness, added in the plan's order."""

    def __init__(
        self, harness: Harness, prompts: list[list[int]], priorities: list[int] | None = None, **params: object
    ) -> None:
        self.harness = harness
        self.priorities = priorities
        self.params = SamplingParams(**{"max_tokens": 4, "ignore_eos": True, **params})  # type: ignore[arg-type]
        self.prompts = prompts
        everybody = [self.params] * len(prompts)
        self.plan = plan_prefixes(prompts, everybody, harness.config.block_size, priorities=priorities)
        self.rest = list(self.plan.order)

    def add_next(self) -> None:
        place = self.rest.pop(0)
        self.harness.add(
            self.prompts[place],
            params=self.params,
            request_id=f"b{place}",
            priority=self.priorities[place] if self.priorities else 0,
            shared_prefix=self.plan.prefix_of[place],
        )

    @property
    def held(self) -> list[bool]:
        return [prefix.block_ids is not None for prefix in self.plan.prefixes]


def test_a_prefix_stays_between_its_members_and_goes_with_the_last():
    harness = Harness(num_blocks=8)
    shared = [1] * 8  # two blocks
    batch = Batch(harness, [[*shared, 2, 3], [*shared, 4, 5]])
    batch.add_next()
    harness.drain_until(lambda: not harness.running)
    assert batch.held == [True]
    assert harness.pool.num_used == 2
    # A stranger takes everything else, and its end leaves the whole pool but the prefix evictable.
    harness.add([6] * 20, request_id="stranger")
    harness.drain_until(lambda: not harness.running)
    assert batch.held == [True]
    batch.add_next()
    harness.step()
    assert harness.requests["b1"].num_cached_tokens == 8
    harness.drain()
    assert batch.held == [False]


def test_an_aborted_member_needs_its_prefix_no_longer():
    harness = Harness(num_blocks=8)
    batch = Batch(harness, [[1] * 9, [1] * 8 + [2]])
    batch.add_next()
    harness.step()
    assert batch.held == [True]
    batch.add_next()
    for request_id in ("b0", "b1"):
        harness.scheduler.abort(request_id)
    assert batch.held == [False]
    assert harness.pool.num_used == 0


def test_a_preempted_member_finds_its_prefix_again():
    harness = Harness(num_blocks=7)
    batch = Batch(harness, [[1] * 16 + [2], [1] * 16 + [3]], max_tokens=8)
    for _ in range(2):
        batch.add_next()
    computed = 0
    while harness.scheduler.has_work():
        plan = harness.step()
        computed += plan.num_tokens
        assert batch.held == [True] or not harness.scheduler.has_work()
    assert harness.scheduler.stats.num_preemptions > 0
    assert computed < 2 * 16 + 20  # the 16 tokens once, whatever was preempted
    harness.drain()


def test_a_lone_request_gets_the_memory_of_held_prefixes():
    harness = Harness(num_blocks=6)
    batch = Batch(harness, [[1] * 16 + [2], [1] * 16 + [3]])
    batch.add_next()
    harness.drain_until(lambda: not harness.running)
    assert batch.held == [True]  # four of six blocks
    harness.add([5] * 20, request_id="large")  # five blocks
    harness.drain_until(lambda: not harness.running)
    assert batch.held == [False]
    batch.add_next()
    harness.drain()


def test_no_prefix_waits_for_members_of_another_priority():
    """Eight groups, each with two urgent members and two others: the urgent of all groups run first."""
    harness = Harness(64, policy="priority", max_num_seqs=2)
    prompts = [[group] * 8 + [member] for group in range(8) for member in range(4)]
    batch = Batch(harness, prompts, priorities=[member % 2 for _ in range(8) for member in range(4)])
    while batch.rest:
        batch.add_next()
    most_held = 0
    while harness.scheduler.has_work():
        harness.step()
        most_held = max(most_held, sum(batch.held))
    assert most_held <= 2
    assert harness.scheduler.stats.num_cached_tokens >= 2 * 8 * 8
    harness.drain()


def test_a_batch_that_is_given_up_holds_nothing():
    harness = Harness()
    batch = Batch(harness, [[1] * 8 + [2], [1] * 8 + [3], [1] * 8 + [4]])
    batch.add_next()
    harness.drain_until(lambda: not harness.running)
    assert batch.held == [True]
    harness.scheduler.drop_prefixes(batch.plan.prefixes)
    assert harness.pool.num_used == 0


def test_a_member_that_never_comes_keeps_nothing():
    harness = Harness()
    batch = Batch(harness, [[1] * 8 + [2], [1] * 8 + [3]])
    batch.add_next()
    harness.drain_until(lambda: not harness.running)
    assert batch.held == [True]
    harness.scheduler.give_up_prefix(batch.plan.prefix_of[batch.rest[0]], 1)
    assert batch.held == [False]
    assert harness.pool.num_used == 0


@pytest.mark.parametrize("kv", KV_FACTORIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_lives_of_batches(kv, data):
    """Whatever ends, fails or is preempted: a prefix is held from the first step in which a member has computed it to
    the end of the last member; all blocks come back; everyone gets the tokens that it gets alone."""
    num_blocks, block_size = data.draw(st.integers(3, 16)), data.draw(st.sampled_from([1, 2, 4]))
    harness = Harness(num_blocks, kv=kv, block_size=block_size, max_num_seqs=data.draw(st.integers(1, 5)), vocab_size=4)
    most = min(12, num_blocks * block_size - 1)
    prompts = data.draw(st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=most), min_size=2, max_size=9))
    batch = Batch(harness, prompts, max_tokens=data.draw(st.integers(1, 6)))
    ended = set()
    while batch.rest or harness.scheduler.has_work():
        action = data.draw(st.sampled_from(["add", "add", "step", "step", "step", "abort", "fail"]))
        if action == "add" and batch.rest:
            batch.add_next()
        elif action == "abort" and harness.scheduler.has_work():
            request = data.draw(st.sampled_from(harness.waiting + harness.running))
            harness.scheduler.abort(request.request_id)
            ended.add(request.request_id)
        elif action == "fail":
            plan = harness.step(error=RuntimeError("the device failed"))
            ended.update(item.request.request_id for item in plan.items)
        elif harness.scheduler.has_work():
            harness.step()
        harness.scheduler.check()
        for prefix in batch.plan.prefixes:
            assert (prefix.num_open > 0) or prefix.block_ids is None
            assert prefix.block_ids is None or prefix.parent is None or prefix.parent.block_ids is not None
        if len(harness.running) > 1:  # a lone one may have taken the memory of all
            for request in harness.running:
                prefix = request.shared_prefix
                assert prefix is None or prefix.block_ids or prefix.num_tokens > request.num_computed_tokens
    assert not any(batch.held)
    harness.drain()
    for place in range(len(prompts)):
        request = harness.requests[f"b{place}"]
        output, expected = list(request.output_token_ids), harness.expected_output(request)
        assert output == (expected[: len(output)] if request.request_id in ended else expected)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def grouped_prompts(num_groups: int, members: int, shared: int, own: int) -> list[list[int]]:
    """Members of all groups in turn, the worst order for a cache that forgets."""
    heads = [[10 + (7 * group + i) % 90 for i in range(shared)] for group in range(num_groups)]
    return [
        [*heads[g], *(100 + (13 * g + 5 * m + i) % 80 for i in range(own))]
        for m in range(members)
        for g in range(num_groups)
    ]


def test_each_shared_prefix_is_computed_once_in_a_pool_for_one_group(tiny_dir: Path) -> None:
    prompts = grouped_prompts(5, 4, 64, 16)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    computed = {}
    for order in ("prefix", "arrival"):
        with LLM(tiny_dir, block_size=16, num_blocks=14, max_num_batched_tokens=64, batch_order=order) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            stats = llm.loaded.engine.stats
            computed[order] = sum(len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs)
            assert stats.num_used_blocks == 0
    assert computed["prefix"] == 5 * 64 + 20 * 16
    assert computed["arrival"] > 2 * computed["prefix"]


@pytest.mark.parametrize("num_blocks", [6, 64])
def test_order_changes_no_bit_of_any_output(tiny_dir: Path, num_blocks: int) -> None:
    prompts = [*grouped_prompts(3, 3, 48, 9), [5, 6, 7], [5, 6, 7], [5, 6]]
    params = [
        SamplingParams(temperature=1.0 if i % 2 else 0, max_tokens=3 + i % 5, logprobs=2, n=1 + i % 2, ignore_eos=True)
        for i in range(len(prompts))
    ]
    results = []
    for order in ("prefix", "arrival"):
        with LLM(tiny_dir, block_size=16, num_blocks=num_blocks, max_num_batched_tokens=48, batch_order=order) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            again = llm.generate(prompts, params, use_tqdm=False)  # other seeds, a warm cache
            assert all(one.finish_reason == "length" for output in [*outputs, *again] for one in output.outputs)
            results.append([(output.prompt_token_ids, output.outputs) for output in [*outputs, *again]])
    assert results[0] == results[1]


def test_an_interrupted_batch_holds_nothing(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(tiny_dir, block_size=16, num_blocks=32, max_num_queued_requests=2, max_num_seqs=2) as llm:
        engine, steps = llm.loaded.engine, 0
        step = engine.step

        def interrupted():
            nonlocal steps
            steps += 1
            if steps == 4:
                raise KeyboardInterrupt
            return step()

        monkeypatch.setattr(engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(grouped_prompts(2, 8, 32, 4), SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
        assert engine.stats.num_computed_tokens > 0
        engine.scheduler.check()
        assert engine.stats.num_used_blocks == 0


def test_a_request_that_can_never_run_gives_up_its_place_in_the_batch(tiny_dir: Path) -> None:
    params = SamplingParams(max_tokens=2, n=2, output_kind=RequestOutputKind.FINAL_ONLY)
    with LLM(tiny_dir, block_size=16, num_blocks=4) as llm:
        engine = llm.loaded.engine
        plan = plan_prefixes([[1] * 17, [1] * 70, [1] * 48 + [2] * 9, [1] * 50], [params] * 4, 16)
        for prompt, prefix in zip(([1] * 17, [1] * 48 + [2] * 9), (plan.prefix_of[0], plan.prefix_of[2]), strict=True):
            engine.add_request(str(len(prompt)), prompt, params, shared_prefix=prefix)
        for place in (1, 3):
            with pytest.raises(InvalidRequest, match="places"):
                engine.add_request("long", [1] * 70, params, shared_prefix=plan.prefix_of[place])
        while engine.has_work:
            engine.step()
        assert engine.stats.num_used_blocks == 0
        assert [prefix.num_open for prefix in plan.prefixes] == [0] * len(plan.prefixes)


def test_a_refused_request_keeps_its_place_in_the_batch(tiny_dir: Path) -> None:
    params = SamplingParams(max_tokens=2, n=2, output_kind=RequestOutputKind.FINAL_ONLY)
    with LLM(tiny_dir, block_size=16, num_blocks=32, max_num_queued_requests=3) as llm:
        engine = llm.loaded.engine
        plan = plan_prefixes([[1] * 17, [1] * 18], [params] * 2, 16)
        prefix = plan.prefixes[0]
        assert prefix.num_open == 4
        engine.add_request("a", [1] * 17, params, shared_prefix=prefix)
        with pytest.raises(QueueFull):
            engine.add_request("b", [1] * 18, params, shared_prefix=prefix)
        assert prefix.num_open == 4
        while engine.has_work:
            engine.step()
        assert prefix.num_open == 2
        assert prefix.block_ids is not None
        engine.end_batch(plan.prefixes)
        assert engine.stats.num_used_blocks == 0
