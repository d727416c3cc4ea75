# SPDX-License-Identifier: Apache-2.0
"""The engine's outputs as the events of a stream, in OpenAI's framing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace

from fastserve.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from fastserve.server.answers import Answer, ChatChunkChoice, ChatDelta, CompletionChoice, Usage, echoed, usage_of
from fastserve.server.errors import as_api_error
from fastserve.server.jobs import Job
from fastserve.server.protocol import ChatCompletionRequest, CompletionRequest
from fastserve.server.service import Service, Ticket
from fastserve.server.tool_calls import ToolCallParser
from fastserve.server.wire import DONE, event


async def stream_events(service: Service, job: Job, ticket: Ticket) -> AsyncGenerator[bytes, None]:
    """All events of a job, an error among them, and [DONE]. Closing it aborts the job."""
    answer = Answer(job.request, job.request.model or service.model_names[0], service.tokenizer, service.tool_format)
    writer = _ChatWriter(answer) if isinstance(job.request, ChatCompletionRequest) else _CompletionWriter(answer)
    count = _UsageCount()
    try:
        async with contextlib.aclosing(service.run(job, ticket)) as outputs:
            async for index, output in outputs:
                count.take(index, output)
                always = count.usage(job.request) if job.request.wants_usage_always else None
                for data in writer.write(index, output, always):
                    yield data
        if job.request.wants_usage:
            yield writer.last(count.usage(job.request))
    except Exception as error:
        yield _error_event(error)
    yield DONE


def _error_event(error: Exception) -> bytes:
    import json

    return b"data: " + json.dumps(as_api_error(error).body()).encode("ascii") + b"\n\n"


class _UsageCount:
    """Tokens of a stream so far."""

    def __init__(self) -> None:
        self._last: dict[int, RequestOutput] = {}
        self._num_output_tokens = 0

    def take(self, index: int, output: RequestOutput) -> None:
        self._last[index] = output
        self._num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)

    def usage(self, request: CompletionRequest | ChatCompletionRequest) -> Usage:
        scores_only = isinstance(request, CompletionRequest) and request.scores_only
        return usage_of(self._last.values(), self._num_output_tokens, scores_only=scores_only)


class _CompletionWriter:
    """Outputs with new text to chunks of a text completion, one choice in each."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._begun: set[tuple[int, int]] = set()  # (prompt, completion) whose first chunk was made
        self._prompt_logprobs: dict[int, list[PositionLogprobs | None]] = {}  # told once, needed for each of n

    def write(self, index: int, output: RequestOutput, usage: Usage | None) -> Iterator[bytes]:
        request = self._answer.request
        assert isinstance(request, CompletionRequest)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[index] = output.prompt_logprobs
        for completion in output.outputs:
            prompt = None
            is_first = (index, completion.index) not in self._begun
            self._begun.add((index, completion.index))
            known = self._prompt_logprobs.get(index) if is_first else None
            one = replace(output, outputs=[completion], prompt_logprobs=known)
            if is_first and request.echo:
                prompt = echoed(request, one, self._answer.tokenizer)
            for choice in self._answer.completion_choices(index, one, prompt):
                if not is_first:
                    choice.prompt_token_ids = None
                if _says_something(choice, usage):
                    yield event(self._answer.completion([choice], usage))

    def last(self, usage: Usage) -> bytes:
        return event(self._answer.completion([], usage))


def _says_something(choice: CompletionChoice, usage: Usage | None) -> bool:
    """An output with half a character, or with what may become a stop string, has no text yet."""
    return bool(choice.text or choice.finish_reason or choice.logprobs or choice.token_ids or usage)


class _ChatWriter:
    """Outputs with new text to chunks of a chat completion, one choice in each."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._parsers: dict[int, ToolCallParser | None] = {}  # of the choices that have begun
        self._num_calls: dict[int, int] = {}

    def write(self, index: int, output: RequestOutput, usage: Usage | None) -> Iterator[bytes]:
        answer = self._answer
        for completion in output.outputs:
            if completion.index not in self._parsers:
                self._parsers[completion.index] = answer.tool_parser()
                role = ChatDelta(role="assistant", content="")
                yield event(answer.chunk([ChatChunkChoice(index=completion.index, delta=role)], usage))
            token_ids = list(completion.token_ids) if answer.request.return_token_ids else None
            logprobs = answer.chat_logprobs(completion)
            deltas = self._deltas(completion)
            if not deltas and (completion.finish_reason or logprobs or token_ids or usage):
                deltas = [ChatDelta(content="")]
            choices = [ChatChunkChoice(index=completion.index, delta=delta) for delta in deltas]
            if choices:
                choices[0].logprobs, choices[0].token_ids = logprobs, token_ids
                num_calls = self._num_calls.get(completion.index, 0)
                choices[-1].finish_reason = answer.finish_reason(completion, num_calls)
                choices[-1].stop_reason = completion.stop_reason
            for choice in choices:
                yield event(answer.chunk([choice], usage))

    def _deltas(self, completion: CompletionOutput) -> list[ChatDelta]:
        """The new text, or the text and the calls that a parser finds in it."""
        parser = self._parsers[completion.index]
        if parser is None:
            return [ChatDelta(content=completion.text)] if completion.text else []
        found = parser.push(completion.text)
        if completion.finish_reason is not None:
            found += parser.flush()
        deltas = []
        for one in found:
            if isinstance(one, str):
                deltas.append(ChatDelta(content=one))
                continue
            first = self._num_calls.get(completion.index, 0)
            self._num_calls[completion.index] = first + 1
            if calls := self._answer.tool_calls([one], first, indexed=True):
                deltas.append(ChatDelta(tool_calls=calls))
        return deltas

    def last(self, usage: Usage) -> bytes:
        return event(self._answer.chunk([], usage))
