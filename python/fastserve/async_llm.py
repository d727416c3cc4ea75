# SPDX-License-Identifier: Apache-2.0
"""The streaming API: any number of coroutines share one engine, which runs in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

from fastserve.config import SamplingParams
from fastserve.engine.load import LoadedEngine, load_engine
from fastserve.errors import EngineDead, FastserveError, InvalidRequest
from fastserve.outputs import RequestOutput
from fastserve.request import SharedPrefix
from fastserve.tokenizer import Tokenizer


class AsyncLLM:
    """A model and an engine that serves concurrent requests.

    Arguments and options are those of `LLM`. The engine thread sleeps while there is nothing to do. Use as an
    (async) context manager or call `close()`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        if trust_remote_code:
            raise FastserveError("trust_remote_code is not supported: no code from a model folder ever runs")
        self._loaded: LoadedEngine = load_engine(
            model, tokenizer, skip_tokenizer_init=skip_tokenizer_init, options=options
        )
        self._ids = itertools.count()
        self._streams: dict[str, _Stream] = {}  # only the engine thread changes it
        self._commands: deque[Callable[[], None]] = deque()  # for the engine thread, between two steps
        self._wake = threading.Condition()
        self._closing = False
        self._death: BaseException | None = None
        self._beat = time.monotonic()  # when the engine thread last began a step, or was woken for one
        self._asleep = False
        self.on_death: Callable[[BaseException], None] | None = None  # called by the engine thread, once
        self._thread = threading.Thread(target=self._run, name="fastserve-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        index: int | str | None = None,
        shared_prefix: SharedPrefix | None = None,
        on_queued: Callable[[], None] | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Stream the outputs of one prompt (forms as in `LLM.generate`).

        With output_kind DELTA each output carries only what is new, with CUMULATIVE everything so far, with
        FINAL_ONLY there is one. Text never ends in half a character and never holds a stop string or what follows
        it. Leaving the loop early, or cancelling the task, aborts the request and frees its blocks. `index` and
        `shared_prefix` are those of a batch that was planned (`Engine.add_request`); `end_batch` must follow. Raises
        InvalidRequest (which gives up the place in the batch), QueueFull or EngineDead. `on_queued` is called, in the
        engine's thread, when the request has joined the engine's queue.
        """
        params = sampling_params or self._loaded.default_sampling_params()
        try:
            # Tokenising a long text or compiling a grammar takes a while and needs no lock: not on the event loop.
            ready = await asyncio.to_thread(self._loaded.prompt, prompt)
            if params.structured_outputs is not None:
                await asyncio.to_thread(self._loaded.check_structure, params)
        except InvalidRequest:
            if (prefix := shared_prefix) is not None:
                self._command(lambda: self._loaded.engine.scheduler.give_up_prefix(prefix, params.n))
            raise
        stream = _Stream(request_id or f"async-{next(self._ids)}", asyncio.get_running_loop())

        def add() -> None:
            try:
                self._loaded.engine.add_request(
                    stream.request_id, ready.token_ids, params,
                    prompt=ready.text, priority=priority, cache_salt=cache_salt, index=index,
                    shared_prefix=shared_prefix,
                )  # fmt: skip
                self._streams[stream.request_id] = stream
                if on_queued is not None:
                    on_queued()
            except Exception as error:
                stream.deliver(error)

        self._command(add)
        finished = False
        try:
            while not finished:
                item = await stream.queue.get()
                if isinstance(item, BaseException):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            if not finished and not self._closing and self._death is None:
                self._command(lambda: self._abort(stream))

    async def abort(self, request_id: str) -> None:
        """End a request: its stream gets a last output with finish_reason "abort". Unknown ids are ignored."""
        self._command(lambda: self._abort(self._streams.get(request_id)))

    def end_batch(self, prefixes: Iterable[SharedPrefix]) -> None:
        """The batch of these prefixes is over, however it ended: its prefixes are no longer held."""
        dropped = list(prefixes)
        self._command(lambda: self._loaded.engine.end_batch(dropped))

    async def check_health(self, max_step_s: float = float("inf")) -> None:
        """Raises EngineDead, with the cause, when the engine thread has stopped, or works on one step for longer
        than `max_step_s`."""
        self._check_alive()
        age = time.monotonic() - self._beat
        if age > max_step_s and (self._commands or self._loaded.engine.has_work):
            raise EngineDead(f"the engine has been in one step for {age:.0f} s")

    @property
    def loaded(self) -> LoadedEngine:
        """The engine and its parts. Another thread runs the engine: read, do not change."""
        return self._loaded

    def get_tokenizer(self) -> Tokenizer:
        if self._loaded.tokenizer is None:
            raise FastserveError("this AsyncLLM has no tokenizer (skip_tokenizer_init=True)")
        return self._loaded.tokenizer

    def close(self) -> None:
        """Stop the engine thread and free the model and the cache; running requests end with EngineDead."""
        with self._wake:
            if self._closing:
                return
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._loaded.close()

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    # -- inside -------------------------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDead(f"the engine has stopped: {self._death!r}") from self._death
        if self._closing:
            raise EngineDead("the engine is closed")

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._check_alive()
            self._commands.append(command)
            if self._asleep:
                self._asleep, self._beat = False, time.monotonic()
            self._wake.notify()

    def _abort(self, stream: _Stream | None) -> None:
        if stream is not None and self._streams.get(stream.request_id) is stream:
            self._loaded.engine.abort(stream.request_id)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._beat = time.monotonic()
                while self._commands:
                    self._commands.popleft()()
                self._deliver(self._loaded.engine.step())
            cause: BaseException = EngineDead("the engine was closed while the request ran")
        except BaseException as error:  # the thread's end must reach every stream, whatever ended it
            cause = error
        with self._wake:  # no command is accepted from here on
            self._death = cause
        while self._commands:
            self._commands.popleft()()  # an add puts its stream among those that are told below
        for stream in self._streams.values():
            stream.deliver(EngineDead(f"the engine has stopped: {cause!r}"))
        if self.on_death is not None and not self._closing:
            self.on_death(cause)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when the engine is to stop."""
        engine = self._loaded.engine
        with self._wake:
            while not (self._commands or engine.has_work or self._closing):
                self._asleep = True
                self._wake.wait()
            self._asleep = False
            return not self._closing

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """One call for all streams of a loop: each call wakes the loop, which then keeps the interpreter for as long as
        it works on what has come, while the next step waits."""
        items: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Any], RequestOutput]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finished:
                del self._streams[output.request_id]
            items.setdefault(stream.loop, []).append((stream.queue, output))
        for loop, ready in items.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_put, ready)


def _put(items: list[tuple[asyncio.Queue[Any], RequestOutput]]) -> None:
    for queue, item in items:
        queue.put_nowait(item)


class _Stream:
    """The way from the engine thread to the coroutine that waits for a request's outputs."""

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.loop = loop
        self.queue: asyncio.Queue[Any] = asyncio.Queue()

    def deliver(self, item: RequestOutput | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
