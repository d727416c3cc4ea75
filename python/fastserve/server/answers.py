# SPDX-License-Identifier: Apache-2.0
"""What the server answers: OpenAI's response bodies, made of the engine's outputs.

The same functions make the pieces of a stream (from outputs with new text only) and whole answers.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

import fastserve
from fastserve.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from fastserve.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from fastserve.server.tool_calls import FORMATS, Call, ToolCallParser, required_calls
from fastserve.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have
FINGERPRINT = f"fastserve-{fastserve.__version__}"


def _optional(**more: Any) -> Any:
    """A field that is left out of the JSON unless it is set."""
    return Field(None, exclude_if=lambda value: value is None, **more)


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | None = _optional()
    prompt_token_ids: list[int] | None = _optional()
    prompt_logprobs: list[dict[str, Any] | None] | None = _optional()


class Completion(BaseModel):
    """The answer of /v1/completions, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str = FINGERPRINT


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(BaseModel):
    name: str | None = _optional()
    arguments: str


class ToolCall(BaseModel):
    index: int | None = _optional()  # in streams
    id: str | None = _optional()
    type: Literal["function"] | None = _optional()
    function: FunctionCall


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = _optional()


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | None = _optional()


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str = FINGERPRINT
    prompt_logprobs: list[dict[str, Any] | None] | None = _optional()
    prompt_token_ids: list[int] | None = _optional()


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = _optional()
    content: str | None = _optional()
    tool_calls: list[ToolCall] | None = _optional()


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = _optional()
    token_ids: list[int] | None = _optional()


class ChatChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str = FINGERPRINT


