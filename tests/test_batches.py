# SPDX-License-Identifier: Apache-2.0
"""OpenAI's files and batches with the official client: every request is answered once, whatever ends the server."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fastserve import LLM, FastserveError, InvalidRequest, SamplingParams
from fastserve.server.batches import Batches, check_requests
from fastserve.server.errors import ApiError
from fastserve.server.files import FileStore
from serving import RunningServer, ServerProcess, held, wait_until
from tiny_models import make_tiny_checkpoint

ENGINE: dict[str, Any] = {"block_size": 16, "num_blocks": 64, "max_num_batched_tokens": 32, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def server(tiny_dir: Path, tmp_path: Path) -> Iterator[RunningServer]:
    batch_dir = str(tmp_path / "store")
    options: dict[str, Any] = {"batch_dir": batch_dir, "max_file_bytes": 40_000}
    with RunningServer(tiny_dir, ENGINE, served_model_name=["tiny"], **options) as running:
        yield running
        running.wait_until_empty()


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> str:
    body = {"model": "tiny", "max_tokens": 5, "temperature": 0, "ignore_eos": True, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + "\n"


def upload(client: openai.OpenAI, text: str) -> str:
    return client.files.create(file=("asks.jsonl", text.encode()), purpose="batch").id


def start(client: openai.OpenAI, text: str, endpoint: Any = "/v1/completions") -> Any:
    return client.batches.create(input_file_id=upload(client, text), endpoint=endpoint, completion_window="24h")


def run(client: openai.OpenAI, text: str, endpoint: Any = "/v1/completions") -> Any:
    return ended(client, start(client, text, endpoint).id)


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    ends = ("completed", "failed", "cancelled", "expired")
    wait_until(lambda: client.batches.retrieve(batch_id).status in ends)
    return client.batches.retrieve(batch_id)


def lines_of(client: openai.OpenAI, file_id: str) -> list[Any]:
    return [json.loads(one) for one in client.files.content(file_id).text.splitlines()]


def test_answers_are_those_of_generate_in_the_order_of_the_requests(server: RunningServer, tiny_dir: Path) -> None:
    client = server.client()
    asked = [([5 + i] * (40 - i), 1 + i % 7) for i in range(20)]
    text = "".join(line(f"r{i}", prompt=prompt, max_tokens=num) for i, (prompt, num) in enumerate(asked))
    batch = run(client, text)
    assert batch.status == "completed"
    assert batch.request_counts.model_dump() == {"total": 20, "completed": 20, "failed": 0}
    assert batch.error_file_id is None
    answers = lines_of(client, batch.output_file_id)
    assert [one["custom_id"] for one in answers] == [f"r{i}" for i in range(20)]
    with LLM(tiny_dir, **ENGINE) as llm:
        params = [SamplingParams(temperature=0, max_tokens=num, ignore_eos=True) for _, num in asked]
        expected = [
            one.outputs[0].text for one in llm.generate([prompt for prompt, _ in asked], params, use_tqdm=False)
        ]
    assert [one["response"]["body"]["choices"][0]["text"] for one in answers] == expected
    assert {one["response"]["status_code"] for one in answers} == {200}
    assert [one.id for one in client.batches.list().data] == [batch.id]


def test_chats_are_answered_and_bad_requests_go_to_the_error_file(server: RunningServer) -> None:
    client = server.client()
    url, hello = "/v1/chat/completions", [{"role": "user", "content": "Hello"}]
    lines = [line("good", url, messages=hello), line("bad", url, messages=hello, temperature=-1)]
    lines += [line("other", url, messages=hello, model="other"), line("stream", url, messages=hello, stream=True)]
    batch = run(client, "".join(lines), url)
    assert batch.request_counts.model_dump() == {"total": 4, "completed": 1, "failed": 3}
    assert lines_of(client, batch.output_file_id)[0]["response"]["body"]["object"] == "chat.completion"
    errors = lines_of(client, batch.error_file_id)
    assert [(one["custom_id"], one["response"]["status_code"]) for one in errors] == [
        ("bad", 400), ("other", 404), ("stream", 400),
    ]  # fmt: skip
    assert "temperature" in errors[0]["response"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "empty_file"),
        ("{", "invalid_json"),
        ("[" * 3000, "invalid_json"),
        ('{"custom_id": "a"}', "invalid_method"),
        (line("a", prompt="b") * 2, "duplicate_custom_id"),
        (line("a", "/v1/embeddings"), "mismatched_url"),
        (line("", prompt="b"), "invalid_custom_id"),
    ],
)
def test_a_file_that_is_no_batch_fails_the_batch_and_says_where(server: RunningServer, text: str, code: str) -> None:
    batch = run(server.client(), text)
    assert batch.status == "failed"
    assert [one.code for one in batch.errors.data] == [code]


def test_files_are_kept_listed_and_deleted(server: RunningServer) -> None:
    client = server.client()
    ids = [upload(client, line(f"r{i}")) for i in range(3)]
    assert {one.id for one in client.files.list().data} == set(ids)
    assert client.files.retrieve(ids[1]).filename == "asks.jsonl"
    assert client.files.content(ids[1]).text == line("r1")
    assert client.files.delete(ids[1]).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(ids[1])
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id=ids[1], endpoint="/v1/completions", completion_window="24h")
    page = client.files.list(limit=1)
    assert page.has_next_page()
    assert len([one.id for one in page]) == 2


def test_what_is_wrong_with_an_upload_is_said(server: RunningServer) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=b"{}", purpose="fine-tune")
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=b"x" * 41_000, purpose="batch")
    assert caught.value.status_code == 413
    assert server.post("/v1/files", {}).status_code == 415
    url = server.url + "/v1/files"
    assert httpx.post(url, files={"other": b"a"}, data={"purpose": "batch"}, timeout=60).status_code == 400
    foreign = httpx.post(url, files={"file": b"a"}, headers={"Origin": "http://evil.example"}, timeout=60)
    assert foreign.status_code == 403
    for path in ("/v1/files/..%2f..%2fsecret", "/v1/files/file-x/content", "/v1/batches/batch_x"):
        answer = server.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"]
    body = {"input_file_id": "file-" + "0" * 32, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    assert server.post("/v1/batches", body).status_code == 400


def test_a_cancelled_batch_keeps_the_answers_it_has(server: RunningServer) -> None:
    client = server.client()
    gate = threading.Semaphore(40)
    real = server.engine._runner.run
    server.engine._runner.run = lambda plan: (gate.acquire(), real(plan))[1]
    # What decodes most for what it computes goes first: r0 and r1.
    text = "".join(
        line(f"r{i}", prompt=[5 + i] * (1 if i < 2 else 100), max_tokens=2 if i < 2 else 100) for i in range(12)
    )
    try:
        batch = start(client, text)
        server.wait_until(lambda: server.batches.get(batch.id).request_counts["completed"] == 2)
        waiting = start(client, text)
        assert client.batches.cancel(waiting.id).status == "cancelling"
        assert client.batches.cancel(batch.id).status == "cancelling"
    finally:
        gate.release(100_000)
    first, second = ended(client, batch.id), ended(client, waiting.id)
    assert (first.status, second.status) == ("cancelled", "cancelled")
    assert {one["custom_id"] for one in lines_of(client, first.output_file_id)} == {"r0", "r1"}
    assert second.output_file_id is None
    with pytest.raises(openai.BadRequestError, match="ended already"):
        client.batches.cancel(batch.id)


def test_clients_are_answered_while_a_batch_fills_its_half_of_the_places(server: RunningServer) -> None:
    client = server.client()
    text = "".join(line(f"r{i}", prompt=[5 + i % 20], max_tokens=400) for i in range(200))
    batch = start(client, text)
    server.wait_until(lambda: server.engine.num_running == ENGINE["max_num_seqs"] // 2)
    client.completions.create(model="tiny", prompt=[1, 2], max_tokens=3)
    assert client.batches.retrieve(batch.id).status == "in_progress"
    client.batches.cancel(batch.id)
    ended(client, batch.id)


def test_a_shared_prefix_of_a_batch_is_computed_once(server: RunningServer) -> None:
    # Eight groups with prefixes of ten blocks are more than the 64 blocks hold, and they come in turns.
    asked = [[5 + i % 8] * 160 + [40 + i] * 5 for i in range(32)]
    batch = run(server.client(), "".join(line(f"r{i}", prompt=prompt) for i, prompt in enumerate(asked)))
    answers = lines_of(server.client(), batch.output_file_id)
    usages = [one["response"]["body"]["usage"] for one in answers]
    assert sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages) == 8 * 3 * 160
    assert [one["custom_id"] for one in answers] == [f"r{i}" for i in range(32)]


def test_a_prompt_that_the_engine_refuses_holds_no_prefix(server: RunningServer) -> None:
    loaded, engine, held = server.llm.loaded, server.engine, []
    real_prompt, real_check, real_end = loaded.prompt, engine.check_request, engine.end_batch
    jobs = 0  # the first check of each is that of its line

    def prompt(given: Any, **more: Any) -> Any:  # before the engine
        if isinstance(given, dict) and given["prompt_token_ids"][-1] == 9:
            raise InvalidRequest("planted")
        return real_prompt(given, **more)

    def check(token_ids: Any, *args: Any, **more: Any) -> None:  # in the engine
        nonlocal jobs
        jobs += token_ids[-1] == 11
        if token_ids[-1] == 11 and jobs == 2:
            raise InvalidRequest("planted")
        real_check(token_ids, *args, **more)

    def end(prefixes: Any) -> None:
        held.append(engine.scheduler._holds.num_blocks)
        real_end(prefixes)

    loaded.prompt, engine.check_request, engine.end_batch = prompt, check, end
    lines = [line(f"r{i}", prompt=[7] * 64 + [i], n=2, temperature=1.0) for i in (8, 9, 10, 11)]
    batch = run(server.client(), "".join(lines))
    assert batch.request_counts.model_dump() == {"total": 4, "completed": 2, "failed": 2}
    errors = lines_of(server.client(), batch.error_file_id)
    told = [(one["custom_id"], one["error"]["message"], one["response"]["status_code"]) for one in errors]
    assert told == [("r9", "planted", 400), ("r11", "planted", 400)]
    assert held == [0]


def test_requests_without_a_seed_draw_differently_in_each_batch(server: RunningServer) -> None:
    client = server.client()
    text = "".join(line(f"r{i}", prompt=[5], temperature=1.0, max_tokens=32, ignore_eos=True) for i in range(3))
    first, second = (lines_of(client, run(client, text).output_file_id) for _ in range(2))
    texts = [one["response"]["body"]["choices"][0]["text"] for one in first + second]
    assert len(set(texts)) == 6


def test_a_server_without_a_folder_says_how_to_get_one(tiny_dir: Path) -> None:
    with RunningServer(tiny_dir, ENGINE) as server:
        answer = server.get("/v1/files")
        assert answer.status_code == 404
        assert "--batch-dir" in answer.json()["error"]["message"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_batch_outlives_its_server_and_loses_nothing(tiny_dir: Path, tmp_path: Path, number: signal.Signals) -> None:
    # 80 steps end at least 7 of the 60 requests (one at a time, 11 tokens each), and at most 45 (four at a time).
    flags = ["--max-num-seqs", "4", "--batch-dir", str(tmp_path), "--served-model-name", "tiny"]
    first = ServerProcess(tiny_dir, *flags, code=held(80, tmp_path / "go", seconds=0.05))
    try:
        client = openai.OpenAI(base_url=first.url + "/v1", api_key="none", max_retries=0)
        text = "".join(line(f"r{i}", prompt=[5 + i], max_tokens=3 + i % 9) for i in range(60))
        created = start(client, text)
        wait_until(lambda: client.batches.retrieve(created.id).request_counts.completed >= 5)
        first.popen.send_signal(number)
        if number == signal.SIGTERM:
            first.wait_for("SIGTERM")
            (tmp_path / "go").touch()
        status, log = first.end()
        assert status == (0 if number == signal.SIGTERM else -signal.SIGKILL), log
    finally:
        first.kill()
    answers_file = tmp_path / "batches" / f"{created.id}.answers"
    texts = answers_file.read_bytes().splitlines(keepends=True)
    written = {one["custom_id"]: one for one in map(json.loads, texts if texts[-1].endswith(b"\n") else texts[:-1])}
    assert 5 <= len(written) < 60
    with RunningServer(tiny_dir, ENGINE, served_model_name=["tiny"], batch_dir=str(tmp_path)) as server:
        client = server.client()
        batch = ended(client, created.id)
        answers = lines_of(client, batch.output_file_id)
        assert [one["custom_id"] for one in answers] == [f"r{i}" for i in range(60)]
        kept = {one["custom_id"]: one["id"] for one in answers}
        assert {name: kept[name] for name in written} == {name: one["id"] for name, one in written.items()}
        alone = run(client, text)
        again = lines_of(client, alone.output_file_id)
        shown = [one["response"]["body"]["choices"] for one in answers]
        assert shown == [one["response"]["body"]["choices"] for one in again]
        with pytest.raises(FastserveError, match="another server uses"):
            Batches(server.service, tmp_path)


def test_lines_and_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "asks"
    path.write_text(line("a", prompt="x" * 500))
    monkeypatch.setattr("fastserve.server.batches.MAX_LINE_BYTES", 100)

    def problems() -> list[tuple[int, str]]:
        with path.open("rb") as source:
            return [(one["line"], one["code"]) for one in check_requests(source, "/v1/completions")[1]]

    assert problems() == [(1, "line_too_long")]
    monkeypatch.setattr("fastserve.server.batches.MAX_LINE_BYTES", 10_000)
    monkeypatch.setattr("fastserve.server.batches.MAX_REQUESTS", 1)
    path.write_text(line("a") + "\n" + line("b"))
    assert problems() == [(3, "too_many_requests")]
    monkeypatch.setattr("fastserve.server.files.MAX_FILES", 1)
    store = FileStore(tmp_path / "files")
    with path.open("rb") as source:
        store.add(source, "a", "batch")
        with pytest.raises(ApiError, match="delete some"):
            store.add(source, "a", "batch")
