# SPDX-License-Identifier: Apache-2.0
"""`fastserve bench serve`: its figures are those of its definitions, and it measures a real server."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastserve.bench.client import Outcome
from fastserve.bench.report import console, detail, num_good, peaks, result
from fastserve.bench.workload import Codec, arrivals, custom_asks, prefix_repetition_asks, random_asks, sharegpt_asks
from fastserve.cli import main
from fastserve.errors import FastserveError
from serving import RunningServer
from tiny_models import make_tiny_checkpoint

# One answer of three tokens, one of one token, one that failed.
OUTCOMES = [
    Outcome(start=10.0, ttft=0.2, itls=[0.1, 0.3], latency=0.6, num_input=5, num_output=3, text="a b c"),
    Outcome(start=11.5, ttft=0.4, itls=[], latency=0.4, num_input=7, num_output=1, text="a"),
    Outcome(start=10.0, error="HTTP 500", num_input=9),
]


def test_statistics_are_those_of_the_definitions() -> None:
    figures = result(OUTCOMES, 4.0, None, [50, 99])
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (12, 4)
    assert figures["request_throughput"] == 0.5
    assert figures["output_throughput"] == 1.0
    assert figures["total_token_throughput"] == 4.0
    assert figures["mean_ttft_ms"] == pytest.approx(300)
    assert figures["std_ttft_ms"] == pytest.approx(1000 * statistics.pstdev([0.2, 0.4]))
    assert figures["mean_tpot_ms"] == pytest.approx(200)  # (0.6 - 0.2) / 2, of the first only
    assert figures["median_itl_ms"] == pytest.approx(200)
    assert figures["p99_e2el_ms"] == pytest.approx(1000 * np.percentile([0.6, 0.4], 99))
    assert figures["request_goodput"] is None
    shown = console(figures, ["ttft", "e2el"], [99])
    assert "P99 E2EL (ms):" in shown
    assert "ITL" not in shown
    assert {len(line) for line in shown.splitlines()} == {50}
    assert detail(OUTCOMES)["errors"] == ["", "", "HTTP 500"]


@pytest.mark.parametrize(
    ("slos", "good"),
    [
        ({"ttft": 400}, 2),
        ({"ttft": 300}, 1),
        ({"tpot": 199}, 1),  # an answer of one token has no time per token: it counts as 0
        ({"tpot": 200.1, "e2el": 500}, 1),
        ({"ttft": 100, "e2el": 9000}, 0),
    ],
)
def test_a_good_request_meets_every_objective(slos: dict[str, float], good: int) -> None:
    assert num_good(OUTCOMES, slos) == good
    assert result(OUTCOMES, 2.0, slos, [])["request_goodput"] == good / 2


def test_peaks_are_of_one_second() -> None:
    assert peaks(OUTCOMES) == (3.0, 1)
    together = [Outcome(start=0.0, ttft=0.5, itls=[0.1], latency=0.6, num_output=8) for _ in range(4)]
    assert peaks(together) == (32.0, 4)
    assert peaks([]) == (0.0, 0)


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 5.0])
def test_arrivals_hit_the_rate_exactly_and_burstiness_is_their_spread(burstiness: float) -> None:
    times = np.array(arrivals(2000, 50.0, burstiness, seed=1))
    assert times[-1] == pytest.approx(2000 / 50)
    gaps = np.diff(times, prepend=0.0)
    assert (gaps >= 0).all()
    spread = float(gaps.std() / gaps.mean())  # of a gamma distribution: 1 / sqrt(shape)
    assert spread == pytest.approx(burstiness**-0.5, rel=0.1)
    assert arrivals(3, float("inf"), 1.0, 0) == [0.0] * 3


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_a_ramp_ends_faster_than_it_begins(kind: str) -> None:
    times = np.array(arrivals(1000, float("inf"), 100.0, 0, (kind, 1.0, 10.0)))
    gaps = np.diff(times)
    assert 1 / gaps[:50].mean() == pytest.approx(1.0, rel=0.3)
    assert 1 / gaps[-50:].mean() == pytest.approx(10.0, rel=0.15)


async def _encode(text: str) -> list[int]:
    return [hash(word) % 10**9 for word in text.split()]


async def _decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


WORDS = Codec(_encode, _decode)


def test_random_prompts_have_the_lengths_that_were_asked_for() -> None:
    asks = asyncio.run(random_asks(WORDS, 50, num_input=20, num_output=10, range_ratio=0.5, num_prefix=7, seed=3))
    lengths = [len(ask.prompt.split()) for ask in asks]
    assert lengths == [ask.num_input for ask in asks]
    assert min(lengths) >= 17
    assert max(lengths) <= 37
    assert len({tuple(ask.prompt.split()[:7]) for ask in asks}) == 1
    assert all(5 <= ask.num_output <= 15 for ask in asks)
    again = asyncio.run(random_asks(WORDS, 50, num_input=20, num_output=10, range_ratio=0.5, num_prefix=7, seed=3))
    assert again == asks
    repeated = asyncio.run(
        prefix_repetition_asks(WORDS, 12, num_prefixes=3, prefix_len=5, suffix_len=4, num_output=2, seed=0)
    )
    prefixes = [tuple(ask.prompt.split()[:5]) for ask in repeated]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [4, 4, 4]


def test_datasets_are_read_and_what_is_wrong_with_them_is_said(tmp_path: Path) -> None:
    talks = [{"conversations": [{"value": "w " * n}, {"value": "v " * 6}]} for n in (2, 5, 5, 2000)]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(talks))
    asks = asyncio.run(sharegpt_asks(WORDS, 10, path, None, 0))
    assert [(ask.num_input, ask.num_output) for ask in asks] == [(5, 6), (5, 6)]
    assert asyncio.run(sharegpt_asks(WORDS, 1, path, 3, 0))[0].num_output == 3
    path.write_text("[1]")
    with pytest.raises(FastserveError, match="ShareGPT"):
        asyncio.run(sharegpt_asks(WORDS, 10, path, None, 0))

    path.write_text('{"prompt": "a b"}\n\n{"prompt": "c", "output_tokens": 9}\n')
    own = asyncio.run(custom_asks(WORDS, 10, path, 4))
    assert [(ask.prompt, ask.num_input, ask.num_output) for ask in own] == [("a b", 2, 4), ("c", 1, 9)]
    path.write_text('{"prompt": "a"}\n{"text": "a"}\n')
    with pytest.raises(FastserveError, match="line 2"):
        asyncio.run(custom_asks(WORDS, 10, path, 4))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    tiny_dir = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    with RunningServer(tiny_dir, {"num_blocks": 64}, served_model_name=["tiny"], api_key=["secret"]) as running:
        yield running


def bench(server: RunningServer, *flags: str) -> int:
    given = ["--base-url", server.url, "--header", "Authorization=Bearer secret", "--disable-tqdm", *flags]
    return main(["bench", "serve", *given])


SHORT = ["--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "5", "--ignore-eos"]


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_a_run_counts_what_the_server_computed(
    server: RunningServer, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def generated() -> float:
        text = server.get("/metrics", headers={"Authorization": "Bearer secret"}).text
        name = "fastserve:generation_tokens_total{"
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    before = generated()
    flags = ["--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json"]
    flags += ["--request-rate", "200", "--max-concurrency", "2", "--goodput", "ttft:1e6", "--metadata", "a=b"]
    assert bench(server, *SHORT, "--backend", backend, *flags) == 0
    assert "Successful requests:" in capsys.readouterr().out
    figures: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
    assert (figures["completed"], figures["failed"], figures["model_id"], figures["a"]) == (6, 0, "tiny", "b")
    assert figures["total_output_tokens"] == 30 == sum(figures["output_lens"])
    assert generated() - before == 35  # the first one is asked once more, before the run
    assert figures["request_goodput"] == figures["request_throughput"]
    assert figures["max_concurrent_requests"] >= 1
    assert len(figures["ttfts"]) == len(figures["queue_times"]) == 6
    assert all(figures["generated_texts"])
    assert {"mean_itl_ms", "median_tpot_ms", "p99_ttft_ms", "std_e2el_ms"} <= figures.keys()
    server.wait_until_empty()


def test_requests_that_fail_are_counted_and_the_status_is_1(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "The quick", "output_tokens": limit} for limit in (3, 4000, 3)]
    path = tmp_path / "asks.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert bench(server, "--dataset-name", "custom", "--dataset-path", str(path)) == 1
    said = capsys.readouterr()
    assert "Failed requests:                         " in said.out
    assert "maximum context length" in said.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--goodput", "tft:3"], "objectives are of ttft"),
        (["--goodput", "ttft"], "ttft:200"),
        (["--percentile-metrics", "x"], "metrics are ttft"),
        (["--metric-percentiles", "101"], "0 to 100"),
        (["--num-prompts", "0"], "at least 1"),
        (["--dataset-name", "custom"], "--dataset-path"),
        (["--header", "x"], "KEY=VALUE"),
        (["--ramp-up-strategy", "linear", *SHORT], "--ramp-up-start-rps"),
        (["--header", "Authorization=Bearer wrong"], "401"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    server: RunningServer, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(server, *flags) == 1
    assert message in capsys.readouterr().err


def test_a_server_that_does_not_come_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--port", "1", "--ready-check-timeout-sec", "0"]) == 1
    assert "is not ready" in capsys.readouterr().err
