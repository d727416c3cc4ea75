# SPDX-License-Identifier: Apache-2.0
"""Random lives of a scheduler: whatever arrives, ends or fails, every step keeps every promise."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastserve.config import SamplingParams
from fastserve.errors import InvalidRequest, QueueFull
from scheduler_harness import KV_FACTORIES, Harness

# Two letters and few lengths: prompts share prefixes, and outputs of different requests meet in the tree.
PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=14)


class SchedulerMachine(RuleBasedStateMachine):
    kv = "naive"

    @initialize(
        num_blocks=st.integers(1, 14),
        block_size=st.sampled_from([1, 2, 4]),
        budget=st.integers(1, 20),
        max_num_seqs=st.integers(1, 5),
        max_chunk_tokens=st.none() | st.integers(1, 5),
        prefix_caching=st.booleans() | st.just(True),
        policy=st.sampled_from(["fcfs", "priority"]),
        admission=st.sampled_from(["aggressive", "conservative", "past_future"]),
        vocab_size=st.integers(2, 4),
        max_model_len=st.sampled_from([12, 1000]),
    )
    def start(self, num_blocks, block_size, budget, max_num_seqs, max_chunk_tokens, prefix_caching, policy, **more):
        self.harness = Harness(
            num_blocks,
            kv=self.kv,
            block_size=block_size,
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            max_chunk_tokens=max_chunk_tokens,
            enable_prefix_caching=prefix_caching,
            policy=policy,
            max_num_queued_requests=6,
            **more,
        )
        self.ended_early = set()

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 8),
        ignore_eos=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        salt=st.sampled_from(["", "", "", "other"]),
        seed=st.integers(0, 1),
        priority=st.integers(0, 2),
    )
    def add(self, prompt, max_tokens, ignore_eos, prompt_logprobs, salt, seed, priority):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, prompt_logprobs=prompt_logprobs)
        fits = len(prompt) + 1 <= self.harness.scheduler.max_len
        full = self.harness.scheduler.num_waiting >= 6
        try:
            self.harness.add(prompt, params=params, cache_salt=salt, seed=seed, priority=priority)
        except InvalidRequest:
            assert not fits
        except QueueFull:
            assert full
        else:
            assert fits
            assert not full

    @rule()
    def step(self):
        self.harness.step()

    @rule()
    def three_steps(self):
        for _ in range(3):
            self.harness.step()

    @precondition(lambda self: self.harness.scheduler.has_work())
    @rule(data=st.data(), reason=st.sampled_from(["abort", "stop"]))
    def end_one(self, data, reason):
        live = self.harness.waiting + self.harness.running
        request = data.draw(st.sampled_from(live))
        if reason == "abort":
            assert self.harness.scheduler.abort(request.request_id)
        else:
            self.harness.scheduler.finish(request, "stop", "END")
        self.ended_early.add(request.request_id)
        assert not self.harness.scheduler.abort(request.request_id)

    @precondition(lambda self: self.harness.scheduler.has_work())
    @rule()
    def fail_step(self):
        plan = self.harness.step(error=RuntimeError("the device failed"))
        self.ended_early.update(item.request.request_id for item in plan.items)

    @invariant()
    def books_balance(self):
        if hasattr(self, "harness"):
            self.harness.scheduler.check()

    def teardown(self):
        if not hasattr(self, "harness"):
            return
        requests = self.harness.requests.values()
        total = sum(len(r.prompt_token_ids) + r.params.max_tokens for r in requests)
        self.harness.drain(max_steps=(len(requests) + 1) * (total + 1))
        for request in requests:
            output, expected = list(request.output_token_ids), self.harness.expected_output(request)
            if request.request_id in self.ended_early:
                assert output == expected[: len(output)]
            else:
                assert output == expected, request
                assert request.finish_reason in ("stop", "length")


@pytest.mark.parametrize("kv", KV_FACTORIES)
def test_random_lives(kv):
    machine = type("Machine", (SchedulerMachine,), {"kv": kv})
    machine.TestCase.settings = settings(
        max_examples=300, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine.TestCase().runTest()
