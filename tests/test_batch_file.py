# SPDX-License-Identifier: Apache-2.0
"""Batch files: what a line may be, results that survive a kill, and the same answers as from LLM.generate."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastserve import LLM, AsyncLLM, FastserveError, SamplingParams
from fastserve.batch_file import BadLine, ResultsFile, count_lines, parse_line, read_lines, result_line
from fastserve.batch_job import BatchCounts, BatchJob
from fastserve.cli import main
from fastserve.run_batch import _Progress, run_batch
from serving import held, wait_until
from tiny_models import make_tiny_checkpoint

ENGINE: dict[str, Any] = {"block_size": 16, "num_blocks": 24, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(tiny_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_dir, **ENGINE) as llm:
        yield llm


def line(custom_id: object, prompt: object = "The quick brown", url: str = "/v1/completions", **body: object) -> str:
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def chat(custom_id: object, text: str, **body: object) -> str:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "ignore_eos": True, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body})


def run(llm: LLM, folder: Path, lines: list[str], *, resume: bool = False, **options: Any) -> dict[int, dict[str, Any]]:
    """The results by line number; each line has one."""
    (folder / "in.jsonl").write_text("\n".join(lines))
    with open(folder / "in.jsonl", "rb") as source:
        results = ResultsFile(folder / "out.jsonl", resume=resume)
        with BatchJob(llm.loaded, source, results, ["tiny"], **options) as job:
            counts = run_batch(llm, job)
    engine = llm.loaded.engine
    engine.scheduler.check()
    assert engine.stats.num_used_blocks == 0
    found = read_results(folder)
    assert counts.total == counts.completed + counts.failed == len(found)
    assert counts.failed == sum(one["error"] is not None for one in found.values())
    return found


def read_results(folder: Path) -> dict[int, dict[str, Any]]:
    results = [json.loads(text) for text in (folder / "out.jsonl").read_text().split("\n")[:-1]]
    numbered = [(int(one["id"].removeprefix("batch_req_")), one) for one in results]
    assert len(dict(numbered)) == len(numbered), "a line has two results"
    return dict(numbered)


def test_answers_equal_those_of_generate(llm: LLM, tiny_dir: Path, tmp_path: Path) -> None:
    texts = [f"{'one two three four ' * (3 * (i % 3))}{i}" for i in range(12)]
    random = {"temperature": 1.0, "max_tokens": 5, "logprobs": 2}
    found = run(llm, tmp_path, [line(f"id {i}", text, **random) for i, text in enumerate(texts)])
    params = SamplingParams(temperature=1.0, max_tokens=5, logprobs=2, ignore_eos=True)
    with LLM(tiny_dir, **ENGINE) as other:
        expected = other.generate(texts, params, use_tqdm=False)
    cached = 0
    for i, output in enumerate(expected):
        result = found[i + 1]
        assert result["custom_id"] == f"id {i}"
        assert result["error"] is None
        assert result["response"]["status_code"] == 200
        body = result["response"]["body"]
        assert body["object"] == "text_completion"
        assert body["choices"][0]["text"] == output.outputs[0].text
        completion = output.outputs[0]
        pairs = zip(completion.token_ids, completion.logprobs or (), strict=True)
        logprobs = [entry[token].logprob for token, entry in pairs]
        assert body["choices"][0]["logprobs"]["token_logprobs"] == logprobs
        assert body["usage"]["prompt_tokens"] == len(output.prompt_token_ids)
        cached += body["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0


def test_both_endpoints_lists_of_prompts_and_n(llm: LLM, tmp_path: Path) -> None:
    found = run(
        llm,
        tmp_path,
        [chat("a", "Hello"), line("b", ["One", "Two", "Six"], n=2, temperature=1.0), line("c", "Three", echo=True)],
        window_tokens=1,
    )
    body = found[1]["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert [choice["index"] for choice in found[2]["response"]["body"]["choices"]] == [0, 1, 2, 3, 4, 5]
    assert found[3]["response"]["body"]["choices"][0]["text"].startswith("Three")
    assert len({one["response"]["request_id"] for one in found.values()}) == 3


def test_a_bad_line_is_an_error_and_the_others_are_answered(llm: LLM, tmp_path: Path) -> None:
    good = line("good")
    lines = {
        "invalid_json": "{nothing",
        "invalid_line": "[1]",
        "invalid_custom_id": line(7),
        "invalid_method": good.replace("POST", "GET").replace("good", "m"),
        "invalid_body": '{"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": []}',
        "invalid_url": '{"custom_id": "u", "method": "POST", "url": 1, "body": {}}',
        "unknown_field": '{"custom_id": "y", "method": "POST", "url": "/v1/completions", "body": {}, "more": 1}',
        "duplicate_custom_id": good,
        "line_too_long": line("long", "x" * 5000),
    }
    refused = {
        "temperature": line("t", temperature=-1),
        "/v1/embeddings": line("e", url="/v1/embeddings"),
        "does not exist": line("n", model="gpt-4o"),
        "stream": line("s", stream=True),
        "maximum context length": line("l", max_tokens=100000),
        "unknown field": line("f", colour="red"),
    }
    found = run(llm, tmp_path, [good, *lines.values(), "", *refused.values(), line("last")], max_line_bytes=4096)
    assert found[1]["error"] is None
    for number, code in enumerate(lines, 2):
        assert found[number]["error"]["code"] == code
        assert found[number]["error"]["line"] == number
        assert found[number]["response"] is None
    for number, text in enumerate(refused, len(lines) + 3):
        assert text in found[number]["error"]["message"]
        assert found[number]["response"]["status_code"] in (400, 404)
        assert found[number]["response"]["body"]["error"]["message"] == found[number]["error"]["message"]
    assert found[max(found)]["custom_id"] == "last"
    assert found[max(found)]["error"] is None
    # Everything has a result, the failures too: there is nothing left to do.
    before = (tmp_path / "out.jsonl").read_bytes()
    run(llm, tmp_path, [good, *lines.values(), "", *refused.values(), line("last")], max_line_bytes=4096, resume=True)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_an_empty_batch_has_no_results(llm: LLM, tmp_path: Path) -> None:
    assert run(llm, tmp_path, []) == {}
    (tmp_path / "out.jsonl").unlink()
    assert run(llm, tmp_path, ["", "  ", ""]) == {}


@pytest.mark.parametrize("keep", ["whole lines", "half a line", "a torn line"])
def test_resume_repeats_nothing_and_loses_nothing(llm: LLM, tmp_path: Path, keep: str) -> None:
    lines = [line(f"{i}", f"{'again and again ' * (i % 4)}{i}", temperature=1.0) for i in range(20)]
    whole = run(llm, tmp_path, lines, window_tokens=60)
    text = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    rest = {"whole lines": b"", "half a line": text[7][:30], "a torn line": b"\0" * 40 + b"\n"}[keep]
    (tmp_path / "out.jsonl").write_bytes(b"".join(text[:7]) + rest)
    again = run(llm, tmp_path, lines, window_tokens=60, resume=True)
    assert (tmp_path / "out.jsonl").read_bytes().startswith(b"".join(text[:7]))

    def choices(results: dict[int, dict[str, Any]]) -> dict[str, Any]:
        return {one["custom_id"]: one["response"]["body"]["choices"] for one in results.values()}

    assert choices(again) == choices(whole)  # drawn with the same seeds, whatever ran before


def test_a_request_that_fails_is_an_error_of_its_line(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = llm.loaded.runner
    compute, calls = runner.run, 0

    def broken(plan: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("the device failed")
        return compute(plan)

    monkeypatch.setattr(runner, "run", broken)
    found = run(llm, tmp_path, [line("a", ["One", "Two"]), *[line(f"{i}", "word " * 60 + str(i)) for i in range(4)]])
    assert {one["error"] is None for one in found.values()} == {True, False}
    failed = next(one for one in found.values() if one["error"])
    assert failed["response"]["status_code"] == 500
    assert "the device failed" in failed["error"]["message"]


def test_results_of_another_batch_are_not_resumed(llm: LLM, tmp_path: Path) -> None:
    run(llm, tmp_path, [line("a"), line("b")])
    with pytest.raises(FastserveError, match="line 2 has another custom_id"):
        run(llm, tmp_path, [line("a"), line("c")], resume=True)


def test_a_results_file_is_never_lost_by_accident(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious\n")
    with pytest.raises(FastserveError, match="--resume goes on"):
        ResultsFile(path)
    path.write_text("precious\n" * 2)
    with pytest.raises(FastserveError, match="line 1 is no result"):
        ResultsFile(path, resume=True)
    assert path.read_text() == "precious\n" * 2
    first = ResultsFile(path, overwrite=True)
    with pytest.raises(FastserveError, match="another process"):
        ResultsFile(path, overwrite=True)
    first.add(result_line(3, "\ud800", status=None, request_id="", body=None, error={"code": "x"}))
    assert path.read_bytes() == b""
    first.sync()
    first.close()
    assert json.loads(path.read_bytes())["custom_id"] == "\ud800"
    again = ResultsFile(path, resume=True)
    assert again.done.has(3, "\ud800")
    assert not again.done.has(2, "a")
    assert (again.done.num_done, again.done.num_failed) == (1, 1)
    again.close()


def test_an_interrupted_sync_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    results = ResultsFile(path)
    texts = [result_line(i, f"{i}", status=200, request_id="", body={}) for i in (1, 2, 3)]
    results.add(texts[0])
    results.sync()
    for text in texts[1:]:
        results.add(text)
    with monkeypatch.context() as patch:

        def interrupted(file: int) -> None:
            raise KeyboardInterrupt

        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            results.sync()
    results.sync()
    results.sync()
    results.close()
    assert path.read_bytes() == b"".join(texts)


def test_a_job_runs_on_an_async_engine(llm: LLM, tiny_dir: Path, tmp_path: Path) -> None:
    lines = [line(f"{i}", f"{'so many words ' * (4 * (i % 3))}{i}", temperature=1.0, n=1 + i % 2) for i in range(12)]
    expected = run(llm, tmp_path, lines)

    async def answer(engine: AsyncLLM, job: BatchJob) -> None:
        async def one(prompt: Any) -> None:
            stream = engine.generate(
                {"prompt_token_ids": list(prompt.token_ids)}, prompt.params, priority=prompt.priority,
                cache_salt=prompt.cache_salt, index=prompt.index, shared_prefix=prompt.shared_prefix,
            )  # fmt: skip
            async for output in stream:
                job.take(prompt, output)
                job.sync()

        tasks = []
        while (prompt := await asyncio.to_thread(job.next)) is not None:
            tasks.append(asyncio.ensure_future(one(prompt)))
        await asyncio.gather(*tasks)
        engine.end_batch(job.prefixes())

    with AsyncLLM(tiny_dir, **ENGINE) as engine, open(tmp_path / "in.jsonl", "rb") as source:
        results = ResultsFile(tmp_path / "out.jsonl", overwrite=True)
        with BatchJob(engine.loaded, source, results, ["tiny"], window_tokens=40) as job:
            asyncio.run(answer(engine, job))
    found = read_results(tmp_path)
    assert found.keys() == expected.keys()
    for number, result in found.items():
        assert result["response"]["body"]["choices"] == expected[number]["response"]["body"]["choices"]
    assert engine.loaded.engine.stats.num_used_blocks == 0


def test_long_lines_take_no_memory(tmp_path: Path) -> None:
    class Counting(io.BytesIO):
        largest = 0

        def readline(self, size: int | None = -1) -> bytes:
            text = super().readline(size)
            self.largest = max(self.largest, len(text))
            return text

    source = Counting(b"a\n" + b"x" * 5_000_000 + b"\n\n \t\r\n" + b"y" * 100 + b"\nb" + b"z" * 3_000_000)
    lines = list(read_lines(source, 100))
    assert [(one.number, one.index, one.text and one.text[:1]) for one in lines] == [
        (1, 0, b"a"), (2, 1, None), (5, 2, b"y"), (6, 3, None),
    ]  # fmt: skip
    assert source.getvalue()[lines[2].offset :].startswith(b"yyy")
    assert source.largest <= 2**20
    assert count_lines(source) == 6
    with pytest.raises(BadLine, match="longer than 100 bytes"):
        parse_line(None, 100)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(BadLine, match="nested too deeply"):
        parse_line(b'{"custom_id": ' + b"[" * 200_000)
    with pytest.raises(BadLine, match="not UTF-8"):
        parse_line(b"\xff")


def test_memory_of_a_job_is_bounded_by_its_window(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(line(f"{i}", [5, 6, 7, i % 9]) for i in range(60)))
    results = ResultsFile(tmp_path / "out.jsonl")
    with (
        open(tmp_path / "in.jsonl", "rb") as source,
        BatchJob(llm.loaded, source, results, ["t"], window_tokens=12) as job,
    ):
        counts = []
        while job.next() is not None:
            counts.append(job.counts.total)
        assert counts == [3 * (i // 3) + 3 for i in range(60)]
        assert not job.has_more


def test_killed_job_resumes_where_it_was(tiny_dir: Path, tmp_path: Path) -> None:
    lines = [line(f"{i}", f"{'the same words ' * 5}{i % 7} {i}", max_tokens=40, temperature=1.0) for i in range(300)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    code = held(400, tmp_path / "never") + "\nimport sys; from fastserve.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "run-batch", "-i", "in.jsonl", "-o", "out.jsonl"]
    command += [str(tiny_dir), "--max-num-seqs", "4", "--num-threads", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    out = tmp_path / "out.jsonl"
    wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 20)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = out.read_bytes()
    num_before = before.count(b"\n")
    assert 20 <= num_before < 300
    common = ["run-batch", "-i", str(tmp_path / "in.jsonl"), str(tiny_dir)]
    assert main([*common, "-o", str(out)]) == 1  # it has content
    assert main([*common, "-o", str(out), "--resume"]) == 0
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert main([*common, "-o", str(tmp_path / "other.jsonl")]) == 0
    resumed = read_results(tmp_path)
    out.write_bytes((tmp_path / "other.jsonl").read_bytes())
    uninterrupted = read_results(tmp_path)
    assert resumed.keys() == uninterrupted.keys() == set(range(1, 301))
    for number, result in resumed.items():
        other = uninterrupted[number]
        assert result["custom_id"] == other["custom_id"] == str(number - 1)
        assert result["response"]["body"]["choices"] == other["response"]["body"]["choices"]


def test_the_bar_tells_rates_the_time_left_and_what_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    counts = BatchCounts(20, 4, 1, 1000, 400, 300, planned_tokens=2000, shareable_tokens=900)
    with _Progress(20, BatchCounts(0, 0, 0, 0, 0, 0, 0, 0)) as progress:
        time.sleep(0.15)  # a bar is not drawn more often
        progress.show(counts)
    last = terminal.getvalue().rpartition("\r")[2]
    assert re.search(
        r"5/20 \[\d\d:\d\d<\d\d:\d\d, .*in \d+ tok/s, out \d+ tok/s, 40% of the prompts shared \(at best 45%\)", last
    )


def test_the_command_tells_by_its_status_whether_lines_failed(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    batch.write_text(line("a", model=tiny_dir.name) + "\n" + line("a"))
    assert main(["run-batch", "-i", str(batch), "-o", str(out), "--model", str(tiny_dir)]) == 1
    assert "1 lines answered, 1 failed" in capsys.readouterr().err
    assert main(["run-batch", "-i", str(batch), "-o", str(batch), str(tiny_dir), "--overwrite"]) == 1
    assert "cannot be both" in capsys.readouterr().err
    assert batch.stat().st_size
    assert main(["run-batch", "-i", str(batch), "-o", str(out)]) == 2
