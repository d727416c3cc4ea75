# SPDX-License-Identifier: Apache-2.0
"""`fastserve serve`: from start to exit.

SIGTERM or Ctrl-C: no new request is accepted and health says so; what runs may finish, for a bounded time; exit
status 0. A second signal ends the process at once. If the engine dies, its requests fail, health says so, and the
process ends with status 1 and the cause as its last words.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from fastserve.async_llm import AsyncLLM
from fastserve.errors import FastserveError
from fastserve.server.app import make_app
from fastserve.server.batches import Batches
from fastserve.server.metrics import Metrics
from fastserve.server.options import ServeOptions
from fastserve.server.service import Service

log = logging.getLogger("fastserve.server")

MAX_HEADER_BYTES = 64 * 1024
FLUSH_S = 5  # for the last bytes of answers, once nothing is generated any more


def make_service(llm: AsyncLLM, model: str, options: ServeOptions) -> Service:
    """Call it on the event loop that will serve."""
    names = options.served_model_name or [Path(model).resolve().name]
    service: Service

    def num_open() -> int:
        return service.num_open

    metrics = Metrics(llm, names[0], num_open, options.enable_vllm_metrics)
    service = Service(llm, names, metrics, max_step_s=options.max_step_seconds, tool_format=options.tool_call_parser)
    return service


def make_batches(service: Service, options: ServeOptions) -> Batches | None:
    """Files and batches, at work already; None when they have no folder. Call it on the event loop that will serve."""
    if options.batch_dir is None:
        return None
    batches = Batches(service, Path(options.batch_dir))
    batches.start()
    return batches


class HttpServer(uvicorn.Server):
    """uvicorn, whose handling of signals is ours: it would stop listening at once, and health could not be asked."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(app: FastAPI, options: ServeOptions) -> HttpServer:
    return HttpServer(
        uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            uds=options.uds,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=options.access_log,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=FLUSH_S,
        )
    )


def serve(model: str, options: ServeOptions) -> int:
    """Serve until a signal or the engine's death; returns the exit status."""
    logging.basicConfig(
        level=options.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("uvicorn.access").setLevel(logging.INFO if options.access_log else logging.WARNING)
    begin = time.monotonic()
    llm = AsyncLLM(model, tokenizer=options.tokenizer, **options.engine_options())
    try:
        return asyncio.run(_serve(llm, model, options, begin))
    finally:
        llm.close()


async def _serve(llm: AsyncLLM, model: str, options: ServeOptions, begin: float) -> int:
    service = make_service(llm, model, options)
    batches = make_batches(service, options)
    server = http_server(make_app(service, options, batches), options)
    lifecycle = Lifecycle(service, server, options, batches)
    lifecycle.install()
    sockets = _listen(options)
    for line in llm.loaded.runner.memory_plan.table().splitlines():
        log.info("%s", line)
    where = options.uds or "http://{}:{}".format(*sockets[0].getsockname()[:2])
    log.info("model %s ready after %.1f s on %s", service.model_names[0], time.monotonic() - begin, where)
    if options.host not in ("127.0.0.1", "localhost", "::1") and not options.uds and not options.api_key:
        log.warning("listening on %s without an API key: whoever reaches this port can use the model", options.host)
    await server.serve(sockets=sockets)
    return lifecycle.status()


def _listen(options: ServeOptions) -> list[socket.socket]:
    """Listens before the server starts, so that a port in use is one clear error."""
    try:
        if options.uds:
            listener = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(FileNotFoundError):
                if Path(options.uds).is_socket():
                    os.unlink(options.uds)
            before = os.umask(0o177)  # for this user only
            try:
                listener.bind(options.uds)
            finally:
                os.umask(before)
        else:
            family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
            listener = socket.socket(family)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((options.host, options.port))
    except OSError as error:
        where = options.uds or f"{options.host} port {options.port}"
        raise FastserveError(f"cannot listen on {where}: {error.strerror}; choose another with --port") from None
    listener.listen(2048)
    listener.setblocking(False)
    return [listener]


class Lifecycle:
    """What ends the server: signals, and the engine's death."""

    def __init__(
        self, service: Service, server: HttpServer, options: ServeOptions, batches: Batches | None = None
    ) -> None:
        self._service = service
        self._batches = batches
        self._server = server
        self._options = options
        self._death: BaseException | None = None
        self._draining: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signalled, number)

        def on_death(cause: BaseException) -> None:
            self._loop.call_soon_threadsafe(self._died, cause)

        self._service.llm.on_death = on_death

    def status(self) -> int:
        """The exit status; prints the cause of the engine's death last."""
        if self._death is None:
            return 0
        traceback.print_exception(self._death, file=sys.stderr)
        print(f"fastserve: the engine died: {self._death!r}", file=sys.stderr, flush=True)
        return 1

    def _signalled(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._service.draining:
            print(f"fastserve: second signal ({name}): ending at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        timeout = self._options.shutdown_timeout
        log.info("%s: %d sequences may finish within %g s", name, self._service.num_open, timeout)
        self.drain(timeout)

    def drain(self, timeout: float) -> None:
        """Refuse new requests, let those that run finish for `timeout` seconds, then stop."""
        self._service.draining = True
        self._draining = self._loop.create_task(self._drain(timeout))

    async def _drain(self, timeout: float) -> None:
        if self._batches is not None:
            await self._batches.stop()  # the next process goes on with them
        try:
            await asyncio.wait_for(self._service.wait_until_idle(), timeout)
        except asyncio.TimeoutError:
            log.warning("%d sequences did not finish in time; they end with an error", self._service.num_open)
            await asyncio.to_thread(self._service.llm.close)
        self._server.should_exit = True

    def _died(self, cause: BaseException) -> None:
        log.error("the engine died: %r", cause)
        self._death = cause
        if not self._options.keep_alive_on_engine_death:
            self.drain(FLUSH_S)
