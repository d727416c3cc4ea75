# SPDX-License-Identifier: Apache-2.0
"""The HTTP server with the official client: answers are those of `LLM`, errors have OpenAI's form."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fastserve import LLM, SamplingParams
from serving import RunningServer
from tiny_models import make_tiny_checkpoint

HELLO: Any = [{"role": "user", "content": "Hello there"}]
ENGINE: dict[str, Any] = {"block_size": 16, "num_blocks": 64, "max_num_batched_tokens": 32, "seed": 0}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(tiny_dir: Path) -> Iterator[RunningServer]:
    with RunningServer(tiny_dir, ENGINE, served_model_name=["tiny", "alias"], enable_vllm_metrics=True) as running:
        yield running
        running.wait_until_empty()


@pytest.fixture(scope="module")
def llm(tiny_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_dir, **ENGINE) as offline:
        yield offline


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7, "top_p": 0.9, "n": 3},
    {"seed": 3, "presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {"40": 2}},
    {"seed": 3, "top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2, "min_tokens": 4},
    {"seed": 1, "stop": ["e", "o"], "include_stop_str_in_output": True},
    {"seed": 2, "allowed_token_ids": [40, 41, 42], "ignore_eos": True},
    {"temperature": 0, "bad_words": ["e", "the"], "ignore_eos": True},
]
OPENAI_FIELDS = {"temperature", "top_p", "n", "seed", "stop", "presence_penalty", "frequency_penalty", "logit_bias"}


def split(fields: dict[str, Any]) -> dict[str, Any]:
    """The client knows OpenAI's fields; the others go in extra_body."""
    known = {name: value for name, value in fields.items() if name in OPENAI_FIELDS}
    return {**known, "extra_body": {name: value for name, value in fields.items() if name not in OPENAI_FIELDS}}


@pytest.mark.parametrize("fields", SAMPLING)
def test_completions_are_those_of_generate(client: openai.OpenAI, llm: LLM, fields: dict[str, Any]) -> None:
    expected = llm.generate("The quick", SamplingParams(max_tokens=12, **fields), use_tqdm=False)[0]
    got = client.completions.create(model="tiny", prompt="The quick", max_tokens=12, **split(fields))
    assert [choice.text for choice in got.choices] == [one.text for one in expected.outputs]
    assert [choice.finish_reason for choice in got.choices] == [one.finish_reason for one in expected.outputs]
    assert got.usage is not None
    assert got.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert got.usage.completion_tokens == sum(len(one.token_ids) for one in expected.outputs)

    pieces: dict[int, str] = {}
    for chunk in client.completions.create(
        model="alias", prompt="The quick", max_tokens=12, stream=True, **split(fields)
    ):
        for choice in chunk.choices:
            pieces[choice.index] = pieces.get(choice.index, "") + choice.text
    assert [pieces[i] for i in sorted(pieces)] == [one.text for one in expected.outputs]


@pytest.mark.parametrize("fields", SAMPLING)
def test_chats_are_those_of_chat(client: openai.OpenAI, llm: LLM, fields: dict[str, Any]) -> None:
    expected = llm.chat(HELLO, SamplingParams(max_tokens=12, **fields), use_tqdm=False)[0]
    got = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, **split(fields))
    assert [choice.message.content for choice in got.choices] == [one.text for one in expected.outputs]
    pieces: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    usage = None
    for chunk in client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        **split(fields),
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            first = choice.index not in pieces
            assert (choice.delta.role == "assistant") == first
            pieces[choice.index] = pieces.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason
    assert [pieces[i] for i in sorted(pieces)] == [one.text for one in expected.outputs]
    assert [reasons[i] for i in sorted(reasons)] == [one.finish_reason for one in expected.outputs]
    assert usage is not None
    assert usage.completion_tokens == sum(len(one.token_ids) for one in expected.outputs)


def test_several_prompts_are_answered_in_order(client: openai.OpenAI, llm: LLM) -> None:
    prompts = ["The", "A river of", "def add"]
    params = SamplingParams(temperature=0, max_tokens=6, n=2)
    expected = [one.text for output in llm.generate(prompts, params, use_tqdm=False) for one in output.outputs]
    got = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=6, n=2)
    assert [choice.index for choice in got.choices] == list(range(6))
    assert [choice.text for choice in got.choices] == expected
    pieces = [""] * 6
    stream = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=6, n=2, stream=True)
    for chunk in stream:
        for choice in chunk.choices:
            pieces[choice.index] += choice.text
    assert pieces == expected


