# SPDX-License-Identifier: Apache-2.0
"""One streamed request to a server with OpenAI's API, and when its pieces came. Times are of one monotonic clock."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class Target:
    """Where requests go and what all of them carry. `backend` is a key of ENDPOINTS."""

    url: str
    backend: str
    model: str
    headers: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)

    def body(self, prompt: str, num_output: int) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self.backend == "openai-chat":
            asked |= {"messages": [{"role": "user", "content": prompt}], "max_completion_tokens": num_output}
        else:
            asked |= {"prompt": prompt, "max_tokens": num_output}
        return {**asked, **self.fields}


@dataclass
class Outcome:
    """What became of one request. Times in seconds; ttft, itls and latency count from the moment of sending."""

    start: float = 0.0
    queue_time: float = 0.0  # from the planned arrival to sending: waiting for a place under --max-concurrency
    ttft: float | None = None  # to the first text; None if none came
    itls: list[float] = field(default_factory=list)  # gaps between pieces of text
    latency: float = 0.0
    num_input: int = 0  # as the server counts; else as the workload asked
    num_output: int = 0  # as the server counts; else the number of pieces
    text: str = ""
    error: str = ""  # empty: it succeeded

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; None for answers of one token or none."""
        if self.ttft is None or self.num_output < 2:
            return None
        return (self.latency - self.ttft) / (self.num_output - 1)


def open_client(timeout_s: float | None = None) -> httpx.AsyncClient:
    """A client that holds as many connections as are wanted and looks at no proxy settings."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=1024)
    return httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(timeout_s), trust_env=False)


async def events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each server-sent event; comments are passed over."""
    held = ""
    async for piece in response.aiter_text():
        held += piece
        while (end := held.find("\n\n")) >= 0:
            event, held = held[:end], held[end + 2 :]
            if event.startswith("data:"):
                yield event[5:].strip()


def piece_of(event: dict[str, Any]) -> str:
    """The new text of a chunk, whichever endpoint it comes from. Calls of tools count by their arguments."""
    text = ""
    for choice in event.get("choices") or ():
        delta = choice.get("delta")
        if delta is None:
            text += choice.get("text") or ""
            continue
        text += delta.get("content") or ""
        for call in delta.get("tool_calls") or ():
            text += (call.get("function") or {}).get("arguments") or ""
    return text


async def send(client: httpx.AsyncClient, target: Target, prompt: str, num_input: int, num_output: int) -> Outcome:
    """Sends one request and reads its answer to the end. What goes wrong is told in the outcome, never raised."""
    outcome = Outcome(num_input=num_input)
    num_pieces, is_done, usage = 0, False, None
    outcome.start = last = time.perf_counter()
    try:
        body = target.body(prompt, num_output)
        async with client.stream("POST", target.url, json=body, headers=target.headers) as response:
            if response.status_code != 200:
                text = (await response.aread())[:300].decode("utf-8", "replace")
                outcome.error = f"HTTP {response.status_code}: {text}"
                return outcome
            async for data in events(response):
                now = time.perf_counter()
                if data == "[DONE]":
                    is_done = True
                    break
                event = json.loads(data)
                if event.get("error"):
                    outcome.error = f"error in the stream: {json.dumps(event['error'])[:300]}"
                    return outcome
                usage = event.get("usage") or usage
                if not (text := piece_of(event)):
                    continue
                num_pieces += 1
                if outcome.ttft is None:
                    outcome.ttft = now - outcome.start
                else:
                    outcome.itls.append(now - last)
                last = now
                outcome.text += text
        if not is_done:
            outcome.error = "the stream ended without [DONE]"
        elif outcome.ttft is None and not (usage and usage.get("completion_tokens")):
            outcome.error = "the answer holds no token"
    except (httpx.HTTPError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"[:300]
    finally:
        outcome.latency = last - outcome.start
        outcome.num_output = num_pieces
        if usage:
            outcome.num_output = usage.get("completion_tokens", num_pieces)
            outcome.num_input = usage.get("prompt_tokens", num_input)
    return outcome
