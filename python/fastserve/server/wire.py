# SPDX-License-Identifier: Apache-2.0
"""Answers on the wire: server-sent events, comments that keep an idle stream open, and noticing that a client left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

T = TypeVar("T")


class ClientLeft(Exception):
    """The client closed the connection before its answer was complete."""


def event(body: BaseModel) -> bytes:
    """One server-sent event. JSON has no raw line breaks, so it is one line."""
    return b"data: " + body.model_dump_json().encode("utf-8") + b"\n\n"


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client leaves first, `work` is cancelled and ClientLeft raised."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        await _cancelled(task, leaving)


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs, and wait until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """A stream of events. Whatever ends it (the last event, an error, the client) closes `events` and calls
    `when_over`.

    A comment is sent whenever nothing else was for `keep_alive_s`: proxies cut connections that are silent during
    a long prefill.
    """

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(self, events: AsyncGenerator[bytes, None], keep_alive_s: float, when_over: Callable[[], None]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._when_over = when_over
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._num_sent = 0

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        self.body = b""
        super().init_headers(headers)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._ended():
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            keeping = asyncio.ensure_future(self._keep_alive(send))
            try:
                with contextlib.suppress(ClientLeft):
                    await unless_client_leaves(receive, self._write(send))
            finally:
                await _cancelled(keeping)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    @contextlib.asynccontextmanager
    async def _ended(self) -> AsyncIterator[None]:
        try:
            async with contextlib.aclosing(self._events):
                yield
        finally:
            self._when_over()

    async def _write(self, send: Send) -> None:
        async for data in self._events:
            self._num_sent += 1
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            before = self._num_sent
            await asyncio.sleep(self._keep_alive_s)
            if self._num_sent == before:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
