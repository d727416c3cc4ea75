# SPDX-License-Identifier: Apache-2.0
"""What clients may send: the bodies of completions and chat completions, and what they mean for the engine.

Names are OpenAI's, and vLLM's where OpenAI has none. A field that this server does not support is an error unless its
value is the neutral one; it is never ignored. Bounds on numbers and lists are those of `SamplingParams`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastserve.config import RequestOutputKind, SamplingParams, StructuredOutputs
from fastserve.errors import InvalidRequest

MAX_PROMPTS = 256  # of one completions request
MAX_MESSAGES = 4096
MAX_ERROR_CHARS = 500

# Fields of other servers, with the values that ask for nothing. null always asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
    # of messages
    "annotations": ([],),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
}


class Body(BaseModel):
    """A JSON object whose every field is known. Numbers are not made of strings, nor strings of numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in NEUTRAL and name not in cls.model_fields:
                if value is not None and not any(type(value) is type(v) and value == v for v in NEUTRAL[name]):
                    raise ValueError(f"{name} is not supported by this server; leave it out")
            else:
                kept[name] = value
        return kept


class StreamOptions(Body):
    include_usage: bool | None = None  # a last chunk with the usage
    continuous_usage_stats: bool | None = None  # the usage so far in every chunk


class JsonSchemaFormat(Body):
    name: str = Field(max_length=256)
    description: str | None = Field(None, max_length=4096)
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputsField(Body):
    """vLLM's way to say what the output must match; exactly one."""

    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GenerationRequest(Body):
    """What both kinds of request have. None = the model's own default, as `SamplingParams` has it."""

    model: str | None = Field(None, max_length=1024)
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int = 0  # lower goes first, under the priority policy
    cache_salt: str | None = Field(None, min_length=1, max_length=256)  # prefixes are shared within one salt only
    request_id: str | None = Field(None, min_length=1, max_length=128, pattern="^[A-Za-z0-9_.:-]+$")
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsField | None = None
    # Accepted because clients send them; they have no effect on what is generated.
    user: str | None = Field(None, max_length=1024)
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = Field(None, max_length=1024)
    prompt_cache_key: str | None = Field(None, max_length=1024)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_usage_always(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def _check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed together with stream=true")

    def structure(self) -> StructuredOutputs | None:
        """What the output must match; None = nothing. Raises InvalidRequest."""
        wanted, other = self.structured_outputs, self.response_format
        if other is not None and other.type != "json_schema" and other.json_schema is not None:
            raise InvalidRequest("response_format.json_schema is only allowed with type json_schema")
        if wanted is not None:
            if other is not None and other.type != "text":
                raise InvalidRequest("response_format and structured_outputs are not allowed together")
            return StructuredOutputs(
                json=wanted.json_,
                regex=wanted.regex,
                choice=wanted.choice,
                grammar=wanted.grammar,
                json_object=wanted.json_object,
            )
        if other is None or other.type == "text":
            return None
        if other.type == "json_object":
            return StructuredOutputs(json_object=True)
        if other.json_schema is None or other.json_schema.schema_ is None:
            raise InvalidRequest("response_format of type json_schema needs json_schema.schema")
        return StructuredOutputs(json=other.json_schema.schema_)

    def _params(self, defaults: SamplingParams, **more: Any) -> SamplingParams:
        self._check_stream_options()
        given: dict[str, Any] = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        given |= {"structured_outputs": self.structure(), "output_kind": kind, **more}
        return replace(defaults, **given)


_SAMPLING_FIELDS = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
    "spaces_between_special_tokens", "logit_bias", "allowed_token_ids", "bad_words",
    "prompt_logprobs",
)  # fmt: skip


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = None  # 0 with echo: nothing is generated, the prompt is scored
    echo: bool | None = None
    logprobs: int | None = None  # most likely tokens per position
    add_special_tokens: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt. Raises InvalidRequest when there is none or too many."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        if not 1 <= len(given) <= MAX_PROMPTS:
            raise InvalidRequest(f"prompt is a list of {len(given)} prompts; 1 to {MAX_PROMPTS} are allowed")
        return list(given)

    @property
    def scores_only(self) -> bool:
        return self.max_tokens == 0 and bool(self.echo)

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """`defaults` are the model's. Raises InvalidRequest for values that are not acceptable."""
        more: dict[str, Any] = {}
        if self.scores_only:
            more["max_tokens"] = 1  # the engine always makes one token; it is not shown
            more["min_tokens"] = 0
        elif self.max_tokens is not None:
            more["max_tokens"] = self.max_tokens
        if self.logprobs is not None:
            more["logprobs"] = self.logprobs
            if self.echo:
                more["prompt_logprobs"] = self.logprobs
        return self._params(defaults, **more)


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str = Field(max_length=256)
    arguments: str


