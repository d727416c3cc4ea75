# SPDX-License-Identifier: Apache-2.0
"""The flags of `fastserve serve`: where they come from, and what each does to a running server."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fastserve import FastserveError, QueueFull
from fastserve.cli import _parser, main
from fastserve.server.middleware import path_of
from fastserve.server.options import ServeOptions, _spellings, read_options, variable
from fastserve.server.serve import make_service
from fastserve.server.stats_log import StatsLog
from serving import RunningServer, ServerProcess
from tiny_models import make_tiny_checkpoint

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
ENGINE: dict[str, Any] = {"block_size": 16, "num_blocks": 64, "max_num_batched_tokens": 32}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def parsed(*flags: str, environment: dict[str, str] | None = None) -> ServeOptions:
    return read_options(_parser().parse_args(["serve", *flags]), environment or {})


# --- where values come from ---


def test_a_flag_beats_its_variable_a_variable_the_file_and_the_file_the_default(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(
        "model: from-the-file\nport: 1\nmax-num-seqs: 2\nmax_model_len: 4k\nenable-prefix-caching: false\n"
        "served-model-name: [a, b]\nallowed-origins: http://x\noverride-generation-config: {temperature: 0.25}\n"
        "scheduling-policy: priority\nlog-level: debug\n"
    )
    environment = {"FASTSERVE_CONFIG": str(path), "FASTSERVE_MAX_NUM_SEQS": "3", "FASTSERVE_PORT": "4"}
    arguments = _parser().parse_args(["serve", "--port", "5"])
    options = read_options(arguments, environment)
    assert arguments.model == "from-the-file"
    assert (options.port, options.max_num_seqs, options.max_model_len) == (5, 3, 4096)
    assert (options.served_model_name, options.allowed_origins) == (["a", "b"], ["http://x"])
    assert (options.enable_prefix_caching, options.policy) == (False, "priority")
    assert options.override_generation_config == {"temperature": 0.25}
    assert (options.log_level, options.host) == ("debug", "127.0.0.1")
    arguments = _parser().parse_args(["serve", "from-the-flag", "--config", str(path)])
    read_options(arguments, {})
    assert arguments.model == "from-the-flag"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "mapping"),
        ("a: [", "not YAML"),
        ("prot: 1\n", "'prot' is no option"),
        ("port: high\n", "port: 'high'"),
        ("port: [1, 2]\n", "must be one value"),
        ("config: other.yaml\n", "'config' is no option"),
    ],
)
def test_a_file_that_cannot_be_read_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    assert main(["serve", "m", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["serve"]) == 2
    assert "give a model folder" in capsys.readouterr().err


def test_lists_may_be_repeated_or_json_as_in_vllm() -> None:
    options = parsed("m", "--allowed-origins", '["http://a", "http://b"]', "--allowed-origins", "http://c")
    assert options.allowed_origins == ["http://a", "http://b", "http://c"]
    environment = {"FASTSERVE_ALLOWED_METHODS": '["GET", "POST"]', "FASTSERVE_CUSTOM_HISTOGRAM_BUCKETS": "0.5,2"}
    options = parsed("m", environment=environment)
    assert (options.allowed_methods, options.custom_histogram_buckets) == (["GET", "POST"], [0.5, 2.0])


def test_names_of_vllm_are_understood() -> None:
    options = parsed(
        "m", "--dtype", "half", "-q", "auto", "--max-num-queued-reqs", "7", "--long-prefill-token-threshold", "9",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--disable-uvicorn-access-log",
        "--uvicorn-log-level", "warning", "--num-gpu-blocks-override", "5", "--no-enable-prefix-caching",
    )  # fmt: skip
    assert options.engine_options() == {
        "dtype": "float16", "quantization": "auto", "max_num_queued_requests": 7, "max_chunk_tokens": 9,
        "num_blocks": 5, "enable_prefix_caching": False,
    }  # fmt: skip
    assert (options.access_log, options.log_level, options.enable_auto_tool_choice) == (False, "warning", True)


def test_every_flag_and_its_variable_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for one in fields(ServeOptions):
        assert variable(one.name) in text
        assert all(name in text for name in _spellings(one.name))


# --- what they do ---


@pytest.fixture(scope="module")
def server(tiny_dir: Path) -> Iterator[RunningServer]:
    options: dict[str, Any] = {
        "chat_template": "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}",
        "chat_template_content_format": "openai",
        "trust_request_chat_template": True,
        "generation_config": "vllm",
        "override_generation_config": {"temperature": 0, "max_new_tokens": 3},
        "enable_force_include_usage": True,
        "enable_request_id_headers": True,
        "enable_auto_tool_choice": False,
        "enable_log_requests": True,
        "max_log_len": 5,
        "custom_histogram_buckets": [2.0, 0.5],
        "root_path": "/prefix",
        "allowed_origins": ["http://a.example"],
        "allowed_methods": ["POST"],
    }
    with RunningServer(tiny_dir, ENGINE, served_model_name=["tiny"], **options) as running:
        yield running
        running.wait_until_empty()


def text_of(server: RunningServer, tokens: list[int]) -> str:
    return str(server.post("/detokenize", {"tokens": tokens}).json()["prompt"])


def test_a_chat_template_of_the_server_gets_the_parts_of_messages(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "ab"}, {"role": "user", "content": [{"type": "text", "text": "cd"}] * 2}]
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert text_of(server, tokens) == "<ab><cd><cd>"


def test_a_request_may_bring_a_template_only_where_the_server_trusts_it(server: RunningServer, tiny_dir: Path) -> None:
    body = {"messages": HELLO, "chat_template": "{{ 'xyz' }}", "return_token_ids": True, "max_tokens": 1}
    answer = server.post("/v1/chat/completions", body).json()
    assert text_of(server, answer["prompt_token_ids"]) == "xyz"
    with RunningServer(tiny_dir, ENGINE) as other:
        refused = other.post("/v1/chat/completions", body)
        assert refused.status_code == 400
        assert "--trust-request-chat-template" in refused.json()["error"]["message"]


def test_sampling_defaults_can_be_set(server: RunningServer, tiny_dir: Path, tmp_path: Path) -> None:
    answers = [server.post("/v1/completions", {"prompt": [5, 6], "ignore_eos": True}).json() for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]  # temperature 0
    assert answers[0]["usage"]["completion_tokens"] == 3
    (tmp_path / "generation_config.json").write_text('{"top_k": 7, "temperature": 0.5}')
    loaded = server.llm.loaded
    kept, on_step = loaded.model_config, server.engine.on_step
    try:
        for flags, expected in (
            ({"generation_config": str(tmp_path)}, (0.5, 7)),
            ({"generation_config": str(tmp_path), "override_generation_config": {"top_k": 2}}, (0.5, 2)),
            ({"generation_config": "vllm"}, (1.0, 0)),
        ):
            asyncio.run(set_up(server, **flags))  # type: ignore[arg-type]
            params = loaded.default_sampling_params()
            assert (params.temperature, params.top_k) == expected
        for flags, message in (
            ({"override_generation_config": {"top_x": 2}}, "'top_x' is not known"),
            ({"override_generation_config": {"top_k": "2"}}, "top_k must be an integer"),
            ({"generation_config": "/nowhere"}, "does not exist"),
        ):
            with pytest.raises(FastserveError, match=message):
                asyncio.run(set_up(server, **flags))  # type: ignore[arg-type]
    finally:
        loaded.model_config, server.engine.on_step = kept, on_step


async def set_up(server: RunningServer, **options: Any) -> None:
    make_service(server.llm, "m", ServeOptions(**options))


def test_every_stream_ends_with_its_usage(server: RunningServer) -> None:
    text = server.post("/v1/completions", {"prompt": "a", "stream": True}).text
    assert json.loads(text.split("\n\n")[-3][6:])["usage"]["completion_tokens"] > 0


def test_every_answer_has_a_request_id(server: RunningServer) -> None:
    assert server.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for given in ("bad id", "x" * 200, ""):
        made = server.get("/nothing", headers={"X-Request-Id": given}).headers["x-request-id"]
        assert len(made) == 32


def test_the_model_may_be_kept_from_deciding_to_call_a_tool(server: RunningServer) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = server.post("/v1/chat/completions", {"messages": HELLO, "tools": tools})
    assert answer.status_code == 400
    assert "enable-auto-tool-choice" in answer.json()["error"]["message"]


def test_requests_are_logged_with_bounded_prompts(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastserve.server"):
        server.post("/v1/completions", {"prompt": "The river of time", "max_tokens": 2, "top_k": 3})
    (line,) = [record.message for record in caplog.records if " prompt='" in record.message]
    assert "prompt='The r' SamplingParams(" in line
    assert "top_k=3" in line


def test_cross_origin_methods_are_those_allowed(server: RunningServer) -> None:
    def preflight(method: str) -> int:
        headers = {"Origin": "http://a.example", "Access-Control-Request-Method": method}
        return httpx.options(server.url + "/v1/completions", headers=headers, timeout=60).status_code

    assert (preflight("POST"), preflight("DELETE")) == (200, 400)


def test_a_proxy_may_show_the_server_under_a_path(server: RunningServer) -> None:
    assert server.get("/openapi.json").json()["servers"] == [{"url": "/prefix"}]
    assert server.get("/v1/models").status_code == 200
    uploaded = httpx.post(server.url + "/v1/files", files={"file": b"{}"}, data={"purpose": "batch"}, timeout=60)
    assert "--batch-dir" in uploaded.json()["error"]["message"]  # known as an upload
    for scope in (
        {"path": "/prefix/health", "root_path": "/prefix"},
        {"path": "/health", "root_path": "/prefix"},
        {"path": "/health"},
    ):
        assert path_of(scope) == "/health"
    assert 'fetch("/' not in server.get("/").text


def test_http_requests_are_counted_by_endpoint(server: RunningServer) -> None:
    def value(name: str) -> float:
        lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith(name)]
        return float(lines[0].split()[-1]) if lines else 0.0

    good = 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}'
    bad = 'http_requests_total{handler="none",method="GET",status="4xx"}'
    duration = 'http_request_duration_seconds_count{handler="/v1/completions",method="POST"}'
    before = value(good), value(bad), value(duration)
    server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    server.get("/made/up/by/a/client")
    server.get("/health")
    server.wait_until(lambda: (value(good), value(bad), value(duration)) == tuple(one + 1 for one in before))
    assert "made/up" not in server.get("/metrics").text
    assert 'handler="/health"' not in server.get("/metrics").text


def test_each_request_is_accounted_for(server: RunningServer) -> None:
    def sums() -> dict[str, float]:
        found = {}
        for line in server.get("/metrics").text.splitlines():
            for name in ("max_num_generation_tokens", "prefill_kv_computed_tokens", "num_preemptions"):
                for end in ("sum", "count"):
                    if line.startswith(f"fastserve:request_{name}_{end}"):
                        found[f"{name}_{end}"] = float(line.split()[-1])
        return found

    body = {"prompt": [77] * 40, "max_tokens": 4, "ignore_eos": True, "n": 2}
    server.post("/v1/completions", body)
    server.wait_until_empty()
    before = sums()
    server.post("/v1/completions", body)  # two blocks of 16 are in the cache
    server.wait_until_empty()
    more = {name: value - before[name] for name, value in sums().items()}
    assert more == {
        "max_num_generation_tokens_sum": 4, "max_num_generation_tokens_count": 1,
        "prefill_kv_computed_tokens_sum": 8, "prefill_kv_computed_tokens_count": 1,
        "num_preemptions_sum": 0, "num_preemptions_count": 1,
    }  # fmt: skip
    text = server.get("/metrics").text
    assert 'time_to_first_token_seconds_bucket{engine="0",le="0.5",model_name="tiny"}' in text
    assert 'time_to_first_token_seconds_bucket{engine="0",le="0.25",model_name="tiny"}' not in text


def test_the_stats_line_says_what_happened_and_nothing_while_idle(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.wait_until_empty()
    seconds = [100.0]
    monkeypatch.setattr("fastserve.server.stats_log.time", SimpleNamespace(monotonic=lambda: seconds[0]))
    stats = StatsLog(server.service)
    assert stats.line() is None
    body = {"prompt": [88] * 50, "max_tokens": 20, "ignore_eos": True}
    for first, rates in ((True, "prefix hits 0.0%"), (False, "prefix hits 96.0%")):  # of the second, three blocks of 16
        seconds[0] += 10
        server.post("/v1/completions", body)
        server.wait_until_empty()
        line = stats.line()
        assert line is not None
        assert line.startswith("prompts 5.0 tok/s, outputs 2.0 tok/s, running 0, waiting 0, KV cache 0.0%, "), first
        assert line.endswith(rates)
    assert stats.line() is None


def test_waiting_tokens_are_bounded(tiny_dir: Path) -> None:
    with RunningServer(tiny_dir, {**ENGINE, "max_num_seqs": 1}, max_num_queued_tokens=100) as server:
        real = server.engine._runner.run
        may_go = threading.Event()
        server.engine._runner.run = lambda plan: (may_go.wait(60), real(plan))[1]
        body = {"max_tokens": 1, "ignore_eos": True}
        assert server.post("/v1/completions", {**body, "prompt": [5] * 101}).status_code == 400  # can never wait
        with ThreadPoolExecutor(4) as pool:
            try:
                running = pool.submit(server.post, "/v1/completions", {**body, "prompt": [5] * 60})
                server.wait_until(lambda: server.engine.num_running == 1)
                waiting = pool.submit(server.post, "/v1/completions", {**body, "prompt": [6] * 60})
                server.wait_until(lambda: server.service.num_open == 2 and _tokens(server) == 60)
                refused = server.post("/v1/completions", {**body, "prompt": [7] * 41})
                assert refused.status_code == 429
                assert "60 tokens of prompts are waiting, at most 100" in refused.json()["error"]["message"]
                fits = pool.submit(server.post, "/v1/completions", {**body, "prompt": [7] * 20, "n": 2})
                server.wait_until(lambda: _tokens(server) == 100)
                answer = server.post("/v1/completions", {**body, "prompt": [8]})
                assert answer.json()["error"]["code"] == "queue_full"
            finally:
                may_go.set()
            assert {one.result().status_code for one in (running, waiting, fits)} == {200}
        server.wait_until_empty()
        server.wait_until(lambda: _tokens(server) == 0)


def _tokens(server: RunningServer) -> int:
    return int(server.engine.scheduler.num_waiting_tokens + server.service.num_coming_tokens)


def test_a_burst_cannot_pass_the_bound_of_tokens_together(tiny_dir: Path) -> None:
    with RunningServer(tiny_dir, ENGINE, max_num_queued_tokens=100) as server:

        async def tickets() -> int:
            taken = 0
            for _ in range(5):
                ticket = await server.service.admit(None, 1)
                try:
                    ticket.hold_tokens(40)
                    taken += 1
                except QueueFull:
                    ticket.close()
            return taken

        assert asyncio.run(tickets()) == 2  # the engine has heard of none of them


def test_https_and_the_access_log(tiny_dir: Path) -> None:
    pem = str(Path(__file__).parent / "localhost.pem")
    flags = ["--ssl-certfile", pem, "--access-log", "--disable-access-log-for-endpoints", "/health"]
    flags += ["--log-stats-interval", "0.05"]
    process = ServerProcess(tiny_dir, *flags)
    try:
        assert process.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=pem)
        for path in ("/health?x=1", "/version"):
            assert httpx.get(process.url + path, verify=context, timeout=60).status_code == 200
        body = {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True}
        httpx.post(process.url + "/v1/completions", json=body, verify=context, timeout=60).raise_for_status()
        process.wait_for("GET /version")
        process.wait_for("tok/s")
        assert not any("GET /health" in line for line in process.lines)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ssl-keyfile", "k.pem"], "need --ssl-certfile"),
        (["--ssl-certfile", "/nowhere/c.pem"], "/nowhere/c.pem: no such file"),
        (["--chat-template", "/nowhere/t.jinja", "--num-blocks", "4"], "/nowhere/t.jinja"),
    ],
)
def test_files_that_are_not_there_are_one_line(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["serve", str(tiny_dir), "--port", "0", *flags]) == 1
    assert message in capsys.readouterr().err
