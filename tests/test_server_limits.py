# SPDX-License-Identifier: Apache-2.0
"""What guards the server and what clients may ask of it besides text: keys, origins, slow bodies, priorities, usage."""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from fastserve.server.answers import Answer
from fastserve.server.middleware import RequireKey
from fastserve.server.options import ServeOptions
from fastserve.server.protocol import parse_request
from fastserve.server.serve import Lifecycle
from fastserve.server.tool_calls import Call
from serving import RunningServer
from tiny_models import make_tiny_checkpoint

ENGINE: dict[str, Any] = {"block_size": 16, "num_blocks": 32, "max_num_seqs": 1, "policy": "priority"}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(tiny_dir: Path) -> Iterator[RunningServer]:
    with RunningServer(tiny_dir, ENGINE) as running:
        yield running
        running.wait_until_empty()


def test_other_origins_are_told_nothing_by_default(server: RunningServer) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(server.url + "/v1/completions", headers=headers, timeout=60)
    assert preflight.status_code == 405
    answer = server.get("/v1/models", headers=headers)
    for one in (preflight, answer):
        assert not any(name.startswith("access-control") for name in one.headers)


def test_a_body_that_does_not_come_is_a_408(tiny_dir: Path) -> None:
    with (
        RunningServer(tiny_dir, ENGINE, body_timeout=0.2) as server,
        socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection,
    ):
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{")
        received = b""
        while piece := connection.recv(4096):  # the connection is closed after it
            received += piece
    assert received.startswith(b"HTTP/1.1 408")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == 408


def test_every_key_is_compared_in_constant_time_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    guard = RequireKey(None, ["first", "a much longer second key"])  # type: ignore[arg-type]
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key, allowed in (("first", True), ("a much longer second key", True), ("x", False), ("", False)):
        compared.clear()
        assert guard._allows(Headers({"authorization": f"Bearer {key}"})) is allowed
        assert compared == [(32, 32)] * 2  # digests, which say nothing of the keys' lengths
    assert not guard._allows(Headers({"authorization": "Basic first"}))


def test_the_lower_priority_goes_first(server: RunningServer) -> None:
    go = threading.Event()
    ran: dict[int, None] = {}  # priorities, in the order in which they first ran
    real = server.engine._runner.run

    def run(plan: Any) -> Any:
        go.wait(60)
        ran.update((item.request.priority, None) for item in plan.items)
        return real(plan)

    server.engine._runner.run = run
    body = {"prompt": "a", "max_tokens": 3, "ignore_eos": True}
    with ThreadPoolExecutor(3) as pool:
        try:
            answers = []
            for number, priority in enumerate([9, 5, -1], 1):
                answers.append(pool.submit(server.post, "/v1/completions", {**body, "priority": priority}))
                server.wait_until(lambda number=number: server.service.num_open == number)
                server.wait_until(lambda: server.engine.num_running == 1)
            server.wait_until(lambda: len(server.llm._commands) + server.engine.num_waiting == 2)
        finally:
            go.set()
        assert [answer.result().status_code for answer in answers] == [200] * 3
    server.engine._runner.run = real
    assert list(ran) == [9, -1, 5]


def test_usage_can_come_with_every_chunk(server: RunningServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": [5, 6], "max_tokens": 4, "ignore_eos": True, "stream": True, "stream_options": options}
    events = [json.loads(one[6:]) for one in server.post("/v1/completions", body).text.split("\n\n")[:-2]]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1], len(counts)) == (1, 4, 5)
    assert events[-1]["choices"] == []


@pytest.mark.parametrize(("parallel", "num_calls"), [(None, 2), (True, 2), (False, 1)])
def test_without_parallel_tool_calls_the_first_call_counts(parallel: bool | None, num_calls: int) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "parallel_tool_calls": parallel}
    answer = Answer(parse_request("/v1/chat/completions", body), "m", None)
    calls = answer.tool_calls([Call("f", "{}"), Call("g", "{}")])
    assert [call.function.name for call in calls] == ["f", "g"][:num_calls]


@pytest.mark.parametrize("keep_alive", [False, True])
def test_a_dead_engines_server_ends_unless_it_is_to_stay(keep_alive: bool, capsys: pytest.CaptureFixture[str]) -> None:
    async def die() -> tuple[bool, int]:
        service = SimpleNamespace(draining=False, num_open=0, wait_until_idle=lambda: asyncio.sleep(0))
        http: Any = SimpleNamespace(should_exit=False)
        lifecycle = Lifecycle(service, http, ServeOptions(keep_alive_on_engine_death=keep_alive))  # type: ignore[arg-type]
        lifecycle._died(RuntimeError("planted"))
        if lifecycle._draining is not None:
            await lifecycle._draining
        return http.should_exit, lifecycle.status()

    assert asyncio.run(die()) == (not keep_alive, 1)
    assert capsys.readouterr().err.splitlines()[-1] == "fastserve: the engine died: RuntimeError('planted')"
