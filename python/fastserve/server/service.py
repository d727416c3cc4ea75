# SPDX-License-Identifier: Apache-2.0
"""The engine as the endpoints see it: admission, prompts made of bodies, and generation that is accounted for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from fastserve.async_llm import AsyncLLM
from fastserve.config import SamplingParams
from fastserve.errors import EngineDead, FastserveError, InvalidRequest, QueueFull
from fastserve.inputs import Prompt
from fastserve.outputs import RequestOutput
from fastserve.server.errors import ApiError
from fastserve.server.jobs import Job, chat_prompt, make_job
from fastserve.server.metrics import Metrics
from fastserve.server.protocol import ChatCompletionRequest, CompletionRequest, TokenizeRequest
from fastserve.server.tool_calls import format_of_template
from fastserve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastserve.batch_job import BatchPrompt

log = logging.getLogger("fastserve.server")

AnyRequest = CompletionRequest | ChatCompletionRequest
MAX_COMPILE_S = 10.0


class Service:
    """Runs requests of clients on an AsyncLLM. All methods are for the event loop's thread."""

    def __init__(
        self,
        llm: AsyncLLM,
        model_names: list[str],
        metrics: Metrics,
        *,
        max_step_s: float = float("inf"),
        tool_format: str | None = None,
        auto_tools: bool = True,
        max_num_queued_tokens: int | None = None,
        log_requests: bool = False,
        max_log_len: int = 200,
    ) -> None:
        self.llm = llm
        # How this model writes calls of tools; None = not known, or the model may not decide to call one.
        self.tool_format = (tool_format or format_of_template(self.tokenizer.chat_template)) if auto_tools else None
        self.model_names = model_names
        self.metrics = metrics
        self.draining = False
        self.num_open = 0  # sequences that were admitted and have not ended
        self.num_coming_tokens = 0  # of prompts that are admitted and not in the engine's queue yet
        self._max_step_s = max_step_s
        self._max_num_queued_tokens = max_num_queued_tokens
        self._log_requests = log_requests
        self._max_log_len = max_log_len
        self._ids = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def tokenizer(self) -> Tokenizer:
        return self.llm.get_tokenizer()

    @property
    def max_len(self) -> int:
        """The longest context in tokens, prompt and answer together."""
        return self.llm.loaded.engine.scheduler.max_len

    async def check_health(self) -> None:
        """Raises ApiError 503 when this server should get no more requests, with the reason."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        try:
            await self.llm.check_health(self._max_step_s)
        except EngineDead as error:
            raise ApiError(503, str(error)[:500], code="engine_dead") from None

    async def wait_until_idle(self) -> None:
        await self._idle.wait()

    # -- admission --------------------------------------------------------------------------------------------------

    async def admit(self, model: str | None, num_sequences: int) -> Ticket:
        """Refuses what cannot be served now, before any work is done for it; else the ticket must be closed."""
        self.check_model(model)
        await self.check_health()
        limit = self.llm.loaded.config.max_num_queued_requests
        if num_sequences > limit:
            raise ApiError(400, f"{num_sequences} sequences (prompts times n) in one request; at most {limit} can wait")
        num_waiting = self.num_open - self.llm.loaded.engine.num_running
        if num_waiting + num_sequences > limit:
            self.metrics.refused.inc()
            raise QueueFull(f"{num_waiting} requests are waiting, at most {limit} may; try again later")
        self._check_tokens(1)
        return Ticket(self, num_sequences)

    def _check_tokens(self, num_tokens: int) -> None:
        """Raises QueueFull when so many more may not wait."""
        limit = self._max_num_queued_tokens
        if limit is None:
            return
        if num_tokens > limit:
            raise ApiError(400, f"{num_tokens} tokens (prompts times n) in one request; at most {limit} can wait")
        waiting = self.llm.loaded.engine.scheduler.num_waiting_tokens + self.num_coming_tokens
        if waiting + num_tokens > limit:
            self.metrics.refused.inc()
            raise QueueFull(f"{waiting} tokens of prompts are waiting, at most {limit} may; try again later")

    def _open(self, num_sequences: int) -> None:
        self.num_open += num_sequences
        self._idle.clear()

    def _release(self, num_sequences: int) -> None:
        self.num_open -= num_sequences
        if self.num_open == 0:
            self._idle.set()

    def check_model(self, model: str | None) -> None:
        if model is not None and model not in self.model_names:
            raise ApiError(
                404,
                f"the model {model[:200]!r} does not exist here; this server has {', '.join(self.model_names)}",
                param="model",
                code="model_not_found",
            )

    # -- prompts ----------------------------------------------------------------------------------------------------

    async def job(self, request: AnyRequest, arrival_s: float, ticket: Ticket) -> Job:
        """Raises InvalidRequest, ApiError, and QueueFull when too many tokens wait."""
        job = await asyncio.to_thread(make_job, self.llm.loaded, request, arrival_s, self.tool_format)
        await self._compile(job.params)
        ticket.hold_tokens(sum(len(prompt.token_ids) for prompt in job.prompts) * job.params.n)
        return job

    async def _compile(self, params: SamplingParams) -> None:
        """Compiles what the output must match, off the event loop and for a bounded time."""
        if params.structured_outputs is None:
            return
        compiling = asyncio.to_thread(self.llm.loaded.check_structure, params)
        try:
            await asyncio.wait_for(compiling, MAX_COMPILE_S)
        except asyncio.TimeoutError:
            raise InvalidRequest(f"the structure took longer than {MAX_COMPILE_S:g} s to compile") from None

    def chat_prompt(self, request: ChatCompletionRequest | TokenizeRequest, add_special_tokens: bool) -> Prompt:
        """Renders and tokenises a conversation; takes a while, so not on the event loop."""
        return chat_prompt(self.llm.loaded, request, add_special_tokens)

    # -- generation -------------------------------------------------------------------------------------------------

    async def run(self, job: Job, ticket: Ticket) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """The outputs of all prompts of a job, with the prompt's index, as they come.

        Raises FastserveError for a sequence that failed; the other prompts of the job are then aborted.
        """
        if len(job.prompts) == 1:
            async with contextlib.aclosing(self._run_one(job, job.prompts[0], ticket)) as outputs:
                async for output in outputs:
                    yield 0, output
            return
        queue: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue()

        async def pump(index: int, prompt: Prompt) -> None:
            try:
                async with contextlib.aclosing(self._run_one(job, prompt, ticket)) as outputs:
                    async for output in outputs:
                        queue.put_nowait((index, output))
                queue.put_nowait((index, None))
            except Exception as error:
                queue.put_nowait((index, error))

        pumps = [asyncio.ensure_future(pump(i, prompt)) for i, prompt in enumerate(job.prompts)]
        num_left = len(pumps)
        try:
            while num_left:
                index, item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    num_left -= 1
                else:
                    yield index, item
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _run_one(self, job: Job, prompt: Prompt, ticket: Ticket) -> AsyncGenerator[RequestOutput, None]:
        request = job.request
        kind = "chat" if isinstance(request, ChatCompletionRequest) else "cmpl"
        account = _Account(f"{kind}-{next(self._ids)}", job.params, job.arrival_s)
        how: dict[str, Any] = {"priority": request.priority, "cache_salt": request.cache_salt or ""}
        if self._max_num_queued_tokens is not None:
            loop, num_tokens = asyncio.get_running_loop(), len(prompt.token_ids) * job.params.n
            how["on_queued"] = lambda: loop.call_soon_threadsafe(ticket.release_tokens, num_tokens)
        if self._log_requests:
            shown = self.tokenizer.decode(prompt.token_ids, False)[: self._max_log_len]
            log.info("request %s prompt=%r %s", account.request_id, shown, job.params)
        async with contextlib.aclosing(self._accounted(account, prompt.token_ids, job.params, how)) as outputs:
            async for output in outputs:
                if output.error is not None:
                    raise FastserveError(f"the request failed: {str(output.error)[:300]}") from output.error
                yield output

    async def generate_for_batch(self, prompt: BatchPrompt) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of a prompt of a batch; an error of its own is told in the output. Raises QueueFull,
        InvalidRequest, EngineDead."""
        account = _Account(f"batch-{next(self._ids)}", prompt.params, time.monotonic())
        how = {
            "priority": prompt.priority,
            "cache_salt": prompt.cache_salt,
            "index": prompt.index,
            "shared_prefix": prompt.shared_prefix,
        }
        self._open(prompt.params.n)
        try:
            outputs = self._accounted(account, list(prompt.token_ids), prompt.params, how)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield output
        finally:
            self._release(prompt.params.n)

    async def _accounted(
        self, account: _Account, token_ids: list[int], params: SamplingParams, how: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        stream = self.llm.generate({"prompt_token_ids": token_ids}, params, account.request_id, **how)
        try:
            async with contextlib.aclosing(stream):  # type: ignore[type-var]
                async for output in stream:
                    account.take(output, self.metrics)
                    yield output
        except (asyncio.CancelledError, GeneratorExit):
            account.reason = "abort"
            raise
        except BaseException as error:
            account.error = error
            raise
        finally:
            if not isinstance(account.error, QueueFull):  # such a request never began
                account.close(len(token_ids), self.metrics)


class Ticket:
    """What an admitted request takes up in the queue, from its admission to its end."""

    def __init__(self, service: Service, num_sequences: int) -> None:
        self._service = service
        self._num_sequences = num_sequences
        self._num_tokens = 0
        service._open(num_sequences)

    def hold_tokens(self, num_tokens: int) -> None:
        """Counts the tokens of its prompts until the engine does. Raises QueueFull."""
        self._service._check_tokens(num_tokens)
        self._num_tokens = num_tokens
        self._service.num_coming_tokens += num_tokens

    def release_tokens(self, num_tokens: int) -> None:
        released = min(num_tokens, self._num_tokens)
        self._num_tokens -= released
        self._service.num_coming_tokens -= released

    def close(self) -> None:
        self.release_tokens(self._num_tokens)
        self._service._release(self._num_sequences)


class _Account:
    """What the log and the metrics say about one prompt's generation. All times are of one monotonic clock."""

    def __init__(self, request_id: str, params: SamplingParams, arrival_s: float) -> None:
        self.request_id = request_id
        self.reason: str | None = None
        self.error: BaseException | None = None
        self._params = params
        self._arrival_s = arrival_s
        self._num_outputs: dict[int, int] = {}  # tokens by completion
        self._last_s: float | None = None
        self._first_s: float | None = None
        self._output: RequestOutput | None = None

    def take(self, output: RequestOutput, metrics: Metrics) -> None:
        now = time.monotonic()
        self._output = output
        self.error = output.error
        num_new = 0
        for completion in output.outputs:
            count = self._num_outputs.get(completion.index, 0) + len(completion.token_ids)
            self._num_outputs[completion.index] = count
            num_new += len(completion.token_ids)
        if num_new:
            if self._first_s is None:
                first_s = None if output.metrics is None else output.metrics.first_token_s
                self._first_s = now if first_s is None else first_s
                metrics.time_to_first_token.observe(max(0.0, self._first_s - self._arrival_s))
            elif self._last_s is not None:
                metrics.inter_token_latency.observe(now - self._last_s)
            self._last_s = now
        for completion in output.outputs:
            if completion.finish_reason is not None:
                self.reason = completion.finish_reason

    def close(self, num_prompt: int, metrics: Metrics) -> None:
        now, reason = time.monotonic(), "abort" if self.reason is None else self.reason
        if self.error is not None:
            reason = "error"
        total_s = now - self._arrival_s
        ttft = "-" if self._first_s is None else f"{self._first_s - self._arrival_s:.3f}s"
        cached = 0 if self._output is None else self._output.num_cached_tokens or 0
        level = logging.WARNING if reason == "error" else logging.INFO
        cause = "" if self.error is None else f" error={str(self.error)[:200]!r}"
        log.log(
            level,
            "request %s finished reason=%s prompt=%d cached=%d output=%d ttft=%s time=%.3fs%s",
            self.request_id, reason, num_prompt, cached, sum(self._num_outputs.values()), ttft, total_s, cause,
        )  # fmt: skip
        times = None if self._output is None else self._output.metrics
        metrics.request_finished(
            reason,
            self._params,
            num_prompt,
            cached,
            list(self._num_outputs.values()),
            total_s,
            self._first_s,
            times,
            now,
        )
