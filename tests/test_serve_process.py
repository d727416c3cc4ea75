# SPDX-License-Identifier: Apache-2.0
"""`fastserve serve` as a process: start, signals, exit status, idle cost, flags and their environment variables."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastserve.cli import _parser, main
from fastserve.server.options import read_options
from serving import ServerProcess as Process
from serving import held
from tiny_models import make_tiny_checkpoint

BODY = {"prompt": [5, 6, 7], "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()


SLOW = (
    "import time, fastserve.engine.runner as r; real = r.ModelRunner.run\n"
    "r.ModelRunner.run = lambda self, plan: (time.sleep(0.05), real(self, plan))[1]"
)


def stream(process: Process, **fields: Any) -> socket.socket:
    """Sends a streamed request and returns when its first token has come."""
    port = int(process.url.rsplit(":", 1)[1])
    body = json.dumps({**BODY, "stream": True, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    received = b""
    while b"data: " not in received:
        received += connection.recv(4096)
    return connection


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while piece := connection.recv(65536):
        received += piece
    connection.close()
    return received


def test_sigterm_lets_running_requests_finish_and_exits_with_0(
    tiny_dir: Path, tmp_path: Path, processes: list[Process]
) -> None:
    process = Process(tiny_dir, code=held(5, tmp_path / "go"))
    processes.append(process)
    connection = stream(process, max_tokens=30)
    process.popen.send_signal(signal.SIGTERM)
    process.wait_for("SIGTERM")
    assert httpx.get(process.url + "/health", timeout=60).status_code == 503
    assert httpx.post(process.url + "/v1/completions", json=BODY, timeout=60).status_code == 503
    (tmp_path / "go").touch()
    received = read_all(connection)
    assert b'"finish_reason":"length"' in received
    assert b"data: [DONE]" in received
    status, log = process.end()
    assert status == 0, log
    assert "finished reason=length prompt=3 cached=0 output=30" in log


def test_what_does_not_finish_in_time_ends_with_an_error(tiny_dir: Path, processes: list[Process]) -> None:
    process = Process(tiny_dir, "--shutdown-timeout", "0.1", code=SLOW)
    processes.append(process)
    connection = stream(process, max_tokens=400)
    process.popen.send_signal(signal.SIGTERM)
    received = read_all(connection)
    assert b'"error"' in received
    assert b"data: [DONE]" in received
    status, log = process.end()
    assert status == 0, log


def test_a_second_signal_ends_the_process_at_once(tiny_dir: Path, processes: list[Process]) -> None:
    process = Process(tiny_dir, code=SLOW)
    processes.append(process)
    connection = stream(process, max_tokens=400)
    process.popen.send_signal(signal.SIGTERM)
    process.wait_for("SIGTERM")
    process.popen.send_signal(signal.SIGTERM)
    status, _ = process.end()
    assert status == 128 + signal.SIGTERM
    connection.close()


def test_a_dead_engine_ends_the_process_with_its_cause_last(tiny_dir: Path, processes: list[Process]) -> None:
    code = (
        "import fastserve.engine.scheduler as s; real = s.Scheduler.schedule\n"
        "def schedule(self, now):\n"
        "    if self.has_work(): raise RuntimeError('planted')\n"
        "    return real(self, now)\n"
        "s.Scheduler.schedule = schedule"
    )
    process = Process(tiny_dir, code=code)
    processes.append(process)
    assert httpx.post(process.url + "/v1/completions", json=BODY, timeout=60).status_code == 500
    status, log = process.end()
    assert status == 1
    assert log.strip().splitlines()[-1] == "fastserve: the engine died: RuntimeError('planted')"


def test_an_idle_server_on_a_unix_socket_sleeps(tiny_dir: Path, tmp_path: Path, processes: list[Process]) -> None:
    path = tmp_path / "socket"
    process = Process(tiny_dir, "--uds", str(path))
    processes.append(process)
    assert os.stat(path).st_mode & 0o077 == 0  # for this user only

    def threads() -> dict[str, tuple[str, int]]:
        """Each thread's state, and how often it went to sleep: once for each time it woke."""
        found = {}
        for task in Path(f"/proc/{process.popen.pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                fields = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
                found[task.name] = (fields["State"].split()[0], int(fields["voluntary_ctxt_switches"]))
        return found

    def is_quiet() -> bool:
        """One second of it. A loop that polls wakes a thousand times, one that spins never sleeps, however busy the
        machine is; uvicorn's own clock ticks ten times."""
        seen = [threads()]
        for _ in range(20):
            time.sleep(0.05)
            seen.append(threads())
        wakes = sum(switches - seen[0].get(name, ("", 0))[1] for name, (_, switches) in seen[-1].items())
        return wakes < 200 and any(all(state == "S" for state, _ in one.values()) for one in seen)

    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://local", timeout=60) as client:
        client.post("/v1/completions", json={**BODY, "max_tokens": 5}).raise_for_status()
        client.get("/health").raise_for_status()
        assert any(is_quiet() for _ in range(10)), "awake in each of ten seconds"
        client.get("/health").raise_for_status()
    process.popen.send_signal(signal.SIGINT)
    assert process.end()[0] == 0


def test_a_flag_beats_its_variable_and_a_variable_the_default() -> None:
    parsed = _parser().parse_args(["serve", "m", "--port", "1234", "--api-key", "a", "--api-key", "b"])
    environment = {
        "FASTSERVE_PORT": "99",
        "FASTSERVE_API_KEY": "x",
        "FASTSERVE_MAX_MODEL_LEN": "4k",
        "FASTSERVE_SERVED_MODEL_NAME": "one, two",
        "FASTSERVE_ENABLE_PREFIX_CACHING": "0",
    }
    options = read_options(parsed, environment)
    assert (options.port, options.api_key, options.host) == (1234, ["a", "b"], "127.0.0.1")
    assert options.served_model_name == ["one", "two"]
    assert options.engine_options() == {"max_model_len": 4096, "enable_prefix_caching": False}
    parsed = _parser().parse_args(["serve", "m"])
    assert read_options(parsed, {"FASTSERVE_PORT": "tcp://10.0.0.1:80"}).port == 8000
    with pytest.raises(ValueError, match="FASTSERVE_PORT"):
        read_options(parsed, {"FASTSERVE_PORT": "high"})


@pytest.mark.parametrize("flags", [["--port", "70000"], ["--nothing"], ["--max-num-seqs", "many"]])
def test_flags_that_cannot_be_read_are_wrong_usage(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "m", *flags])
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_errors_at_start_are_one_line(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(tiny_dir), "--num-blocks", "8", "--port", str(taken.getsockname()[1])]) == 1
    assert "cannot listen" in capsys.readouterr().err