class MessageToolCall(Body):
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = Field(None, max_length=256)

    def for_template(self, *, as_parts: bool = False) -> dict[str, Any]:
        """As chat templates know messages: text is one string, or with `as_parts` a list of parts; a tool call's
        arguments are an object."""
        role = "system" if self.role == "developer" else self.role
        content: Any = self.content
        if as_parts:
            texts = [content] if isinstance(content, str) else [part.text for part in content or []]
            content = [{"type": "text", "text": text} for text in texts]
        elif isinstance(content, list):
            content = "".join(part.text for part in content)
        message: dict[str, Any] = {"role": role, "content": content if content is not None else ""}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _as_object(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return message


def _as_object(arguments: str) -> Any:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


class FunctionTool(Body):
    name: str = Field(min_length=1, max_length=64, pattern="^[A-Za-z0-9_.-]+$")
    description: str | None = Field(None, max_length=16384)
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    name: str = Field(max_length=64)


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = None  # the older name of max_completion_tokens
    max_completion_tokens: int | None = None  # None = until the context is full
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None  # None = auto if there are tools
    parallel_tool_calls: bool | None = None  # false: the first call only
    add_generation_prompt: bool = True
    add_special_tokens: bool = False  # the template has written them already
    chat_template: str | None = Field(None, max_length=2**20)  # only where the server trusts its clients
    chat_template_kwargs: dict[str, Any] | None = None

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """`defaults` are the model's. Raises InvalidRequest for values that are not acceptable."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs is only allowed together with logprobs=true")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        more: dict[str, Any] = {"max_tokens": limit, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}
        if self.must_call:
            if self.structure() is not None:
                raise InvalidRequest("a tool_choice that demands a call is not allowed together with a response format")
            more["structured_outputs"] = StructuredOutputs(json=self._call_schema())
        return self._params(defaults, **more)

    @property
    def choice(self) -> str:
        """What may be called: none, auto, required, named."""
        if isinstance(self.tool_choice, NamedTool):
            return "named"
        return self.tool_choice or ("auto" if self.tools else "none")

    @property
    def must_call(self) -> bool:
        return self.choice in ("required", "named")

    def template_tools(self) -> list[dict[str, Any]] | None:
        if not self.tools or self.choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def _call_schema(self) -> dict[str, Any]:
        """The JSON of one call of an allowed tool. Raises InvalidRequest when there is no such tool."""
        allowed = [tool.function for tool in self.tools or []]
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            allowed = [function for function in allowed if function.name == name]
        if not allowed:
            raise InvalidRequest("tool_choice demands a call, but tools has no such function")
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    "arguments": {"type": "object"} if function.parameters is None else function.parameters,
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for function in allowed
        ]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}


class TokenizeRequest(Body):
    """The body of POST /tokenize: a text, or messages that go through the chat template."""

    model: str | None = Field(None, max_length=1024)
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    model: str | None = Field(None, max_length=1024)
    tokens: list[int] = Field(max_length=2**20)


REQUESTS: Mapping[str, type[CompletionRequest] | type[ChatCompletionRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}


def parse_request(url: str, body: Any) -> CompletionRequest | ChatCompletionRequest:
    """The request that `body`, a JSON object, is at `url`; raises InvalidRequest saying what is wrong with it."""
    if url not in REQUESTS:
        raise InvalidRequest(f"url {url!r:.100} is not supported; it must be one of {', '.join(REQUESTS)}")
    try:
        return REQUESTS[url].model_validate(body)
    except ValidationError as error:
        raise InvalidRequest(describe_errors(error.errors(include_url=False, include_input=False))[0]) from None


def describe_errors(errors: Any) -> tuple[str, str | None]:
    """A message of bounded length and the field of the first of pydantic's errors. The input is not echoed."""
    first = errors[0]
    names = [str(part) for part in first["loc"] if part != "body" and not _is_union_branch(part)]
    param = ".".join(names)[:100] or None
    if first["type"] == "extra_forbidden":
        text = "unknown field; this server does not support it"
    elif first["type"] == "value_error":
        text = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
    else:
        text = first["msg"]
    return f"{param}: {text}"[:MAX_ERROR_CHARS] if param else text[:MAX_ERROR_CHARS], param


def _is_union_branch(part: Any) -> bool:
    """pydantic puts the name of the tried type of a union into the location."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part or part[:1].isupper())
