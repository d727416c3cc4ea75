# SPDX-License-Identifier: Apache-2.0
"""`fastserve bench throughput|latency|startup`: what they run, and what they report. No timing is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.bench.offline import Stopwatch, cut_prompts
from fastserve.cli import main

MODEL = Path(__file__).resolve().parent.parent / "build/models/smollm2-135m"


def test_prompts_share_exactly_their_prefix() -> None:
    prompts = cut_prompts(list(range(1000)), 3, 5, num_shared=4, offset=10)
    assert prompts[0] == [10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert [prompt[:4] for prompt in prompts] == [prompts[0][:4]] * 3
    assert len({token for prompt in prompts for token in prompt[4:]}) == 15


def test_a_short_text_starts_again() -> None:
    assert cut_prompts([1, 2, 3], 2, 4) == [[1, 2, 3, 1], [2, 3, 1, 2]]


def test_stopwatch_does_not_count_this_process_as_another() -> None:
    with Stopwatch() as watch:
        sum(i * i for i in range(100_000))
    assert watch.seconds > 0
    assert 0 <= watch.others <= 1.05


def test_throughput_reports_cold_and_warm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--num-prompts", "3", "--input-len", "8", "--output-len", "2", "--prefix-len", "40", "--repeat", "1"]
    assert main(["bench", "throughput", str(MODEL), *arguments, "--output-json", str(file)]) == 0
    figures = json.loads(file.read_text())
    for state in ("cold", "warm"):
        one = figures[state]
        assert one["total_tokens_per_s"] == pytest.approx(3 * 50 / one["seconds"])
    assert "warm:" in capsys.readouterr().out


def test_latency_reports_percentiles(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--input-len", "8", "--output-len", "3", "--num-iters", "2", "--num-iters-warmup", "0"]
    assert main(["bench", "latency", str(MODEL), *arguments, "--output-json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert len(figures["latencies"]) == 2
    assert min(figures["latencies"]) <= figures["percentiles"]["50"] <= max(figures["latencies"])


def test_startup_of_a_missing_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "startup", "no-such-folder", "--num-iters", "1"]) == 1
    assert "no-such-folder" in capsys.readouterr().err
