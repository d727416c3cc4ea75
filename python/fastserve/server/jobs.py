# SPDX-License-Identifier: Apache-2.0
"""From a request's body to what the engine runs: prompts as token ids, sampling parameters, and every check that needs
no engine time. Used by the endpoints and by batch files."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastserve.chat_template import check_template_kwargs, render_chat
from fastserve.config import SamplingParams
from fastserve.engine.load import LoadedEngine
from fastserve.errors import FastserveError, InvalidRequest
from fastserve.inputs import Prompt
from fastserve.server.errors import ApiError
from fastserve.server.protocol import ChatCompletionRequest, CompletionRequest, TokenizeRequest


@dataclass(frozen=True)
class Job:
    """A request that is ready to run: its prompts as token ids, and how to sample."""

    request: CompletionRequest | ChatCompletionRequest
    prompts: list[Prompt]
    params: SamplingParams
    arrival_s: float  # monotonic, before tokenising


def make_job(
    loaded: LoadedEngine,
    request: CompletionRequest | ChatCompletionRequest,
    arrival_s: float,
    tool_format: str | None = None,
) -> Job:
    """Tokenises and checks, which takes a while: not for an event loop. What the output must match is not compiled
    (`LoadedEngine.check_structure`). `tool_format` is how the model writes calls of tools, None if that is not known.

    Raises InvalidRequest or ApiError.
    """
    params = request.sampling_params(loaded.default_sampling_params())
    if isinstance(request, ChatCompletionRequest):
        if request.tools and request.choice == "auto":
            if tool_format is None:
                raise InvalidRequest(
                    "this model's chat template has no known format for tool calls, or the server runs with "
                    "--no-enable-auto-tool-choice; start with --tool-call-parser, or demand a call with tool_choice"
                )
            if tool_format == "mistral":  # its mark is a special token
                params = replace(params, skip_special_tokens=False)
        prompts = [chat_prompt(loaded, request, request.add_special_tokens)]
    else:
        special = request.add_special_tokens is not False
        prompts = [loaded.prompt(one, add_special_tokens=special) for one in request.prompts()]
    return _checked(loaded, Job(request, prompts, params, arrival_s))


def chat_prompt(
    loaded: LoadedEngine, request: ChatCompletionRequest | TokenizeRequest, add_special_tokens: bool
) -> Prompt:
    """Renders and tokenises a conversation."""
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise FastserveError("chat needs a tokenizer; this engine has none")
    template = tokenizer.chat_template
    if isinstance(request, ChatCompletionRequest) and request.chat_template is not None:
        template = request.chat_template
    if template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions, or start with --chat-template")
    kwargs = request.chat_template_kwargs or {}
    check_template_kwargs(kwargs)
    text = render_chat(
        template,
        [message.for_template(as_parts=loaded.content_parts) for message in request.messages or []],
        add_generation_prompt=request.add_generation_prompt,
        tools=request.template_tools() if isinstance(request, ChatCompletionRequest) else None,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        **kwargs,
    )
    return loaded.prompt(text, add_special_tokens=add_special_tokens)


def _checked(loaded: LoadedEngine, job: Job) -> Job:
    """What can be refused is refused here: once a stream has begun, its status is 200."""
    engine, request = loaded.engine, job.request
    max_len = engine.scheduler.max_len
    for prompt in job.prompts:
        num_prompt, num_output = len(prompt.token_ids), job.params.max_tokens
        if num_prompt + (num_output or 1) > max_len:
            asked = "at least 1 for the answer" if num_output is None else f"{num_output} for the answer"
            raise ApiError(
                400,
                f"This model's maximum context length is {max_len} tokens. However, you requested "
                f"{num_prompt + (num_output or 1)} tokens ({num_prompt} in the prompt, {asked}). "
                "Please shorten the prompt or ask for fewer tokens.",
                param="messages" if isinstance(request, ChatCompletionRequest) else "prompt",
                code="context_length_exceeded",
            )
        engine.check_request(
            prompt.token_ids, job.params, priority=request.priority, cache_salt=request.cache_salt or ""
        )
    if request.priority and loaded.config.policy != "priority":
        raise InvalidRequest("priority is only allowed with --scheduling-policy priority")
    return job
