# SPDX-License-Identifier: Apache-2.0
"""The endpoints."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

import fastserve
from fastserve.errors import InvalidRequest
from fastserve.server.answers import ChatCompletion, Completion, whole_answer
from fastserve.server.batch_api import add_batch_endpoints
from fastserve.server.batches import Batches
from fastserve.server.errors import install_handlers
from fastserve.server.events import stream_events
from fastserve.server.jobs import Job
from fastserve.server.middleware import BoundBodies, CountRequests, NameRequests, RequireKey
from fastserve.server.options import ServeOptions
from fastserve.server.page import PAGE
from fastserve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeRequest,
)
from fastserve.server.service import AnyRequest, Service, Ticket
from fastserve.server.wire import ClientLeft, EventStream, unless_client_leaves

CLIENT_LEFT = 499  # nobody reads it; for the log


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(BaseModel):
    """The form of every error."""

    error: ErrorDetail


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    prompt: str


class Version(BaseModel):
    version: str


STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in STATUSES}
EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def make_app(service: Service, options: ServeOptions, batches: Batches | None = None) -> FastAPI:
    """The ASGI application. `service` must have been made on the event loop that runs it."""
    app = FastAPI(
        title="fastserve",
        version=fastserve.__version__,
        docs_url=None,  # its pages load scripts from other servers
        redoc_url=None,
        responses=ERRORS,
    )
    install_handlers(app)
    _add_generation(app, service, options)
    _add_tokens(app, service)
    _add_operation(app, service)
    add_batch_endpoints(app, batches)
    app.add_middleware(
        BoundBodies,
        max_bytes=options.max_body_bytes,
        max_s=options.body_timeout,
        max_file_bytes=options.max_file_bytes,
        origins=options.allowed_origins,
    )
    if options.api_key:
        app.add_middleware(RequireKey, keys=options.api_key)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=options.allowed_methods or ["*"],
            allow_headers=options.allowed_headers or ["*"],
        )
    app.add_middleware(CountRequests, metrics=service.metrics)
    if options.enable_request_id_headers:
        app.add_middleware(NameRequests)
    return app


def _add_generation(app: FastAPI, service: Service, options: ServeOptions) -> None:
    async def answered(body: AnyRequest, request: Request, num_sequences: int) -> Response:
        arrival_s = time.monotonic()
        ticket = await service.admit(body.model, num_sequences)
        streaming = False
        try:
            _apply(options, body)
            job = await unless_client_leaves(request.receive, service.job(body, arrival_s, ticket))
            if body.stream:
                streaming = True  # the response closes the ticket
                return EventStream(stream_events(service, job, ticket), options.keep_alive_comment, ticket.close)
            return await unless_client_leaves(request.receive, whole(job, ticket))
        except ClientLeft:
            return Response(status_code=CLIENT_LEFT)
        finally:
            if not streaming:
                ticket.close()

    async def whole(job: Job, ticket: Ticket) -> Response:
        outputs = {}
        async for index, output in service.run(job, ticket):
            outputs[index] = output
        model = job.request.model or service.model_names[0]
        finished = [outputs[i] for i in range(len(outputs))]
        answer = whole_answer(job.request, finished, model, service.tokenizer, service.tool_format)
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.post("/v1/completions", response_model=Completion, responses=EVENTS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete one or several prompts."""
        return await answered(body, request, len(body.prompts()) * max(body.n or 1, 1))

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=EVENTS)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await answered(body, request, max(body.n or 1, 1))


def _apply(options: ServeOptions, body: CompletionRequest | ChatCompletionRequest) -> None:
    """What the server's flags change in a request. Raises InvalidRequest."""
    if isinstance(body, ChatCompletionRequest) and body.chat_template and not options.trust_request_chat_template:
        raise InvalidRequest("chat_template is only allowed where the server has --trust-request-chat-template")
    if options.enable_force_include_usage and body.stream:
        body.stream_options = body.stream_options or StreamOptions()
        body.stream_options.include_usage = True


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", response_model=Tokens, response_model_exclude_none=True)
    async def tokenize(body: TokenizeRequest) -> Any:
        """The tokens of a text, or of messages after the chat template."""
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give either prompt or messages")
        if body.messages is not None:
            prompt = await asyncio.to_thread(service.chat_prompt, body, bool(body.add_special_tokens))
            ids = prompt.token_ids
        else:
            special = body.add_special_tokens is not False
            ids = await asyncio.to_thread(service.tokenizer.encode, body.prompt or "", special)
        strings = [service.tokenizer.id_to_token(one) or "" for one in ids] if body.return_token_strs else None
        return Tokens(count=len(ids), max_model_len=service.max_len, tokens=ids, token_strs=strings)

    @app.post("/detokenize", response_model=Text)
    async def detokenize(body: DetokenizeRequest) -> Any:
        """The text of tokens, special ones included."""
        service.check_model(body.model)
        vocab_size = service.llm.loaded.model_config.vocab_size
        for one in body.tokens:
            if not 0 <= one < vocab_size:
                raise InvalidRequest(f"tokens holds {str(one)[:40]}; this model's ids are 0 to {vocab_size - 1}")
        return Text(prompt=await asyncio.to_thread(service.tokenizer.decode, body.tokens, False))


def _add_operation(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        root = service.model_names[0]
        fields = {"id": name, "object": "model", "created": created, "owned_by": "fastserve", "root": root}
        return {**fields, "parent": None, "max_model_len": service.max_len, "permission": []}

    @app.get("/v1/models")
    async def models() -> Any:
        """The names under which this server's model can be asked for."""
        return {"object": "list", "data": [card(name) for name in service.model_names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        service.check_model(name)
        return card(name)

    async def health() -> Response:
        """200 while the engine's loop is alive and takes requests, 503 with the reason otherwise."""
        await service.check_health()
        return Response(status_code=200)

    for path in ("/health", "/ping"):
        app.add_api_route(path, health, methods=["GET"], response_class=Response)
    app.add_api_route("/ping", health, methods=["POST"], response_class=Response)

    @app.get("/version", response_model=Version)
    async def version() -> Any:
        return JSONResponse({"version": fastserve.__version__})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        policy = "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)  # there is none; browsers ask
