# SPDX-License-Identifier: Apache-2.0
"""Errors as OpenAI clients know them: {"error": {"message", "type", "param", "code"}} and a status code."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fastserve.errors import EngineDead, FastserveError, InvalidRequest, QueueFull
from fastserve.server.protocol import describe_errors

log = logging.getLogger("fastserve.server")

RETRY_AFTER_S = 1
TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """An answer that is not a success. `code` is the machine-readable reason, by default the status."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = status if code is None else code

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status) or HTTPStatus(self.status).phrase
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = str(RETRY_AFTER_S)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of `error`. What is not meant for users is logged, not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest):
        return ApiError(400, str(error))
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, EngineDead):
        return ApiError(500, "the engine has stopped; the request is lost", code="engine_dead")
    if isinstance(error, FastserveError):
        return ApiError(500, str(error)[:500])
    log.error("unexpected error while answering a request", exc_info=error)
    return ApiError(500, "internal error; the server's log has the cause")


def install_handlers(app: FastAPI) -> None:
    """Every error of `app` is answered in this form."""

    async def any_error(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}"[:300]).response()
        message, param = describe_errors(error.errors())
        return ApiError(400, message, param=param).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail)[:300]
        if error.status_code == 404:
            message = f"there is nothing at {request.url.path[:100]}; the endpoints are listed at /openapi.json"
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (ApiError, FastserveError, Exception):
        app.add_exception_handler(kind, any_error)