def test_prompts_may_be_token_ids(client: openai.OpenAI, llm: LLM) -> None:
    expected = llm.generate([[5, 6, 7], [8, 9]], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    got = client.completions.create(model="tiny", prompt=[[5, 6, 7], [8, 9]], temperature=0, max_tokens=4)
    assert [choice.text for choice in got.choices] == [one.outputs[0].text for one in expected]
    one = client.completions.create(model="tiny", prompt=[5, 6, 7], temperature=0, max_tokens=4)
    assert one.choices[0].text == expected[0].outputs[0].text


def test_logprobs_are_those_of_generate(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3)
    expected = llm.generate("The quick", params, use_tqdm=False)[0].outputs[0]
    assert expected.logprobs is not None
    chosen = [entry[token].logprob for entry, token in zip(expected.logprobs, expected.token_ids, strict=True)]
    got = client.completions.create(model="tiny", prompt="The quick", temperature=0, max_tokens=5, logprobs=3)
    logprobs = got.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == chosen
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0

    chat = llm.chat(HELLO, params, use_tqdm=False)[0].outputs[0]
    assert chat.logprobs is not None
    asked: Any = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 5}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0].logprobs
    assert answer is not None
    assert answer.content is not None
    for position, entries, token in zip(answer.content, chat.logprobs, chat.token_ids, strict=True):
        assert position.logprob == entries[token].logprob
        ranked = sorted((e for e in entries.values() if e.rank is not None and e.rank <= 3), key=lambda e: e.rank or 0)
        assert [top.logprob for top in position.top_logprobs] == [entry.logprob for entry in ranked]
    streamed = []
    for chunk in client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == answer.content


def test_echo_scores_the_prompt(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    scored = llm.generate("The quick", params, use_tqdm=False)[0]
    assert scored.prompt_logprobs is not None
    expected = [None]
    for entry, token in zip(scored.prompt_logprobs[1:], scored.prompt_token_ids[1:], strict=True):
        assert entry is not None
        expected.append(entry[token].logprob)  # type: ignore[arg-type]
    got = client.completions.create(model="tiny", prompt="The quick", max_tokens=0, echo=True, logprobs=1)
    assert got.choices[0].text == "The quick"
    assert got.choices[0].logprobs is not None
    assert got.choices[0].logprobs.token_logprobs == expected
    assert got.usage is not None
    assert got.usage.completion_tokens == 0
    whole = client.completions.create(
        model="tiny", prompt="The quick", temperature=0, max_tokens=3, echo=True, logprobs=1
    )
    streamed = ""
    offsets: list[int] = []
    for chunk in client.completions.create(
        model="tiny", prompt="The quick", temperature=0, max_tokens=3, echo=True, logprobs=1, stream=True
    ):
        streamed += chunk.choices[0].text
        if chunk.choices[0].logprobs:
            offsets += chunk.choices[0].logprobs.text_offset or []
    assert streamed == whole.choices[0].text
    assert whole.choices[0].logprobs is not None
    assert offsets == whole.choices[0].logprobs.text_offset


def test_models_tokens_and_version(server: RunningServer, client: openai.OpenAI, llm: LLM) -> None:
    cards = client.models.list().data
    assert [card.id for card in cards] == ["tiny", "alias"]
    assert client.models.retrieve("tiny").model_dump()["max_model_len"] == 512
    ids = llm.get_tokenizer().encode("A river")
    body = server.post("/tokenize", {"prompt": "A river", "return_token_strs": True}).json()
    assert body["tokens"] == ids
    assert body["count"] == len(ids) == len(body["token_strs"])
    assert body["max_model_len"] == 512
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": "A river"}
    assert server.post("/tokenize", {"messages": HELLO}).json()["count"] > 3
    assert server.get("/version").json()["version"]
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        answer = httpx.request(method, server.url + path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_a_stream_is_framed_as_server_sent_events(server: RunningServer) -> None:
    answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 3, "stream": True, "ignore_eos": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events)
    assert {json.loads(event[6:])["object"] for event in events} == {"text_completion"}


BAD: list[tuple[str, Any, int, str]] = [
    ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "does not exist"),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "best_of": 4}, 400, "best_of"),
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", {"prompt": [[]]}, 400, "empty"),
    ("/v1/completions", {"prompt": [5, 99999]}, 400, "99999"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 600}, 400, "This model's maximum context length is 512 tokens."),
    ("/v1/completions", {"prompt": "a", "logprobs": 50}, 400, "logprobs"),
    ("/v1/completions", {"prompt": "a", "priority": 1}, 400, "priority"),
    ("/v1/completions", {"prompt": "a", "stream": True, "n": 100}, 400, "n=100"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": HELLO, "chat_template_kwargs": {"tokenize": True}}, 400, "reserved"),
    ("/v1/chat/completions", {"messages": HELLO, "tool_choice": 5}, 400, "tool_choice"),
    ("/v1/nothing", {}, 404, "/v1/nothing"),
    ("/tokenize", {}, 400, "either"),
    ("/detokenize", {"tokens": [-1]}, 400, "-1"),
    ("/health", {}, 405, ""),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD)
