# SPDX-License-Identifier: Apache-2.0
"""`fastserve bench throughput|latency|startup`: what they run, and what they report. No timing is judged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastserve.bench import offline
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


def test_stopwatch_counts_what_others_took_and_not_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = {"busy_seconds": [10.0, 14.0], "own_seconds": [1.0, 4.0]}  # 1 s of the machine's 2 x 2 s
    for name, values in readings.items():
        monkeypatch.setattr(offline, name, iter(values).__next__)
    monkeypatch.setattr(offline, "time", SimpleNamespace(perf_counter=iter([5.0, 7.0]).__next__))
    monkeypatch.setattr(offline, "os", SimpleNamespace(cpu_count=lambda: 2))
    with Stopwatch() as watch:
        pass
    assert watch.seconds == 2.0
    assert watch.others == 0.25


@pytest.mark.parametrize(("busy", "share"), [(0.0, 0.0), (1.0, 1.0)])  # a tick too few, a tick too many
def test_stopwatch_gives_a_share(monkeypatch: pytest.MonkeyPatch, busy: float, share: float) -> None:
    monkeypatch.setattr(offline, "busy_seconds", iter([0.0, busy]).__next__)
    monkeypatch.setattr(offline, "own_seconds", iter([0.0, 0.5 - busy / 2]).__next__)
    monkeypatch.setattr(offline, "time", SimpleNamespace(perf_counter=iter([0.0, 0.1]).__next__))
    with Stopwatch() as watch:
        pass
    assert watch.others == share


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


def test_startup_tells_memory_apart(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--num-iters", "1", "--kv-cache-memory-bytes", str(100 << 20), "--output-json", str(file)]
    assert main(["bench", "startup", str(MODEL), *arguments]) == 0
    one = json.loads(file.read_text())["runs"][0]
    assert one["kv_bytes"] == pytest.approx(100 << 20, rel=0.01)
    assert one["weight_bytes"] == pytest.approx(
        (MODEL / "model.safetensors").stat().st_size + 49152 * 576 * 2, rel=0.01
    )
    assert one["peak_bytes"] == one["weight_bytes"] + one["kv_bytes"] + one["other_bytes"]
    assert one["other_bytes"] < 300e6 or torch.backends.cuda.is_built()  # whose libraries are larger
    assert one["seconds"] > one["import_s"] + one["load_s"] + one["first_token_s"] > 0


def test_startup_of_a_missing_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "startup", "no-such-folder", "--num-iters", "1"]) == 1
    assert "no-such-folder" in capsys.readouterr().err
