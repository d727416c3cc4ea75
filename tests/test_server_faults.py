# SPDX-License-Identifier: Apache-2.0
"""Exceptions planted at step k: exactly the requests that must fail do, and the server recovers or dies loudly."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastserve import FastserveError
from serving import RunningServer
from tiny_models import make_tiny_checkpoint

BODY = {"max_tokens": 12, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def server(tiny_dir: Path) -> Iterator[RunningServer]:
    with RunningServer(tiny_dir, {"block_size": 16, "num_blocks": 32, "max_num_batched_tokens": 16}) as running:
        yield running


class Planted(Exception):
    pass


def fail_at(owner: Any, name: str, call: int) -> None:
    """The `call`-th call from now on of owner.name raises."""
    real, count = getattr(owner, name), [0]

    def planted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            raise Planted(f"planted in {name}, call {call}")
        return real(*args, **kwargs)

    setattr(owner, name, planted)


def complete(server: RunningServer, **fields: Any) -> httpx.Response:
    return server.post("/v1/completions", {**BODY, "prompt": [5, 6, 7], **fields})


PARTS: dict[str, Any] = {
    "runner": lambda engine: (engine._runner, "run"),
    "sampler": lambda engine: (engine._runner.sampler, "sample"),
    "scheduler.update": lambda engine: (engine.scheduler, "update"),
}


@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("part", PARTS)
def test_a_failed_step_fails_its_requests_and_no_other(server: RunningServer, part: str, step: int) -> None:
    expected = complete(server).json()["choices"]
    fail_at(*PARTS[part](server.engine), step)
    answer = complete(server)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "InternalServerError"
    assert complete(server).json()["choices"] == expected
    assert server.get("/health").status_code == 200
    server.wait_until_empty()


@pytest.mark.parametrize("step", [1, 2, 6])
@pytest.mark.parametrize("part", PARTS)
def test_a_failed_step_spares_those_that_wait(tiny_dir: Path, part: str, step: int) -> None:
    with RunningServer(tiny_dir, {"block_size": 16, "num_blocks": 32, "max_num_seqs": 1}) as server:
        expected = complete(server, prompt=[9, 8]).json()["choices"]
        go, real = threading.Event(), server.engine.scheduler.schedule
        server.engine.scheduler.schedule = lambda now: (go.wait(60), real(now))[1]
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(complete, server)
            server.wait_until(lambda: server.engine.num_waiting == 1)
            waiting = pool.submit(complete, server, prompt=[9, 8])
            server.wait_until(lambda: len(server.llm._commands) == 1)
            fail_at(*PARTS[part](server.engine), step)
            go.set()
        assert running.result().status_code == 500
        assert waiting.result().json()["choices"] == expected
        server.wait_until_empty()


@pytest.mark.parametrize("step", [1, 5])
def test_a_failed_step_ends_a_stream_with_an_error_event(server: RunningServer, step: int) -> None:
    fail_at(server.engine._runner, "run", step)
    text = complete(server, stream=True).text
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert '"error"' in events[-3]
    server.wait_until_empty()


@pytest.mark.parametrize("token", [1, 3, 12])
def test_a_detokeniser_that_fails_fails_one_request_of_many(server: RunningServer, token: int) -> None:
    prompts = [[5 + i] * (i + 2) for i in range(4)]
    live = {"stop": "no such text"}  # else nothing is detokenised before the end
    expected = [complete(server, prompt=prompt, **live).json()["choices"] for prompt in prompts]
    processor = server.engine._outputs
    real, lock, poisoned = processor.add, threading.Lock(), []

    def add(request_id: str, prompt: Any, params: Any, requests: Any) -> None:
        real(request_id, prompt, params, requests)
        with lock:
            if requests[0].prompt_token_ids == prompts[2]:
                poisoned.append(request_id)
                fail_at(processor._groups[request_id].completions[0]._detokenizer, "push", token)

    processor.add = add
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: complete(server, prompt=prompt, **live), prompts))
    assert len(poisoned) == 1
    assert [answer.status_code for answer in answers] == [200, 200, 500, 200]
    assert [answers[i].json()["choices"] for i in (0, 1, 3)] == [expected[i] for i in (0, 1, 3)]
    server.wait_until_empty()


@pytest.mark.parametrize("when", ["made", "flushed"])
def test_a_detokeniser_that_cannot_begin_or_end_fails_its_request(server: RunningServer, when: str) -> None:
    expected = complete(server).json()["choices"]
    processor = server.engine._outputs
    real = processor._make_detokenizer

    def make(skip_special: bool, prompt: Any) -> Any:
        detokenizer = real(skip_special, prompt)
        if prompt == [9, 9]:
            if when == "made":
                raise Planted("planted")
            fail_at(detokenizer, "flush", 1)
        return detokenizer

    processor._make_detokenizer = make
    with ThreadPoolExecutor(2) as pool:
        bad, good = pool.submit(complete, server, prompt=[9, 9]), pool.submit(complete, server)
    assert bad.result().status_code == 500
    assert good.result().json()["choices"] == expected
    server.wait_until_empty()


@pytest.mark.parametrize("step", [1, 3])
def test_a_structure_that_cannot_be_followed_fails_its_request(server: RunningServer, step: int) -> None:
    expected = complete(server).json()["choices"]
    grammars = server.engine._runner.sampler.grammars
    real = grammars.matcher

    def matcher(given: Any) -> Any:
        made = real(given)
        compute, count = made.mask, [0]

        def mask(output: Any) -> Any:
            count[0] += 1
            if count[0] == step:
                raise FastserveError("planted")
            return compute(output)

        made.mask = mask
        return made

    grammars.matcher = matcher
    structure = {"structured_outputs": {"regex": "[a-z]{9,12}"}, "ignore_eos": False}
    with ThreadPoolExecutor(2) as pool:
        bad, good = pool.submit(complete, server, **structure), pool.submit(complete, server)
    assert bad.result().status_code == 500
    assert good.result().json()["choices"] == expected
    server.wait_until_empty()


@pytest.mark.parametrize("step", [1, 4])
def test_a_scheduler_that_fails_ends_the_engine_and_everybody_is_told(server: RunningServer, step: int) -> None:
    told: list[BaseException] = []
    server.llm.on_death = told.append
    fail_at(server.engine.scheduler, "schedule", step)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda i: complete(server, prompt=[5 + i] * 3), range(3)))
    assert {answer.status_code for answer in answers} <= {500, 503}
    assert answers[0].status_code == 500 or answers[1].status_code == 500 or answers[2].status_code == 500
    health = server.get("/health")
    assert health.status_code == 503
    assert "planted in schedule" in health.json()["error"]["message"]
    assert complete(server).status_code == 503
    assert [str(error) for error in told] == [f"planted in schedule, call {step}"]
    assert server.service.num_open == 0


def test_a_step_that_hangs_turns_health_to_503(server: RunningServer) -> None:
    go = threading.Event()
    real = server.engine._runner.run
    server.engine._runner.run = lambda plan: (go.wait(), real(plan))[1]
    server.service._max_step_s = 0.05
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complete, server)
        try:
            server.wait_until(lambda: server.get("/health").status_code == 503)
            assert "in one step" in server.get("/health").json()["error"]["message"]
        finally:
            go.set()
        assert waiting.result().status_code == 200
    server.wait_until(lambda: server.get("/health").status_code == 200)


def test_unexpected_errors_of_an_endpoint_are_not_told_to_clients(server: RunningServer) -> None:
    async def broken(*_: Any) -> None:
        raise Planted("/secret/path")

    server.service.job = broken  # type: ignore[method-assign, assignment]
    answer = complete(server)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert server.service.num_open == 0
    assert asyncio.run(server.llm.check_health()) is None
