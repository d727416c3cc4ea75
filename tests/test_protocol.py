# SPDX-License-Identifier: Apache-2.0
"""Request bodies: what they mean for the engine, and that nothing unsupported is ignored."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from fastserve.config import RequestOutputKind, SamplingParams
from fastserve.errors import InvalidRequest
from fastserve.outputs import CompletionOutput, Logprob, RequestOutput
from fastserve.server.answers import whole_answer
from fastserve.server.protocol import ChatCompletionRequest, CompletionRequest, parse_request

DEFAULTS = SamplingParams(temperature=0.7, top_k=40)
HELLO = [{"role": "user", "content": "Hello"}]


def completion(**fields: Any) -> CompletionRequest:
    request = parse_request("/v1/completions", {"prompt": "a", **fields})
    assert isinstance(request, CompletionRequest)
    return request


def chat(**fields: Any) -> ChatCompletionRequest:
    request = parse_request("/v1/chat/completions", {"messages": HELLO, **fields})
    assert isinstance(request, ChatCompletionRequest)
    return request


def test_importing_the_package_imports_no_web_framework() -> None:
    code = "import sys, fastserve, fastserve.cli\nassert not {'fastapi', 'pydantic', 'uvicorn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_sampling_field_reaches_the_engine() -> None:
    given: dict[str, Any] = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.2,
        "repetition_penalty": 1.1,
        "seed": 5,
        "stop": ("x", "y"),
        "stop_token_ids": (3,),
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 2,
        "skip_special_tokens": False,
        "allowed_token_ids": (3, 4),
        "prompt_logprobs": 1,
        "max_tokens": 9,
    }
    body = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    params = completion(**body, logit_bias={"3": 1.5}, logprobs=2).sampling_params(DEFAULTS)
    assert {name: getattr(params, name) for name in given} == given
    assert params.logit_bias == {3: 1.5}
    assert params.logprobs == 2
    assert params.output_kind is RequestOutputKind.FINAL_ONLY


def test_what_is_not_given_is_the_models_default() -> None:
    params = completion(temperature=None).sampling_params(DEFAULTS)
    assert (params.temperature, params.top_k, params.max_tokens) == (0.7, 40, 16)
    assert chat().sampling_params(DEFAULTS).max_tokens is None
    assert chat(max_tokens=3).sampling_params(DEFAULTS).max_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=4).sampling_params(DEFAULTS).max_tokens == 4
    assert chat(logprobs=True, top_logprobs=5).sampling_params(DEFAULTS).logprobs == 5
    assert completion(stream=True).sampling_params(DEFAULTS).output_kind is RequestOutputKind.DELTA


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"best_of": 3}, "best_of is not supported"),
        ({"suffix": "end"}, "suffix is not supported"),
        ({"bad_words": [""]}, "bad_words"),
        ({"logprobz": 1}, "logprobz: unknown field"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": -1}, "temperature=-1"),
        ({"n": True}, "n"),
        ({"n": 10**9}, "n=1000000000"),
        ({"stop": ["x"] * 17}, "at most 16"),
        ({"stream_options": {"include_usage": True}}, "stream=true"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"temperature": float("nan")}, "temperature"),
        ({"request_id": "a b"}, "request_id"),
        ({"prompt": []}, "1 to 256"),
        ({"prompt": ["x"] * 257}, "1 to 256"),
    ],
)
def test_what_is_not_acceptable_is_refused_with_its_name(fields: dict[str, Any], message: str) -> None:
    def use() -> None:
        request = completion(**fields)
        request.prompts()
        request.sampling_params(DEFAULTS)

    with pytest.raises(InvalidRequest) as caught:
        use()
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


def test_an_error_does_not_echo_a_long_input() -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(**{"z" * 100000: "y" * 100000})
    assert len(str(caught.value)) < 600


def test_neutral_values_of_unsupported_fields_are_accepted() -> None:
    completion(suffix=None, best_of=1, bad_words=[], user="me")
    chat(store=False, service_tier="auto", reasoning_effort=None)


def test_messages_are_what_templates_know() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    system, assistant, tool = (message.for_template() for message in chat(messages=messages).messages)
    assert system == {"role": "system", "content": "be brief"}
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert tool == {"role": "tool", "content": "2", "tool_call_id": "1"}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"role": "robot", "content": "x"},
        {"content": "x"},
        "x",
    ],
)
def test_messages_of_other_kinds_are_refused(message: Any) -> None:
    with pytest.raises(InvalidRequest, match="messages"):
        chat(messages=[message])


def _output(**more: Any) -> RequestOutput:
    logprobs = [{7: Logprob(-1.0, 2, "b"), 8: Logprob(-0.5, 1, "c")}, {8: Logprob(float("-inf"), 1, "c")}]
    answer = CompletionOutput(0, "bc", [7, 8], -1.0, logprobs, "length", None)
    return RequestOutput("r", "a", [5], None, [answer], True, num_cached_tokens=1, **more)


def test_a_completion_answer_has_openais_shape() -> None:
    body = whole_answer(completion(logprobs=1, echo=False), [_output()], "m", None).model_dump()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("bc", "length", None)
    assert choice["logprobs"]["tokens"] == ["b", "c"]
    assert choice["logprobs"]["token_logprobs"] == [-1.0, -9999.0]
    assert choice["logprobs"]["text_offset"] == [0, 1]
    assert choice["logprobs"]["top_logprobs"][0] == {"b": -1.0, "c": -0.5}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert body["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 1}}
    assert "token_ids" not in choice


def test_a_chat_answer_has_openais_shape() -> None:
    body = whole_answer(chat(logprobs=True, top_logprobs=1, request_id="mine"), [_output()], "m", None).model_dump()
    assert body["id"] == "chatcmpl-mine"
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "bc", "refusal": None}
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("b", -1.0, [98])
    assert [top["token"] for top in first["top_logprobs"]] == ["c"]
