# SPDX-License-Identifier: Apache-2.0
"""The engine survives what goes wrong, and what goes wrong touches only those it concerns."""

import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_device import ByteDetokenizer, ByteTokenizer, FakeDevice, generate_alone
from fastserve.config import EngineConfig, RequestOutputKind, SamplingParams
from fastserve.engine.engine import Engine
from fastserve.engine.scheduler import Scheduler
from fastserve.errors import InvalidRequest, QueueFull
from fastserve.outputs import SampledToken
from fastserve.policies import get_policy
from scheduler_harness import KV_FACTORIES

FINAL = RequestOutputKind.FINAL_ONLY


@pytest.fixture(params=KV_FACTORIES)
def kv(request):
    return request.param


def make_engine(kv, *, num_blocks=64, vocab_size=256, tokenizer=True, device=None, **config):
    config = EngineConfig(**{"block_size": 4, **config})
    device = device or FakeDevice(num_blocks, config.block_size, vocab_size)
    pool, tree = KV_FACTORIES[kv](num_blocks, config.block_size, config.enable_prefix_caching)
    scheduler = Scheduler(
        config,
        num_blocks,
        device.max_model_len,
        device.eos_token_ids,
        get_policy(config.policy),
        pool=pool,
        tree=tree,
    )
    engine = Engine(
        config,
        device,
        lambda: 0.0,
        ByteTokenizer() if tokenizer else None,
        scheduler=scheduler,
        make_detokenizer=ByteDetokenizer if tokenizer else None,
    )
    return engine, device


def drain(engine):
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert engine.stats.num_used_blocks == 0
    engine.scheduler.check()
    return {output.request_id: output for output in outputs if output.finished}


def params(max_tokens=6, **more):
    return SamplingParams(**{"max_tokens": max_tokens, "ignore_eos": True, "output_kind": FINAL, "seed": 1, **more})


def test_a_failing_runner_ends_the_requests_of_its_step_only(kv):
    engine, device = make_engine(kv, max_num_seqs=2)
    for name in "abc":
        engine.add_request(name, [1, 2, 3, 4, 5], params())
    engine.step()
    cause = device.fail_next = RuntimeError("the device is on fire")
    failed = engine.step()
    assert [(o.request_id, o.finished, o.outputs[0].finish_reason) for o in failed] == [
        ("a", True, "error"),
        ("b", True, "error"),
    ]
    assert all(o.error is cause for o in failed)
    outputs = drain(engine)
    assert outputs["c"].outputs[0].finish_reason == "length"
    assert outputs["c"].error is None
    assert outputs["c"].outputs[0].token_ids == generate_alone([1, 2, 3, 4, 5], "", 1, 256, frozenset(), 6, 64)


def test_ctrl_c_is_raised_and_the_engine_can_go_on(kv):
    engine, device = make_engine(kv, max_num_seqs=1)
    engine.add_request("a", [1], params())
    engine.add_request("b", [1], params())
    device.fail_next = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    outputs = drain(engine)
    assert [outputs[name].outputs[0].finish_reason for name in "ab"] == ["error", "length"]


@pytest.mark.parametrize("answer", [[], [None], [SampledToken(None)], [SampledToken(1)] * 2], ids=repr)
def test_a_runner_that_answers_nonsense_has_failed(kv, answer):
    engine, device = make_engine(kv)
    device.run = lambda plan: answer
    engine.add_request("a", [1, 2], params())
    (output,) = engine.step()
    assert output.outputs[0].finish_reason == "error"
    assert isinstance(output.error, ValueError)
    assert drain(engine) == {}