def test_errors_have_openais_form(server: RunningServer, path: str, body: Any, status: int, message: str) -> None:
    answer = server.post(path, body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert message in error["message"]


def test_a_context_overflow_is_told_as_clients_expect(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 600}])
    assert caught.value.code == "context_length_exceeded"
    assert "This model's maximum context length is 512 tokens." in str(caught.value)


@pytest.mark.parametrize("body", [b"{", b"[" * 100000, b'{"prompt": "\xff"}', b"null", b"\x00", b'{"prompt": NaN}'])
def test_a_body_that_is_no_json_object_is_a_400(server: RunningServer, body: bytes) -> None:
    answer = httpx.post(
        server.url + "/v1/completions", content=body, headers={"content-type": "application/json"}, timeout=60
    )
    assert answer.status_code == 400
    assert len(answer.content) < 1500


def test_other_content_types_are_refused(server: RunningServer) -> None:
    answer = httpx.post(
        server.url + "/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"}, timeout=60
    )
    assert answer.status_code == 415


def test_metrics_count_what_happened(server: RunningServer, client: openai.OpenAI) -> None:
    def value(name: str) -> float:
        lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith(name)]
        return float(lines[0].split()[-1])

    label = '{engine="0",model_name="tiny"}'
    before = {
        name: value(name + label) for name in ("fastserve:prompt_tokens_total", "fastserve:generation_tokens_total")
    }
    length = 'fastserve:request_success_total{engine="0",finished_reason="length",model_name="tiny"}'
    finished = value(length)
    client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=4, extra_body={"ignore_eos": True})
    server.wait_until_empty()
    assert value("fastserve:prompt_tokens_total" + label) == before["fastserve:prompt_tokens_total"] + 3
    assert value("fastserve:generation_tokens_total" + label) == before["fastserve:generation_tokens_total"] + 4
    assert value("vllm:" + length.split(":")[1]) == finished + 1
    assert value("fastserve:num_requests_running") == 0
    assert value("fastserve:kv_cache_usage_perc") == 0
    text = server.get("/metrics").text
    for name in ("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_sum",
                 "iteration_tokens_total_count", "prefix_cache_queries_total",
                 "prefix_cache_hits_total", "num_preemptions_total",
                 'num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"}',
                 'iteration_tokens_by_kind_total{engine="0",kind="decode",model_name="tiny"}'):  # fmt: skip
        assert f"\nfastserve:{name}" in text, name


def test_salts_do_not_share_cached_prefixes(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int:
        usage = client.completions.create(
            model="tiny", prompt=[9] * 64, max_tokens=1, extra_body={"cache_salt": salt}
        ).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    assert cached("a") == 0
    assert cached("a") > 0
    assert cached("b") == 0


def test_keys_are_needed_everywhere_but_health(tiny_dir: Path) -> None:
    with RunningServer(tiny_dir, ENGINE, api_key=["first", "second"], max_body_bytes=2000) as server:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            answer = server.get(path)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert server.post("/v1/completions", {"prompt": "a"}).status_code == 401
        for path in ("/health", "/ping", "/"):
            assert server.get(path).status_code == 200
        for key in ("first", "second"):
            assert server.client(api_key=key).models.list().data
        for key in ("x", "firs", "firstt", "FIRST"):
            assert server.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 401
        headers = {"Authorization": "Bearer first"}
        assert server.post("/v1/completions", {"prompt": "a" * 3000}, headers=headers).status_code == 413
        chunked = httpx.post(server.url + "/tokenize", content=iter([b" " * 1500] * 2), headers=headers, timeout=60)
        assert chunked.status_code == 413


def test_headers_are_bounded(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X-A: " + b"a" * 200_000 + b"\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 4")


def test_the_page_loads_nothing_from_elsewhere(server: RunningServer) -> None:
    answer = server.get("/")
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "//" not in answer.text.replace("://localhost", "").replace("http://www.w3.org/2000/svg", "")
