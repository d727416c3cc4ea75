# SPDX-License-Identifier: Apache-2.0
"""What stands between the network and the endpoints: API keys, bounds on bodies and on the time they take, counters,
and names of requests."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.server.errors import ApiError
from fastserve.server.metrics import Metrics

OPEN_PATHS = frozenset(("/health", "/ping", "/", "/favicon.ico"))
UPLOAD_PATH = "/v1/files"


def path_of(scope: Scope) -> str:
    """The path without the one under which a proxy shows this server (--root-path)."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if path.startswith(root) else path


class RequireKey:
    """Refuses every path but OPEN_PATHS to clients without one of the keys.

    Digests are compared, in constant time and with all keys, so the time tells neither length nor beginning of one.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode("utf-8")).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in OPEN_PATHS or self._allows(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "no valid API key; send one of the server's keys as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
        )
        await error.response()(scope, receive, send)

    def _allows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1")).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


class BoundBodies:
    """Reads a request's body before anything else sees it: at most `max_bytes`, within `max_s` seconds, and JSON.

    A file that is uploaded goes through piece by piece: at most `max_file_bytes`, with at most `max_s` seconds between
    two pieces, and not from a page of another origin than `origins`.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, max_s: float, max_file_bytes: int, origins: Sequence[str] = ()
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_s = max_s
        self._max_file_bytes = max_file_bytes
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        if (scope["method"], path_of(scope)) == ("POST", UPLOAD_PATH):
            await self._upload(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(Headers(scope=scope), receive), self._max_s)
        except (ApiError, asyncio.TimeoutError) as error:
            if not isinstance(error, ApiError):
                error = ApiError(408, f"the body did not arrive within {self._max_s:g} s")
            response = error.response()
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        if body is None:
            return  # the client left
        message: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal message
            first, message = message, None
            return first if first is not None else await receive()

        await self._app(scope, replay, send)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin and origin.partition("://")[2] != headers.get("host") and origin not in self._origins:
            # Any page can make a browser post a form.
            await ApiError(403, "files are not taken from pages of other origins").response()(scope, receive, send)
            return
        size = 0

        async def bounded() -> Message:
            nonlocal size
            try:
                message = await asyncio.wait_for(receive(), self._max_s)
            except asyncio.TimeoutError:
                raise ApiError(408, f"no part of the file arrived for {self._max_s:g} s") from None
            size += len(message.get("body", b""))
            if size > self._max_file_bytes:
                raise self._too_large(self._max_file_bytes)
            return message

        await self._app(scope, bounded, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large(self._max_bytes)
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self._max_bytes:
                raise self._too_large(self._max_bytes)
            if not message.get("more_body", False):
                break
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if size and kind != "application/json" and not kind.endswith("+json"):
            # A page of another origin can post text to this machine, but JSON only if this server allowed it.
            raise ApiError(415, f"the body's Content-Type is {kind[:100]!r}; it must be application/json")
        return b"".join(pieces)

    @staticmethod
    def _too_large(max_bytes: int) -> ApiError:
        return ApiError(413, f"the body is larger than {max_bytes} bytes, the most that is allowed")


class CountRequests:
    """Counts requests and their seconds by endpoint. What is only there to watch the server is not counted."""

    UNCOUNTED = frozenset(("/health", "/ping", "/version", "/metrics", "/favicon.ico"))

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in self.UNCOUNTED:
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            # The path as it is declared: a path that clients make up must not become a label.
            handler = getattr(scope.get("route"), "path", "none")
            self._metrics.http_request(handler, scope["method"], status, time.monotonic() - begin)


class NameRequests:
    """Gives every answer a header X-Request-Id: the one of the request, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if re.fullmatch("[A-Za-z0-9_.:-]{1,128}", given) else uuid.uuid4().hex

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        await self._app(scope, receive, named)