@pytest.mark.parametrize(
    ("bad_token", "message"),
    [(255, "breaks the detokenizer"), (256, "outside the vocabulary"), (-1, "NaN or infinity"), (-2, "allow no token")],
)
def test_a_token_that_breaks_one_request_breaks_only_that_one(kv, bad_token, message):
    engine, device = make_engine(kv)
    run = device.run

    def run_with_bad_token(plan):
        sampled = run(plan)
        for i, item in enumerate(plan.items):
            if item.request.request_id == "bad":
                sampled[i] = SampledToken(bad_token)
            elif sampled[i].token_id == 255:
                sampled[i] = SampledToken(1)
        return sampled

    device.run = run_with_bad_token
    engine.add_request("bad", [1, 2], params())
    engine.add_request("good", [1, 2], params())
    outputs = drain(engine)
    assert outputs["bad"].outputs[0].finish_reason == "error"
    assert message in str(outputs["bad"].error)
    assert outputs["good"].outputs[0].finish_reason == "length"


def test_abort_between_any_two_steps(kv):
    for steps in range(7):
        engine, _ = make_engine(kv, max_num_batched_tokens=3)
        engine.add_request("a", [1, 2, 3, 4, 5, 6, 7], params())
        engine.add_request("b", [1, 2, 3], params())
        seen = [output for _ in range(steps) for output in engine.step()]
        assert not any(output.finished for output in seen)
        assert engine.abort("a")
        assert not engine.abort("a")
        outputs = drain(engine)
        assert outputs["a"].outputs[0].finish_reason == "abort"
        assert outputs["b"].outputs[0].finish_reason == "length"
    assert not engine.abort("nobody")


def test_an_aborted_request_keeps_what_it_had(kv):
    engine, _ = make_engine(kv, vocab_size=7)
    engine.add_request("a", [1, 2], params(stop="\1\2\3\4\5\6", max_tokens=30))
    for _ in range(5):
        engine.step()
    engine.abort("a")
    (output,) = engine.step()
    assert len(output.outputs[0].token_ids) == 5
    assert output.outputs[0].text == bytes(t for t in output.outputs[0].token_ids if t).decode()
    assert not engine.has_work


def test_one_of_n_may_end_alone(kv):
    engine, _ = make_engine(kv)
    engine.add_request("a", [1, 2, 3, 4, 5], params(n=3))
    engine.step()
    engine.scheduler.abort("a#1")
    engine.abort("a")
    (output,) = engine.step()
    assert [c.finish_reason for c in output.outputs] == ["abort"] * 3


BAD_REQUESTS = [
    ({"prompt_token_ids": []}, "empty"),
    ({"prompt_token_ids": [1] * 64}, "64 tokens and one output token need 65 places; 64 are allowed"),
    ({"prompt_token_ids": [1, 256]}, "prompt token 1 is 256; this model's ids are 0 to 255"),
    ({"prompt_token_ids": [-1]}, "prompt token 0 is -1"),
    ({"prompt_token_ids": [1.0]}, "prompt token 0 is 1.0"),
    ({"prompt_token_ids": [True]}, "prompt token 0 is True"),
    ({"prompt_token_ids": ["1"]}, "prompt token 0 is 1"),
    ({"params": params(stop_token_ids=[256])}, "stop_token_ids"),
    ({"params": params(logprobs=21)}, "logprobs=21"),
    ({"params": params(n=5)}, "n=5 is not allowed: max_num_queued_requests is 4"),
    ({"priority": 1.5}, "priority"),
    ({"priority": 2**70}, "priority"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"cache_salt": None}, "cache_salt"),
    ({"request_id": "there"}, "'there'"),
    ({"request_id": "many", "params": params(n=2)}, "'many'"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_REQUESTS, ids=[message for _, message in BAD_REQUESTS])
def test_bad_requests_are_told_why_and_leave_no_trace(kv, bad, message):
    engine, _ = make_engine(kv, max_num_queued_requests=4)
    engine.add_request("there", [1, 2], params())
    engine.add_request("many", [1, 2], params(n=2))
    request = {"request_id": "bad", "prompt_token_ids": [1, 2], "params": params(), **bad}
    with pytest.raises(InvalidRequest, match=message):
        engine.add_request(**request)
    assert engine.num_waiting == 3
    outputs = drain(engine)
    assert sorted(outputs) == ["many", "there"]
    assert all(c.finish_reason == "length" for output in outputs.values() for c in output.outputs)


