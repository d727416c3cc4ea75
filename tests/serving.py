# SPDX-License-Identifier: Apache-2.0
"""Servers on free ports: in a thread of the test's own process, so that tests can look inside the engine, and as a
process."""

from __future__ import annotations

import asyncio
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai

from fastserve import AsyncLLM
from fastserve.server.app import make_app
from fastserve.server.options import ServeOptions
from fastserve.server.serve import _listen, http_server, make_batches, make_service


def wait_until(holds: Callable[[], bool]) -> None:
    """Polls for what another thread or process is about to do; a bound, not a measurement."""
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


class RunningServer:
    """Use as a context manager. `engine` holds EngineConfig's options, `options` those of the server."""

    def __init__(self, model_dir: Path, engine: dict[str, Any] | None = None, **options: Any) -> None:
        self.llm = AsyncLLM(model_dir, **(engine or {}))
        self.options = ServeOptions(port=0, **options)
        self._model = str(model_dir)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self.service = make_service(self.llm, self._model, self.options)
        self.batches = make_batches(self.service, self.options)
        self.app = make_app(self.service, self.options, self.batches)
        self._server = http_server(self.app, self.options)
        sockets = _listen(self.options)
        self.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._server.serve(sockets=sockets)
        if self.batches is not None:
            await self.batches.stop()

    def __enter__(self) -> RunningServer:
        self._thread.start()
        assert self._ready.wait(120)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(120)
        self.llm.close()

    def client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", max_retries=0, **{"api_key": "none", **more})

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **more)

    @property
    def engine(self) -> Any:
        return self.llm.loaded.engine

    def wait_until(self, holds: Callable[[], bool]) -> None:
        wait_until(holds)

    def wait_until_empty(self) -> None:
        """All blocks are back and nothing is open."""
        wait_until(
            lambda: (
                not self.service.num_open
                and not self.engine.has_work
                and not self.llm._commands
                and self.engine.stats.num_used_blocks == 0
            )
        )
        self.engine.scheduler.check()


def held(num_steps: int, until: Path, seconds: float = 0.0) -> str:
    """Code for a process: the engine takes `num_steps` steps, and then none before the file `until` is there. Every
    step from then on takes at least `seconds`."""
    return (
        "import itertools, os, time, fastserve.engine.runner as runner\n"
        "real, numbers = runner.ModelRunner.run, itertools.count()\n"
        "def run(self, plan):\n"
        f"    if next(numbers) >= {num_steps}:\n"
        f"        while not os.path.exists({str(until)!r}): time.sleep(0.005)\n"
        f"        time.sleep({seconds})\n"
        "    return real(self, plan)\n"
        "runner.ModelRunner.run = run"
    )


class ServerProcess:
    """A server process; `code` is Python that runs in it before it serves. Its log is read all the time: a full pipe
    would stop it."""

    def __init__(self, model_dir: Path, *flags: str, code: str = "") -> None:
        run = f"{code}\nimport sys; from fastserve.cli import main; sys.exit(main(sys.argv[1:]))"
        self.popen = subprocess.Popen(
            [sys.executable, "-c", run, "serve", str(model_dir), "--port", "0", "--num-blocks", "64", *flags],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._unread: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for("ready after").split(" on ")[-1].strip()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.lines.append(line)
            self._unread.put(line)
        self._unread.put(None)

    def wait_for(self, text: str) -> str:
        """The next line of the log that holds `text`."""
        while (line := self._unread.get(timeout=120)) is not None:
            if text in line:
                return line
        raise AssertionError("".join(self.lines))

    def end(self) -> tuple[int, str]:
        """Waits for the process to exit; its status and the whole log."""
        status = self.popen.wait(timeout=120)
        self._reader.join(60)
        return status, "".join(self.lines)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self._reader.join(60)
        if self.popen.stderr is not None:
            self.popen.stderr.close()
