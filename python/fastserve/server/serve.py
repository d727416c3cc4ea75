# SPDX-License-Identifier: Apache-2.0
"""`fastserve serve`: from start to exit.

SIGTERM or Ctrl-C: no new request is accepted and health says so; what runs may finish, for a bounded time; exit
status 0. A second signal ends the process at once. If the engine dies, its requests fail, health says so, and the
process ends with status 1 and the cause as its last words.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from fastserve.async_llm import AsyncLLM
from fastserve.chat_template import MAX_TEMPLATE_CHARS
from fastserve.errors import FastserveError, InvalidRequest
from fastserve.json_file import Fields, read_bytes, read_json_object
from fastserve.model_config import GENERATION_FILE, GenerationDefaults
from fastserve.server.app import make_app
from fastserve.server.batches import Batches
from fastserve.server.metrics import Metrics
from fastserve.server.options import ServeOptions
from fastserve.server.service import Service
from fastserve.server.stats_log import StatsLog

log = logging.getLogger("fastserve.server")

# Longer than clients (5 s in httpx) and proxies (60 s) keep a connection that is not in use: whoever lets go first must
# not be the one that the next request is sent to.
KEEP_ALIVE_S = 75
FLUSH_S = 5  # for the last bytes of answers, once nothing is generated any more


def make_service(llm: AsyncLLM, model: str, options: ServeOptions) -> Service:
    """Call it on the event loop that will serve."""
    names = options.served_model_name or [Path(model).resolve().name]
    service: Service

    def num_open() -> int:
        return service.num_open

    _set_up_prompts(llm, options)
    metrics = Metrics(llm, names[0], num_open, options.enable_vllm_metrics, options.custom_histogram_buckets)
    service = Service(
        llm,
        names,
        metrics,
        max_step_s=options.max_step_seconds,
        tool_format=options.tool_call_parser,
        auto_tools=options.enable_auto_tool_choice,
        max_num_queued_tokens=options.max_num_queued_tokens,
        log_requests=options.enable_log_requests,
        max_log_len=options.max_log_len,
    )
    return service


def _set_up_prompts(llm: AsyncLLM, options: ServeOptions) -> None:
    """The chat template and the sampling defaults that the flags name. Raises FastserveError."""
    loaded = llm.loaded
    if options.chat_template is not None:
        text, path = options.chat_template, Path(options.chat_template)
        if "{" not in text:  # no Jinja text at all
            text = read_bytes(path, MAX_TEMPLATE_CHARS).decode("utf-8", "replace")
        llm.get_tokenizer().chat_templates["default"] = text
    loaded.content_parts = options.chat_template_content_format == "openai"
    defaults = loaded.model_config.generation
    if options.generation_config == "vllm":
        defaults = GenerationDefaults()
    elif options.generation_config != "auto":
        defaults = _generation(read_json_object(Path(options.generation_config) / GENERATION_FILE))
    if options.override_generation_config:
        if unknown := sorted(set(options.override_generation_config) - {one.name for one in fields(defaults)}):
            known = ", ".join(one.name for one in fields(defaults))
            raise FastserveError(f"--override-generation-config: {unknown[0]!r:.80} is not known; known are {known}")
        given = {name: value for name, value in asdict(defaults).items() if value is not None}
        defaults = _generation({**given, **options.override_generation_config})
    loaded.model_config = replace(loaded.model_config, generation=defaults)
    try:
        loaded.default_sampling_params()
    except InvalidRequest as error:
        raise FastserveError(f"the sampling defaults: {error}") from None


def _generation(given: dict[str, Any]) -> GenerationDefaults:
    return GenerationDefaults.from_fields(Fields(GENERATION_FILE, given))


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
            root_path=options.root_path,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=options.access_log,
            server_header=False,
            h11_max_incomplete_event_size=options.h11_max_incomplete_event_size,
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile_password=options.ssl_keyfile_password,
            ssl_ca_certs=options.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_REQUIRED if options.ssl_ca_certs else ssl.CERT_NONE,
            timeout_graceful_shutdown=FLUSH_S,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
    )


def serve(model: str, options: ServeOptions) -> int:
    """Serve until a signal or the engine's death; returns the exit status."""
    logging.basicConfig(
        level=options.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    unlogged = frozenset(options.disable_access_log_for_endpoints)
    # uvicorn logs (client, method, path with its query, version, status).
    logging.getLogger("uvicorn.access").addFilter(lambda record: _path(record.args) not in unlogged)
    _check_certificates(options)
    begin = time.monotonic()
    llm = AsyncLLM(model, tokenizer=options.tokenizer, **options.engine_options())
    try:
        return asyncio.run(_serve(llm, model, options, begin))
    finally:
        llm.close()


def _path(arguments: Any) -> str:
    return str(arguments[2]).partition("?")[0] if isinstance(arguments, tuple) and len(arguments) == 5 else ""


def _check_certificates(options: ServeOptions) -> None:
    """Raises FastserveError before the model is loaded."""
    if (options.ssl_keyfile or options.ssl_ca_certs) and not options.ssl_certfile:
        raise FastserveError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(options, name)
        if path is not None and not Path(path).is_file():
            raise FastserveError(f"--{name.replace('_', '-')} {path}: no such file")


async def _serve(llm: AsyncLLM, model: str, options: ServeOptions, begin: float) -> int:
    service = make_service(llm, model, options)
    batches = make_batches(service, options)
    server = http_server(make_app(service, options, batches), options)
    if options.access_log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)  # uvicorn has just set it
    lifecycle = Lifecycle(service, server, options, batches)
    lifecycle.install()
    sockets = _listen(options)
    for line in llm.loaded.runner.memory_plan.table().splitlines():
        log.info("%s", line)
    scheme = "https" if options.ssl_certfile else "http"
    where = options.uds or "{}://{}:{}".format(scheme, *sockets[0].getsockname()[:2])
    log.info("model %s ready after %.1f s on %s", service.model_names[0], time.monotonic() - begin, where)
    if options.host not in ("127.0.0.1", "localhost", "::1") and not options.uds and not options.api_key:
        log.warning("listening on %s without an API key: whoever reaches this port can use the model", options.host)
    stats_log = (
        None if options.disable_log_stats else asyncio.create_task(StatsLog(service).run(options.log_stats_interval))
    )
    gc.freeze()  # what is loaded stays: a full collection would look through it for 50 ms, with every request waiting
    await server.serve(sockets=sockets)
    if stats_log is not None:
        stats_log.cancel()
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
