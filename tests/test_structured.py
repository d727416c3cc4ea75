# SPDX-License-Identifier: Apache-2.0
"""Structured output: a random model can only write what the structure allows, alone and in company."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastserve import LLM, InvalidRequest, SamplingParams, StructuredOutputs
from fastserve.server import service
from serving import RunningServer
from tiny_models import make_tiny_checkpoint

ENGINE: dict[str, Any] = {"block_size": 16, "num_blocks": 64, "max_num_batched_tokens": 32}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CASES: list[tuple[dict[str, Any], Any]] = [
    ({"json": SCHEMA}, lambda text: set(json.loads(text)) == {"name", "age"} and 0 <= json.loads(text)["age"] < 100),
    ({"regex": "[a-c]{3}-[0-9]{2}"}, lambda text: re.fullmatch("[a-c]{3}-[0-9]{2}", text)),
    ({"choice": ["red", "green", "dark blue"]}, lambda text: text in ("red", "green", "dark blue")),
    ({"grammar": 'start: "(" start ")" | "x"'}, lambda text: re.fullmatch(r"(\(*)x(\)*)", text)),
]


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(tiny_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_dir, **ENGINE) as offline:
        yield offline


@pytest.fixture(scope="module")
def server(tiny_dir: Path) -> Iterator[RunningServer]:
    with RunningServer(tiny_dir, ENGINE, served_model_name=["tiny"]) as running:
        yield running
        running.wait_until_empty()


def params(structure: dict[str, Any], seed: int = 0, **more: Any) -> SamplingParams:
    given = {"temperature": 1.5, "max_tokens": 120, "seed": seed, **more}
    return SamplingParams(structured_outputs=StructuredOutputs(**structure), **given)


@pytest.mark.parametrize(("structure", "fits"), CASES)
def test_the_output_fits(llm: LLM, structure: dict[str, Any], fits: Any) -> None:
    finished = 0
    outputs = llm.generate(["Say"] * 8, [params(structure, seed) for seed in range(8)], use_tqdm=False)
    for output in outputs:
        (answer,) = output.outputs
        if answer.finish_reason == "stop":
            assert fits(answer.text), answer.text
            finished += 1
    assert finished >= 4


def test_structured_requests_and_others_do_not_change_each_other(llm: LLM) -> None:
    mixed = [params(case[0], i) for i, case in enumerate(CASES)]
    mixed += [
        SamplingParams(temperature=1.0, max_tokens=20, seed=3, presence_penalty=1.0),
        SamplingParams(temperature=0),
    ]
    alone = [llm.generate("The quick", one, use_tqdm=False)[0].outputs[0].token_ids for one in mixed]
    together = llm.generate(["The quick"] * len(mixed), mixed, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in together] == alone


def test_preemption_does_not_change_a_structured_output(tiny_dir: Path, llm: LLM) -> None:
    asked = [params({"regex": "[a-z]{40}"}, seed) for seed in range(6)]
    expected = [output.outputs[0].text for output in llm.generate(["Say"] * 6, asked, use_tqdm=False)]
    with LLM(tiny_dir, block_size=16, num_blocks=6, max_num_batched_tokens=8, admission="aggressive") as small:
        got = small.generate(["Say"] * 6, asked, use_tqdm=False)
        assert small.loaded.engine.stats.num_preemptions > 0
    assert [output.outputs[0].text for output in got] == expected


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "json": {}}, "exactly one"),
        ({"regex": "(("}, "unclosed"),
        ({"regex": "(?=a)b"}, "structured output"),
        ({"json": "{"}, "not valid JSON"),
        ({"json": {"type": "frog"}}, "structured output"),
        ({"json": {"$ref": "http://example.com/schema"}}, "structured output"),
        ({"grammar": "start: missing"}, "structured output"),
        ({"choice": []}, "choice"),
        ({"regex": "a" * 70000}, "regex"),
    ],
)
def test_what_cannot_be_compiled_is_refused(llm: LLM, structure: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.generate("a", params(structure), use_tqdm=False)


def test_a_schema_has_a_greatest_depth() -> None:
    schema: Any = {}
    for _ in range(40):
        schema = {"properties": {"a": schema}}
    with pytest.raises(InvalidRequest, match="deeper than 32"):
        StructuredOutputs(json=schema)


def test_the_openai_client_gets_json(server: RunningServer) -> None:
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 150}
    formats: list[Any] = [
        {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}},
        {"type": "text"},
    ]
    answer = server.client().chat.completions.create(**asked, response_format=formats[0], seed=4)
    assert answer.choices[0].finish_reason == "stop"
    assert set(json.loads(answer.choices[0].message.content or "")) == {"name", "age"}
    streamed = server.client().chat.completions.create(**asked, response_format=formats[0], seed=4, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == answer.choices[0].message.content
    server.client().chat.completions.create(**asked, response_format=formats[1], seed=4)
    choice = server.post("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["yes", "no"]}})
    assert choice.json()["choices"][0]["text"] in ("yes", "no")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "yaml"}},
        {"structured_outputs": {"regex": "(("}},
        {"structured_outputs": {"regex": "a"}, "ignore_eos": True},
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
    ],
)
def test_a_bad_structure_is_a_400_and_harms_nobody(server: RunningServer, fields: dict[str, Any]) -> None:
    assert server.post("/v1/completions", {"prompt": "a", **fields}).status_code == 400
    assert server.get("/health").status_code == 200


def test_compiling_has_a_deadline(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_COMPILE_S", 0.0)
    answer = server.post("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "never seen"}})
    assert answer.status_code == 400
    assert "to compile" in answer.json()["error"]["message"]