class Answer:
    """What the parts of one answer have in common: id, time, model name, and how tokens are spelled."""

    def __init__(
        self, request: GenerationRequest, model: str, tokenizer: Tokenizer | None, tool_format: str | None = None
    ) -> None:
        self._tool_format = tool_format
        kind = "chatcmpl" if isinstance(request, ChatCompletionRequest) else "cmpl"
        self.id = f"{kind}-{request.request_id or uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.request = request
        self.tokenizer = tokenizer
        self._offsets: dict[int, int] = {}  # per choice: length of the text whose logprobs were given

    # -- completions ------------------------------------------------------------------------------------------------

    def completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def completion_choices(
        self, prompt_index: int, output: RequestOutput, prompt_text: str | None = None
    ) -> list[CompletionChoice]:
        """The choices of one of the prompts. `prompt_text`: with `echo`, when a choice is told for the first time."""
        request = self.request
        assert isinstance(request, CompletionRequest)
        first = 0 if prompt_text is None else len(output.prompt_token_ids)
        choices = []
        for completion in output.outputs:
            index = prompt_index * (request.n or 1) + completion.index
            text, finish_reason = completion.text, completion.finish_reason
            token_ids, logprobs = list(completion.token_ids), completion.logprobs
            if request.scores_only:
                text, token_ids, logprobs = "", [], logprobs and []
                finish_reason = "length" if finish_reason == "stop" else finish_reason
            shown = None
            if request.logprobs is not None and logprobs is not None:
                ids, positions = token_ids, list[PositionLogprobs | None](logprobs)
                if first and output.prompt_logprobs is not None:
                    ids = [*output.prompt_token_ids, *ids]
                    positions = [*output.prompt_logprobs, *positions]
                shown = self._completion_logprobs(index, ids, positions)
            choices.append(
                CompletionChoice(
                    index=index,
                    text=(prompt_text or "") + text,
                    logprobs=shown,
                    finish_reason=finish_reason,
                    stop_reason=completion.stop_reason,
                    token_ids=token_ids if request.return_token_ids else None,
                    prompt_token_ids=output.prompt_token_ids if request.return_token_ids else None,
                    prompt_logprobs=self.prompt_logprobs(output),
                )
            )
        return choices

    def _completion_logprobs(
        self, index: int, ids: Sequence[int], positions: Sequence[PositionLogprobs | None]
    ) -> CompletionLogprobs:
        offset = self._offsets.get(index, 0)
        offsets, tokens, chosen, tops = [], [], [], []
        for token_id, entries in zip(ids, positions, strict=True):
            token = self._spell(token_id, entries)
            tokens.append(token)
            offsets.append(offset)
            offset += len(token)
            chosen.append(None if entries is None else _finite(entries[token_id].logprob))
            top: dict[str, float] | None = None
            if entries is not None:
                top = {}
                for other, entry in entries.items():
                    top.setdefault(self._spell(other, entries), _finite(entry.logprob))
            tops.append(top)
        self._offsets[index] = offset
        return CompletionLogprobs(tokens=tokens, token_logprobs=chosen, top_logprobs=tops, text_offset=offsets)

    # -- chat -------------------------------------------------------------------------------------------------------

    def chat(self, choices: list[ChatChoice], output: RequestOutput, usage: Usage) -> ChatCompletion:
        ids = output.prompt_token_ids if self.request.return_token_ids else None
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage,
            prompt_logprobs=self.prompt_logprobs(output),
            prompt_token_ids=ids,
        )

    def tool_parser(self) -> ToolCallParser | None:
        """A parser for the calls in one choice's text; None where the request allows none."""
        request = self.request
        if not isinstance(request, ChatCompletionRequest) or request.choice == "none" or not request.tools:
            return None
        if request.must_call:
            return required_calls()
        return FORMATS[self._tool_format]() if self._tool_format else None

    def finish_reason(self, completion: CompletionOutput, num_calls: int) -> str | None:
        called = num_calls > 0 and completion.finish_reason == "stop"
        return "tool_calls" if called else completion.finish_reason

    def tool_calls(self, calls: Sequence[Call], first: int = 0, *, indexed: bool = False) -> list[ToolCall]:
        """Calls as the API has them, numbered from `first`. Without parallel_tool_calls only number 0 counts."""
        one_only = getattr(self.request, "parallel_tool_calls", None) is False
        return [
            ToolCall(
                index=number if indexed else None,
                id=f"call_{uuid.uuid4().hex[:24]}",
                type="function",
                function=FunctionCall(name=call.name, arguments=call.arguments),
            )
            for number, call in enumerate(calls, first)
            if number == 0 or not one_only
        ]

    def _message(self, text: str) -> ChatMessage:
        parser = self.tool_parser()
        if parser is None:
            return ChatMessage(content=text)
        events = [*parser.push(text), *parser.flush()]
        calls = self.tool_calls([event for event in events if not isinstance(event, str)])
        content = "".join(event for event in events if isinstance(event, str))
        if calls:
            return ChatMessage(content=content.strip() or None, tool_calls=calls)
        return ChatMessage(content=content)

    def chat_choices(self, output: RequestOutput) -> list[ChatChoice]:
        messages = [self._message(completion.text) for completion in output.outputs]
        return [
            ChatChoice(
                index=completion.index,
                message=message,
                logprobs=self.chat_logprobs(completion),
                finish_reason=self.finish_reason(completion, len(message.tool_calls or [])),
                stop_reason=completion.stop_reason,
                token_ids=list(completion.token_ids) if self.request.return_token_ids else None,
            )
            for completion, message in zip(output.outputs, messages, strict=True)
        ]

    def chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def chat_logprobs(self, completion: CompletionOutput) -> ChatLogprobs | None:
        request = self.request
        if not isinstance(request, ChatCompletionRequest) or completion.logprobs is None:
            return None
        num_top = request.top_logprobs or 0
        content = []
        for token_id, entries in zip(completion.token_ids, completion.logprobs, strict=True):
            top = [
                self._top(other, entries) for other, e in entries.items() if e.rank is not None and e.rank <= num_top
            ]
            top.sort(key=lambda entry: -entry.logprob)  # the chosen token comes first among the entries
            content.append(TokenLogprob(**self._top(token_id, entries).model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)

    def _top(self, token_id: int, entries: PositionLogprobs) -> TopLogprob:
        token = self._spell(token_id, entries)
        logprob = _finite(entries[token_id].logprob)
        return TopLogprob(token=token, logprob=logprob, bytes=list(self._bytes(token_id, token)))

    # -- both -------------------------------------------------------------------------------------------------------

    def prompt_logprobs(self, output: RequestOutput) -> list[dict[str, Any] | None] | None:
        if self.request.prompt_logprobs is None or output.prompt_logprobs is None:
            return None
        return [
            None
            if entries is None
            else {
                str(token_id): {
                    "logprob": _finite(entry.logprob),
                    "rank": entry.rank,
                    "decoded_token": entry.decoded_token,
                }
                for token_id, entry in entries.items()
            }
            for entries in output.prompt_logprobs
        ]

    def _spell(self, token_id: int, entries: Mapping[int, Any] | None) -> str:
        if self.request.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        if entries is not None and entries[token_id].decoded_token is not None:
            return str(entries[token_id].decoded_token)
        return "" if self.tokenizer is None else self.tokenizer.decode([token_id], False)

    def _bytes(self, token_id: int, token: str) -> bytes:
        if self.tokenizer is not None and self.tokenizer.is_byte_level():
            return self.tokenizer.token_bytes(token_id)
        return token.encode("utf-8")


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def usage_of(
    outputs: Iterable[RequestOutput], num_output_tokens: int | None = None, *, scores_only: bool = False
) -> Usage:
    """The tokens of finished requests; `num_output_tokens` where the outputs hold new tokens only."""
    outputs = list(outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.num_cached_tokens or 0 for output in outputs)
    if num_output_tokens is None:
        num_output_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    if scores_only:
        num_output_tokens = 0
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=num_output_tokens,
        total_tokens=prompt + num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def whole_answer(
    request: CompletionRequest | ChatCompletionRequest,
    outputs: Sequence[RequestOutput],
    model: str,
    tokenizer: Tokenizer | None,
    tool_format: str | None = None,
) -> Completion | ChatCompletion:
    """The answer to a request that is not streamed; `outputs` are the finished ones of its prompts, in order."""
    answer = Answer(request, model, tokenizer, tool_format)
    if isinstance(request, ChatCompletionRequest):
        return answer.chat(answer.chat_choices(outputs[0]), outputs[0], usage_of(outputs))
    choices: list[CompletionChoice] = []
    for i, output in enumerate(outputs):
        prompt = echoed(request, output, tokenizer) if request.echo else None
        choices += answer.completion_choices(i, output, prompt)
    return answer.completion(choices, usage_of(outputs, scores_only=request.scores_only))


def echoed(request: CompletionRequest, output: RequestOutput, tokenizer: Tokenizer | None) -> str:
    """The text of a prompt as `echo` shows it."""
    if output.prompt is not None:
        return output.prompt
    return (
        "" if tokenizer is None else tokenizer.decode(output.prompt_token_ids, request.skip_special_tokens is not False)
    )
