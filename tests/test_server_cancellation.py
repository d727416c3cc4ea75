# SPDX-License-Identifier: Apache-2.0
"""Clients that leave, in every phase, and a full queue."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import RunningServer
from tiny_models import make_tiny_checkpoint


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


class Gate:
    """Lets the engine take steps only when a test says so."""

    def __init__(self, server: RunningServer) -> None:
        self._allowed = threading.Semaphore(0)
        self._open = False
        self.num_steps = 0
        inner = server.engine._runner
        real = inner.run

        def run(plan: Any) -> Any:
            if not self._open:
                self._allowed.acquire()
            self.num_steps += 1
            return real(plan)

        inner.run = run

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._allowed.release()

    def open(self) -> None:
        self._open = True
        self._allowed.release(1000)


@pytest.fixture
def server(tiny_dir: Path) -> Iterator[RunningServer]:
    engine = {"block_size": 16, "num_blocks": 32, "max_num_batched_tokens": 16, "max_num_seqs": 2}
    with RunningServer(tiny_dir, {**engine, "max_num_queued_requests": 3}, keep_alive_comment=0.02) as running:
        running.gate = Gate(running)  # type: ignore[attr-defined]
        yield running
        running.gate.open()  # type: ignore[attr-defined]
        running.wait_until_empty()


def send(server: RunningServer, **fields: Any) -> socket.socket:
    """Sends a request and reads nothing."""
    body = json.dumps({"max_tokens": 200, "ignore_eos": True, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "steps"), [([5] * 100, 0), ([5] * 100, 2), ([5] * 4, 4)], ids=["first step", "prefill", "decode"]
)
def test_a_client_that_leaves_gives_its_blocks_back_within_two_steps(
    server: RunningServer, stream: bool, prompt: list[int], steps: int
) -> None:
    gate: Gate = server.gate  # type: ignore[attr-defined]
    connection = send(server, prompt=prompt, stream=stream)
    server.wait_until(lambda: server.engine.num_running == 1)
    gate.step(steps)
    server.wait_until(lambda: gate.num_steps == steps)
    assert server.service.num_open == 1
    connection.close()
    server.wait_until(lambda: server.service.num_open == 0)
    gate.step(2)
    server.wait_until_empty()
    assert gate.num_steps <= steps + 2


def test_a_client_that_leaves_the_queue_never_runs(server: RunningServer) -> None:
    gate: Gate = server.gate  # type: ignore[attr-defined]
    first = [send(server, prompt=[5 + i] * 4, max_tokens=3) for i in range(2)]
    server.wait_until(lambda: server.service.num_open == 2)
    waiting = send(server, prompt=[9] * 4)
    server.wait_until(lambda: server.service.num_open == 3)
    waiting.close()
    server.wait_until(lambda: server.service.num_open == 2)
    gate.open()
    server.wait_until_empty()
    assert gate.num_steps < 50
    for connection in first:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()


def test_a_client_that_stops_reading_and_leaves_while_the_answer_is_flushed(server: RunningServer) -> None:
    server.gate.open()  # type: ignore[attr-defined]
    connection = send(server, prompt=[5] * 4, stream=True, n=2, logprobs=20)
    server.wait_until(lambda: not server.engine.has_work)  # all is generated, and not all is read
    connection.close()
    server.wait_until_empty()


def test_a_silent_stream_is_kept_open_by_comments(server: RunningServer) -> None:
    gate: Gate = server.gate  # type: ignore[attr-defined]
    connection = send(server, prompt=[5] * 4, stream=True, max_tokens=1)
    received = b""
    while received.count(b": keep-alive\n\n") < 2:
        received += connection.recv(4096)
    gate.open()
    while b"data: [DONE]" not in received:
        received += connection.recv(4096)
    connection.close()


def test_a_full_queue_is_a_429_with_retry_after(server: RunningServer) -> None:
    accepted = [send(server, prompt=[5 + i] * 4, max_tokens=3) for i in range(3)]
    server.wait_until(lambda: server.service.num_open == 3)
    refused = 0
    while not refused:  # places in the step are taken while we look: the limit is 3 waiting besides the running
        answer = server.post("/v1/completions", {"prompt": [1] * 4, "max_tokens": 1, "n": 3})
        refused += answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "queue_full"
    server.gate.open()  # type: ignore[attr-defined]
    for connection in accepted:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()
    assert server.post("/v1/completions", {"prompt": "a", "n": 4}).status_code == 400  # can never wait


def test_a_draining_server_refuses_and_finishes_what_runs(server: RunningServer) -> None:
    connection = send(server, prompt=[5] * 4, max_tokens=3)
    server.wait_until(lambda: server.service.num_open == 1)
    server.service.draining = True
    assert server.get("/health").status_code == 503
    answer = server.post("/v1/completions", {"prompt": "a"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    server.gate.open()  # type: ignore[attr-defined]
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