def test_stop_strings_need_a_tokenizer(kv):
    engine, _ = make_engine(kv, tokenizer=False)
    with pytest.raises(InvalidRequest, match="tokenizer"):
        engine.add_request("a", [1], params(stop="x"))
    engine.add_request("a", [1], params(logprobs=0))
    completion = drain(engine)["a"].outputs[0]
    assert completion.text == ""
    assert len(completion.token_ids) == 6


def test_a_full_queue_takes_all_of_n_or_nothing(kv):
    engine, _ = make_engine(kv, max_num_queued_requests=4)
    engine.add_request("a", [1], params(n=2))
    with pytest.raises(QueueFull):
        engine.add_request("b", [1], params(n=3))
    assert engine.num_waiting == 2
    engine.add_request("b", [1], params(n=2))
    assert sorted(drain(engine)) == ["a", "b"]


def test_n_completions_differ_and_do_not_depend_on_company(kv):
    outputs = []
    for company in (0, 3):
        engine, _ = make_engine(kv, max_num_seqs=4)
        for i in range(company):
            engine.add_request(f"other{i}", [1, 2, 3, 4, 5], params())
        engine.add_request("a", [1, 2, 3, 4, 5], params(n=3))
        outputs.append([c.token_ids for c in drain(engine)["a"].outputs])
    assert outputs[0] == outputs[1]
    assert len({tuple(tokens) for tokens in outputs[0]}) == 3
    engine, _ = make_engine(kv)
    engine.add_request("alone", [1, 2, 3, 4, 5], params())
    assert drain(engine)["alone"].outputs[0].token_ids == outputs[0][0], "the first of n is what n=1 gives"


def test_without_a_seed_requests_differ_and_runs_repeat(kv):
    runs = []
    for seed in (0, 0, 1):
        engine, _ = make_engine(kv, seed=seed)
        for name in "ab":
            engine.add_request(name, [1, 2], params(seed=None))
        outputs = drain(engine)
        runs.append([outputs[name].outputs[0].token_ids for name in "ab"])
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_an_idle_engine_does_nothing(kv):
    engine, device = make_engine(kv)
    device.run = None
    assert not engine.has_work
    assert engine.step() == []


def test_an_engine_needs_no_thread_and_starts_none(kv):
    before = threading.active_count()
    engine, _ = make_engine(kv)
    engine.add_request("a", [1], params())
    drain(engine)
    assert threading.active_count() == before


@pytest.mark.parametrize("kv_name", KV_FACTORIES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=20), st.integers(1, 8), st.integers(1, 3)),
        min_size=1,
        max_size=5,
    ),
    num_blocks=st.integers(6, 20),
    budget=st.integers(1, 30),
    chunk=st.none() | st.integers(1, 9),
    caching=st.booleans(),
)
def test_everybody_gets_the_tokens_they_get_alone(kv_name, requests, num_blocks, budget, chunk, caching):
    def answers(company, num_blocks, **config):
        engine, _ = make_engine(kv_name, num_blocks=num_blocks, vocab_size=9, max_num_queued_requests=100, **config)
        for i in company:
            prompt, max_tokens, n = requests[i]
            engine.add_request(str(i), prompt, params(max_tokens, n=n, seed=i % 2, ignore_eos=False))
        return {i: [c.token_ids for c in output.outputs] for i, output in drain(engine).items()}

    together = answers(
        range(len(requests)),
        num_blocks=max(num_blocks, 8),
        max_num_batched_tokens=budget,
        max_chunk_tokens=chunk,
        enable_prefix_caching=caching,
    )
    for i in range(len(requests)):
        assert answers([i], num_blocks=64)[str(i)] == together[str(i)]
