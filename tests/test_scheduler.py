# SPDX-License-Identifier: Apache-2.0
"""What a step contains, case by case. The harness checks what must hold in every step."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_device import generate_alone
from fastserve.config import SamplingParams
from fastserve.engine.waiting import WaitingQueue
from fastserve.errors import InvalidRequest, QueueFull
from fastserve.request import Request, RequestStatus
from scheduler_harness import KV_FACTORIES, Harness


@pytest.fixture(params=KV_FACTORIES)
def kv(request):
    return request.param


def shape(plan):
    return [(item.request.request_id, item.start, item.num_new_tokens) for item in plan.items]


def ignoring_eos(max_tokens, **more):
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **more)


def test_decodes_come_first_and_a_prompt_fills_the_rest(kv):
    h = Harness(64, kv=kv, max_num_batched_tokens=10)
    h.add([1, 2, 3], params=ignoring_eos(9), request_id="a")
    assert shape(h.step()) == [("a", 0, 3)]
    h.add([5] * 25, params=ignoring_eos(9), request_id="b")
    h.add([6] * 4, params=ignoring_eos(9), request_id="c")
    assert shape(h.step()) == [("a", 3, 1), ("b", 0, 9)]
    assert shape(h.step()) == [("a", 4, 1), ("b", 9, 9)]
    assert shape(h.step()) == [("a", 5, 1), ("b", 18, 7), ("c", 0, 2)]
    assert shape(h.step()) == [("a", 6, 1), ("b", 25, 1), ("c", 2, 2)]
    assert shape(h.step()) == [("a", 7, 1), ("b", 26, 1), ("c", 4, 1)]
    h.drain()


def test_the_last_token_of_a_prompt_counts_as_a_decode(kv):
    h = Harness(64, kv=kv, max_num_batched_tokens=4)
    h.add([1] * 9, request_id="long")
    h.step()
    h.step()
    h.add([2] * 9, request_id="next")
    assert shape(h.step()) == [("long", 8, 1), ("next", 0, 3)]


def test_chunks_keep_to_their_cap_and_prompts_share_the_budget(kv):
    h = Harness(64, kv=kv, max_num_batched_tokens=10, max_chunk_tokens=4)
    h.add([1] * 9, request_id="a")
    h.add([2] * 9, request_id="b")
    h.add([3] * 9, request_id="c")
    assert shape(h.step()) == [("a", 0, 4), ("b", 0, 4), ("c", 0, 2)]
    assert shape(h.step()) == [("a", 4, 4), ("b", 4, 4), ("c", 2, 2)]
    h.drain()


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 20, 21])
@pytest.mark.parametrize("budget", [1, 5, 64])
def test_tokens_do_not_depend_on_chunks_or_budget(kv, chunk, budget):
    h = Harness(64, kv=kv, max_num_batched_tokens=budget, max_chunk_tokens=chunk)
    requests = [h.add([1, 2] * 10 + [i], max_tokens=6) for i in range(4)]
    h.drain()
    for request in requests:
        assert list(request.output_token_ids) == h.expected_output(request)


def test_a_cached_prompt_is_not_computed_again(kv):
    h = Harness(64, kv=kv, block_size=4)
    prompt = list(range(1, 15))
    h.add(prompt, max_tokens=1, request_id="first")
    h.drain()
    # drain() emptied the cache: compute it once more, and look at the second reader
    h.add(prompt, max_tokens=1, request_id="second")
    h.step()
    third = h.add(prompt, max_tokens=1, request_id="third")
    assert shape(h.step()) == [("third", 12, 2)]
    assert third.num_cached_tokens == 12


def test_a_fully_cached_prompt_still_computes_its_last_block(kv):
    h = Harness(64, kv=kv, block_size=4)
    h.add([1] * 8, max_tokens=1)
    h.step()
    again = h.add([1] * 8, params=ignoring_eos(3))
    plan = h.step()
    assert [(item.start, item.num_new_tokens) for item in plan.items] == [(4, 4)]
    assert again.num_cached_tokens == 4
    h.drain()


def test_no_more_requests_run_than_the_budget_has_tokens(kv):
    h = Harness(64, kv=kv, max_num_batched_tokens=3, max_num_seqs=100)
    for i in range(8):
        h.add([i] * 5, params=ignoring_eos(9))
    while h.scheduler.num_running < 3:
        h.step()
    assert len(h.step().items) == 3
    h.drain()


def test_requests_of_one_step_share_what_it_computes(kv):
    h = Harness(64, kv=kv, block_size=4, max_num_batched_tokens=64)
    prompt = list(range(1, 15))
    siblings = [h.add(prompt, params=ignoring_eos(5), seed=i) for i in range(4)]
    plan = h.step()
    assert [(item.start, item.num_new_tokens) for item in plan.items] == [(0, 14)] + [(12, 2)] * 3
    assert h.pool.num_used == 3 + 4
    h.drain()
    for request in siblings:
        assert list(request.output_token_ids) == h.expected_output(request)


def test_prompts_in_progress_pick_up_what_others_computed(kv):
    """With a chunk cap, siblings compute different parts of the shared prompt in the same step."""
    h = Harness(64, kv=kv, block_size=4, max_num_batched_tokens=16, max_chunk_tokens=4)
    prompt = list(range(1, 42))
    for i in range(4):
        h.add(prompt, max_tokens=1, seed=i)
    assert [(item.start, item.num_new_tokens) for item in h.step().items] == [(0, 4), (4, 4), (8, 4), (12, 4)]
    assert [item.start for item in h.step().items] == [16, 20, 24, 28]
    h.drain()
    # 40 tokens once, and the last token of each prompt
    assert h.scheduler.stats.num_computed_tokens == 40 + 4


def test_output_is_cached_as_well(kv):
    h = Harness(64, kv=kv, block_size=4)
    first = h.add([1] * 6, params=ignoring_eos(7), request_id="turn1")
    while h.scheduler.has_work():
        h.step()
    turn2 = h.add([*first.token_ids, 3, 3], max_tokens=2, request_id="turn2")
    h.step()
    assert turn2.num_cached_tokens == 12, "13 tokens of turn 1, the last of which was never computed"


def test_equal_outputs_end_in_one_copy(kv):
    h = Harness(64, kv=kv, block_size=2)
    twins = [h.add([1, 2, 3], params=ignoring_eos(9)) for _ in range(2)]
    for _ in range(6):
        h.step()
        shared = min(len(twin.token_ids) - 1 for twin in twins) // 2
        assert twins[0].block_ids[:shared] == twins[1].block_ids[:shared]
    h.drain()


def test_salts_share_nothing(kv):
    h = Harness(64, kv=kv)
    requests = [h.add([1] * 13, cache_salt=salt) for salt in ("", "x", "y")]
    h.drain()
    assert [r.num_cached_tokens for r in requests] == [0, 0, 0]


def test_without_prefix_caching_nothing_is_shared(kv):
    h = Harness(64, kv=kv, enable_prefix_caching=False)
    requests = [h.add([1] * 13) for _ in range(3)]
    h.drain()
    assert [r.num_cached_tokens for r in requests] == [0, 0, 0]


def test_prompt_logprobs_compute_every_row(kv):
    h = Harness(64, kv=kv, block_size=4)
    h.add([1] * 13, max_tokens=1)
    h.step()
    request = h.add([1] * 13, params=SamplingParams(max_tokens=2, prompt_logprobs=0))
    assert h.step().items[0].num_new_tokens == 13
    assert request.num_cached_tokens == 0
    h.drain()


def test_the_last_request_is_preempted_and_recomputed(kv):
    h = Harness(6, kv=kv, block_size=2, enable_prefix_caching=False)
    first = h.add([1, 2, 3], params=ignoring_eos(8), request_id="first")
    last = h.add([4, 5, 6], params=ignoring_eos(8), request_id="last")
    preempted = []
    while h.scheduler.has_work():
        preempted += h.step().preempted
    assert preempted
    assert set(preempted) == {"last"}
    assert (first.num_preemptions, last.num_preemptions) == (0, len(preempted))
    for request in (first, last):
        assert list(request.output_token_ids) == h.expected_output(request)
    assert h.scheduler.stats.num_preemptions == len(preempted)


def test_a_prompt_without_memory_does_not_touch_a_decode_of_this_step(kv):
    h = Harness(6, kv=kv, block_size=2, max_chunk_tokens=2, enable_prefix_caching=False)
    prompt = h.add([1] * 9, request_id="prompt")
    decode = h.add([2] * 2, params=ignoring_eos(8), request_id="decode")
    for _ in range(3):
        assert h.step().preempted == ()
    plan = h.step()
    assert shape(plan) == [("decode", 4, 1)]
    assert plan.preempted == ("prompt",)
    h.drain()
    for request in (prompt, decode):
        assert list(request.output_token_ids) == h.expected_output(request)


def test_a_preempted_request_goes_before_those_that_wait(kv):
    h = Harness(6, kv=kv, block_size=2, max_num_batched_tokens=12)
    h.add([1, 2, 3, 4], params=ignoring_eos(8), request_id="a")
    h.add([2, 2, 3, 4], params=ignoring_eos(8), request_id="b")
    h.add([3, 2, 3, 4], params=ignoring_eos(8), request_id="c")
    while h.requests["b"].num_preemptions == 0:
        h.step()
    assert [r.request_id for r in h.waiting] == ["b", "c"]
    h.drain()


def test_priority_decides_who_starts_and_who_yields(kv):
    h = Harness(6, kv=kv, block_size=2, policy="priority", max_num_batched_tokens=12)
    h.add([1, 2, 3, 4], params=ignoring_eos(8), request_id="low", priority=5)
    h.step()
    h.add([2, 2, 3, 4], params=ignoring_eos(6), request_id="mid", priority=1)
    h.add([3, 2, 3], params=ignoring_eos(6), request_id="high", priority=0)
    h.step()
    assert h.requests["high"].first_scheduled_s is not None
    h.drain()
    assert h.requests["low"].num_preemptions >= 1
    assert h.requests["high"].num_preemptions == 0


def test_nobody_starves_behind_a_stream_of_small_requests(kv):
    h = Harness(12, kv=kv, block_size=2, max_num_batched_tokens=4, max_num_seqs=3)
    big = h.add([1, 2] * 10, max_tokens=2, request_id="big")
    for i in range(200):
        if h.scheduler.num_waiting < 4:
            h.add([3, 1 + i % 3], max_tokens=3)
        h.step()
        if big.status is RequestStatus.FINISHED:
            break
    assert big.finish_reason in ("stop", "length")


def test_a_request_may_fill_the_whole_cache_and_ends_there(kv):
    h = Harness(4, kv=kv, block_size=2)
    request = h.add([1] * 7, params=ignoring_eos(None))
    other = h.add([2] * 3, params=ignoring_eos(None))
    h.drain()
    assert (request.finish_reason, len(request.token_ids)) == ("length", 8)
    assert (other.finish_reason, len(other.token_ids)) == ("length", 8)


def test_context_ends_at_max_model_len(kv):
    h = Harness(64, kv=kv, max_model_len=10)
    request = h.add([1] * 9, params=ignoring_eos(None))
    h.drain()
    assert (request.finish_reason, len(request.token_ids)) == ("length", 10)
    with pytest.raises(InvalidRequest, match="10 tokens and one output token need 11 places; 10 are allowed"):
        h.add([1] * 10)


def test_what_can_never_run_is_refused(kv):
    h = Harness(4, kv=kv, block_size=2, max_num_queued_requests=2)
    with pytest.raises(InvalidRequest, match="empty"):
        h.add([])
    with pytest.raises(InvalidRequest, match="the KV cache holds 8 tokens"):
        h.add([1] * 8)
    h.add([1], request_id="x")
    with pytest.raises(InvalidRequest, match=r"'x'.*unique"):
        h.add([1], request_id="x")
    h.add([1], request_id="y")
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        h.add([1], request_id="z")
    h.drain()


def stop_case(h, params):
    """A request whose third token is known, so that a test can make it a stop token."""
    request = h.add([1, 2, 3], params=ignoring_eos(8))
    h.drain()
    expected = list(request.output_token_ids)
    return expected, h.add([1, 2, 3], params=SamplingParams(max_tokens=8, ignore_eos=True, **params(expected)))


def test_eos_ends_with_stop_and_no_reason(kv):
    h = Harness(64, kv=kv, vocab_size=2)
    request = h.add([1, 1], max_tokens=50)
    h.drain()
    assert (request.finish_reason, request.stop_reason, request.token_ids[-1]) == ("stop", None, 0)


def test_a_stop_token_ends_with_its_id(kv):
    h = Harness(64, kv=kv, vocab_size=1000)
    expected, request = stop_case(h, lambda out: {"stop_token_ids": [out[2]]})
    h.drain()
    assert (request.finish_reason, request.stop_reason) == ("stop", expected[2])
    assert list(request.output_token_ids) == expected[:3]


def test_min_tokens_holds_back_every_stop_token(kv):
    h = Harness(64, kv=kv, vocab_size=1000)
    expected, request = stop_case(h, lambda out: {"stop_token_ids": out, "min_tokens": 5})
    assert request.must_go_on
    h.drain()
    assert list(request.output_token_ids) == expected[:5]
    assert not request.must_go_on


def test_min_tokens_holds_back_eos(kv):
    h = Harness(64, kv=kv, vocab_size=1)  # this device says nothing but EOS
    request = h.add([0], params=SamplingParams(max_tokens=9, min_tokens=4))
    h.drain()
    assert (request.finish_reason, request.num_output_tokens) == ("stop", 4)


def test_max_tokens_ends_with_length(kv):
    h = Harness(64, kv=kv)
    request = h.add([1, 2], params=ignoring_eos(3))
    h.drain()
    assert (request.finish_reason, request.num_output_tokens) == ("length", 3)


def test_abort_in_every_state(kv):
    h = Harness(64, kv=kv, max_num_batched_tokens=4)
    for request_id in ("decoding", "mid-prompt", "waiting"):
        h.add([1] * 3 if request_id == "decoding" else [2] * 9, params=ignoring_eos(9), request_id=request_id)
    h.step()
    h.step()
    assert [h.requests[i].num_computed_tokens for i in h.requests] == [4, 4, 0]
    for request_id in h.requests:
        assert h.scheduler.abort(request_id)
        assert not h.scheduler.abort(request_id)
        assert h.requests[request_id].finish_reason == "abort"
        h.scheduler.check()
    assert h.pool.num_used == 0
    assert not h.scheduler.has_work()


def test_plans_tell_the_runner_whom_to_forget(kv):
    h = Harness(64, kv=kv, max_num_seqs=2)
    for request_id, max_tokens in [("one", 1), ("two", 2), ("stays", 9), ("never ran", 9)]:
        h.add([1], params=ignoring_eos(max_tokens), request_id=request_id)
    assert h.step().finished == ()
    h.scheduler.abort("never ran")
    assert h.step().finished == ("one",)
    assert h.step().finished == ("two",)
    h.scheduler.abort("stays")
    assert h.step().items == ()
    h.add([1], params=ignoring_eos(1), request_id="stays")
    assert h.step().finished == ("stays",)
    assert h.step().items == ()


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove", "first"]), st.integers(0, 99)), max_size=200))
def test_waiting_queue_is_a_sorted_list_with_removal(operations):
    queue, model, count = WaitingQueue(), [], 0
    for name, number in operations:
        if name == "push":
            request = Request(f"{number % 7}-{count}", [1], SamplingParams(), queue_key=(number, count))
            queue.push(request)
            model = sorted([*model, request], key=lambda r: r.queue_key)
            count += 1
        elif model and name == "pop":
            assert queue.pop() is model.pop(0)
        elif model and name == "first":
            assert queue.first() is model[0]
        elif model:
            queue.remove(model.pop(number % len(model)))
        assert len(queue) == len(model)
        assert len(queue._heap) <= 2 * len(model) + 17, "what was removed may not pile up"
    assert [queue.pop() for _ in range(len(queue))] == model


def test_waiting_queue_stays_in_order_when_it_sweeps():
    queue, random = WaitingQueue(), Random(1)
    requests = [Request(str(i), [1], SamplingParams(), queue_key=(random.random(), i)) for i in range(300)]
    for request in requests:
        queue.push(request)
    for request in requests[:250]:
        queue.remove(request)
    assert [queue.pop() for _ in range(50)] == sorted(requests[250:], key=lambda r: r.queue_key)


def test_an_aborted_id_can_be_used_again(kv):
    h = Harness(64, kv=kv, max_num_seqs=1)
    h.add([1], params=ignoring_eos(50), request_id="runs")
    h.step()
    for _ in range(100):
        request = h.add([2], request_id="again")
        h.scheduler.abort("again")
    request = h.add([2], request_id="again")
    assert h.scheduler.num_waiting == 1
    h.scheduler.abort("runs")
    h.drain()
    assert list(request.output_token_ids) == h.expected_output(request)


def test_a_failed_step_ends_its_requests_and_leaves_no_trace(kv):
    h = Harness(64, kv=kv, block_size=4, max_num_batched_tokens=32, max_num_seqs=3)
    prompt = list(range(1, 9))
    failing = [h.add(prompt + [i] * 5, seed=i) for i in range(3)]  # each adds a block below the shared ones
    outside = h.add(prompt + [0] * 5, seed=9)
    h.step(error=RuntimeError("boom"))
    assert [r.finish_reason for r in failing] == ["error"] * 3
    assert h.pool.num_free == h.num_blocks, "nothing that was not computed may stay cached"
    h.step()
    assert outside.num_cached_tokens == 0
    h.drain()
    assert list(outside.output_token_ids) == h.expected_output(outside)


def test_steps_alternate(kv):
    h = Harness(64, kv=kv)
    request = h.add([1, 2, 3])
    plan = h.scheduler.schedule(0.0)
    for forbidden in (lambda: h.scheduler.schedule(0.0), lambda: h.scheduler.abort(request.request_id)):
        with pytest.raises(RuntimeError, match="step"):
            forbidden()
    for wrong in ([], [None], [1, 2]):
        with pytest.raises(ValueError, match="do not fit"):
            h.scheduler.update(plan, wrong, 0.0)
    assert h.scheduler.update(plan, [4], 0.0) == [request]
    for late in (lambda: h.scheduler.update(plan, [4], 0.0), lambda: h.scheduler.fail(plan)):
        with pytest.raises(RuntimeError, match="not the one"):
            late()
    assert h.scheduler.abort(request.request_id)
    h.drain()


def test_times_are_kept(kv):
    h = Harness(64, kv=kv, max_num_batched_tokens=2)
    request = h.add([1, 2, 3], params=ignoring_eos(3))
    h.drain()
    assert (request.first_scheduled_s, request.first_token_s, request.last_token_s) == (1.0, 2.0, 4.0)


def test_an_admission_that_starts_anybody_cannot_break_memory(kv):
    h = Harness(5, kv=kv, block_size=2, max_num_batched_tokens=7)
    h.scheduler._admission = type("Eager", (), {"admit": lambda *_: True})()
    h.check_work_conserving = lambda plan: None
    requests = [h.add([i, 1, 2, 3], params=ignoring_eos(5)) for i in range(4)]
    h.drain(max_steps=500)
    for request in requests:
        assert list(request.output_token_ids) == h.expected_output(request)


def test_the_fake_device_is_a_function_of_the_tokens():
    alone = generate_alone([1, 2], "", 0, 50, frozenset(), 5, 100)
    assert alone == generate_alone([1, 2], "", 0, 50, frozenset(), 5, 100)
    assert alone != generate_alone([1, 2], "salt", 0, 50, frozenset(), 5, 100)
