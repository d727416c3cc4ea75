# SPDX-License-Identifier: Apache-2.0
"""Calls of tools: found in text however it is cut, nothing dropped, and over HTTP with the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.server.tool_calls import FORMATS, Call, format_of_template
from serving import RunningServer
from tiny_models import CHATML, byte_level_tokenizer, make_tiny_checkpoint, write_tokenizer

SUN = Call("sun", '{"city": "Oslo"}')
RAIN = Call("rain", "{}")
EXAMPLES: list[tuple[str, str, list[Any]]] = [
    ("hermes", '<tool_call>\n{"name": "sun", "arguments": {"city": "Oslo"}}\n</tool_call>', [SUN]),
    (
        "hermes",
        'Let me see.<tool_call>{"name": "sun", "arguments": {"city": "Oslo"}}</tool_call>\n'
        '<tool_call>{"name": "rain"}</tool_call>done',
        ["Let me see.", SUN, "\n", RAIN, "done"],
    ),
    ("hermes", '<tool_call>{"name": "sun", "arguments": {"city": "Oslo"}}', [SUN]),
    ("hermes", '<tool_call>{"name": "sun", "argum', ['<tool_call>{"name": "sun", "argum']),
    ("hermes", "<tool_call>{bad}</tool_call>", ["<tool_call>{bad}</tool_call>"]),
    ("hermes", "a <tool_ca", ["a <tool_ca"]),
    ("hermes", "1 < 2 <tool_call> 3", ["1 < 2 <tool_call> 3"]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "}</tool_call>\\"{"}}</tool_call>',
        [Call("f", '{"a": "}</tool_call>\\"{"}')],
    ),
    ("llama3_json", '{"name": "sun", "parameters": {"city": "Oslo"}}', [SUN]),
    ("llama3_json", ' {"name": "rain", "parameters": {}}; {"name": "rain"}', [RAIN, RAIN]),
    ("llama3_json", 'Well, {"name": "rain"}', ['Well, {"name": "rain"}']),
    ("llama3_json", '{"answer": 1}', ['{"answer": 1}']),
    ("llama3_json", '{"name": "rain"} and more', [RAIN, " and more"]),
    ("mistral", '[TOOL_CALLS][{"name": "sun", "arguments": {"city": "Oslo"}}, {"name": "rain"}]', [SUN, RAIN]),
    ("mistral", 'See: [TOOL_CALLS] [{"name": "rain"}]', ["See: ", RAIN]),
    ("mistral", "[TOOL_CALLS][]", ["[TOOL_CALLS][]"]),
]


def parse(kind: str, pieces: list[str]) -> list[Any]:
    parser = FORMATS[kind]()
    events = [event for piece in pieces for event in parser.push(piece)] + parser.flush()
    merged: list[Any] = []
    for event in events:
        if isinstance(event, str) and merged and isinstance(merged[-1], str):
            merged[-1] += event
        else:
            merged.append(event)
    return merged


@pytest.mark.parametrize(("kind", "text", "expected"), EXAMPLES)
def test_calls_are_found_and_text_is_kept(kind: str, text: str, expected: list[Any]) -> None:
    assert parse(kind, [text]) == expected
    assert parse(kind, list(text)) == expected


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", '{"name": "f", "arguments": {"a": [1, "}"]}}', '{"name": "g"}',
    '[{"name": "h"}]', "{", "}", "[", "]", '"', "\\", "<", "tool", "text", " ", "\n", ";", ",", "é🙂",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), st.data())
def test_any_cutting_gives_the_same_events_and_no_text_is_lost(kind: str, text: str, data: st.DataObject) -> None:
    whole = parse(kind, [text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(kind, pieces) == whole
    if not any(isinstance(event, Call) for event in whole):
        assert "".join(whole) == text


def test_the_format_is_what_the_template_teaches() -> None:
    assert format_of_template("{{ tools }} <tool_call>") == "hermes"
    assert format_of_template("[TOOL_CALLS] {{ tools }}") == "mistral"
    assert format_of_template('{{ tools }} "parameters"') == "llama3_json"
    assert format_of_template(CHATML) is None
    assert format_of_template(None) is None


TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "sun",
            "description": "When the sun rises",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "rain"}},
]
ASKED: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Sun?"}], "tools": TOOLS, "max_tokens": 200}
FORCED = {
    "structured_outputs": {"regex": r'Hm\. <tool_call>\{"name": "rain", "arguments": \{"n": [1-9]\}\}</tool_call>'}
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    template = "{% if tools %}{{ tools | tojson }} answer in <tool_call>{% endif %}" + CHATML
    write_tokenizer(folder, byte_level_tokenizer(512), chat_template=template)
    with RunningServer(folder, {"block_size": 16, "num_blocks": 64}, served_model_name=["tiny"]) as running:
        yield running
        running.wait_until_empty()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()


def collect(stream: Any) -> tuple[str, list[tuple[str, str]], str | None]:
    """Content, calls and finish reason of a stream, put together as clients do."""
    content, calls, reason = "", {}, None
    for chunk in stream:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            name, arguments = calls.get(call.index, ("", ""))
            calls[call.index] = (name + (call.function.name or ""), arguments + call.function.arguments)
        reason = choice.finish_reason or reason
    return content, [calls[i] for i in sorted(calls)], reason


def test_a_call_that_the_model_chooses(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASKED, seed=1, extra_body=FORCED).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "Hm."
    (call,) = answer.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "rain"
    assert json.loads(call.function.arguments)["n"] in range(1, 10)
    content, calls, reason = collect(client.chat.completions.create(**ASKED, seed=1, stream=True, extra_body=FORCED))
    assert (content, reason) == ("Hm. ", "tool_calls")
    assert calls == [("rain", call.function.arguments)]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "sun"}}])
def test_a_call_that_is_demanded(client: openai.OpenAI, choice: Any) -> None:
    for seed in range(4):
        answer = client.chat.completions.create(**ASKED, seed=seed, tool_choice=choice).choices[0]
        if answer.finish_reason == "length":  # the free arguments of rain() may be long
            continue
        (call,) = answer.message.tool_calls or []
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        assert call.type == "function"
        if call.function.name == "sun":
            assert json.loads(call.function.arguments) in ({"city": "Oslo"}, {"city": "Rome"})
        assert choice == "required" or call.function.name == "sun"
        streamed = client.chat.completions.create(**ASKED, seed=seed, tool_choice=choice, stream=True)
        assert collect(streamed) == ("", [(call.function.name, call.function.arguments)], "tool_calls")


def test_with_tool_choice_none_the_model_knows_no_tools(server: RunningServer, client: openai.OpenAI) -> None:
    with_tools = client.chat.completions.create(**ASKED, tool_choice="none", extra_body=FORCED)
    assert not with_tools.choices[0].message.tool_calls
    assert (with_tools.choices[0].message.content or "").startswith("Hm. <tool_call>")
    without = client.chat.completions.create(**{**ASKED, "tools": openai.omit}, max_completion_tokens=1)
    assert with_tools.usage is not None
    assert without.usage is not None
    assert with_tools.usage.prompt_tokens == without.usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "snow"}}}, "no such function"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "not allowed together"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
    ],
)
def test_tools_that_are_not_acceptable_are_refused(server: RunningServer, fields: Any, message: str) -> None:
    answer = server.post("/v1/chat/completions", {**ASKED, **fields})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
