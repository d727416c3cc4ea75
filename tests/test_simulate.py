# SPDX-License-Identifier: Apache-2.0
"""The simulated engine: its cost model against published measurements, its workloads, its outputs, and what the
schedulers are compared by."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest

from fastserve.cli import main
from fastserve.config import EngineConfig
from fastserve.errors import InvalidRequest
from fastserve.simulate.budget import choose_budget
from fastserve.simulate.cost import CostModel
from fastserve.simulate.hardware import GPUS, MODELS, find_gpu, find_model
from fastserve.simulate.report import percentiles, summarize, table, write_trace
from fastserve.simulate.simulation import simulate
from fastserve.simulate.workload import Arrival, Synthetic, parse_lengths, read_trace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import scheduling_claims

A6000_13B = CostModel(GPUS["a6000"], MODELS["llama-13b"])


@pytest.mark.parametrize("point", scheduling_claims.PUBLISHED, ids=lambda point: point.what)
def test_the_cost_model_is_within_a_fifth_of_what_was_measured(point: scheduling_claims.Published) -> None:
    assert abs(point.error()) <= 0.2


def test_tiles_are_paid_for_in_whole() -> None:
    """One token more than a tile costs a tile more, and few tiles cost as much as one on each multiprocessor."""
    linear = A6000_13B.linear_seconds
    assert linear(257) / linear(256) > 1.25
    assert linear(257) == pytest.approx(linear(384), rel=0.02)
    assert linear(64) == pytest.approx(linear(128), rel=0.02)
    many_sms = replace(GPUS["a6000"], num_sms=10**6)
    assert CostModel(many_sms, MODELS["llama-13b"]).linear_seconds(256) > 10 * linear(256)


@pytest.mark.parametrize(("gpu", "model"), [("a6000", "llama-13b"), ("a100", "llama-3-8b"), ("h100", "llama-3-8b")])
def test_the_budget_is_the_least_with_nearly_the_full_rate(gpu: str, model: str) -> None:
    cost = CostModel(GPUS[gpu], MODELS[model])
    budget = choose_budget(cost)

    def rate(tokens: int) -> float:
        return tokens / cost.step([(tokens, 1024)], 0, 0, 1).total

    rates = {tokens: rate(tokens) for tokens in range(128, 4097, 128)}
    assert rates[budget] >= 0.95 * max(rates.values())
    assert all(rates[smaller] < 0.95 * max(rates.values()) for smaller in rates if smaller < budget)


def test_a_step_takes_the_longer_of_bytes_and_arithmetic() -> None:
    cost = CostModel(GPUS["a100"], MODELS["llama-3-8b"])
    one, many = cost.linear_seconds(1), cost.linear_seconds(4096)
    weights = sum(a * b for a, b in MODELS["llama-3-8b"].linears) * 32
    assert one == pytest.approx(2 * weights / (GPUS["a100"].bandwidth * 0.68), rel=0.01)
    assert many == pytest.approx(2 * weights * 4096 / (GPUS["a100"].flops * 0.79), rel=0.01)
    int4 = CostModel(GPUS["a100"], replace(MODELS["llama-3-8b"], weight_bits=4.125))
    assert one / int4.linear_seconds(1) == pytest.approx(16 / 4.125, rel=0.02)
    assert int4.linear_seconds(4096) == pytest.approx(many, rel=1e-4)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="a100"):
        find_gpu("b9000")
    with pytest.raises(InvalidRequest, match="llama-3-8b"):
        find_model("no-such-model")
    assert find_gpu("312:2.04:80:108").bandwidth == 2.04e12
    with pytest.raises(InvalidRequest, match="24 GB"):
        MODELS["llama-33b"].blocks_on(GPUS["a10"], 16)


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [("7", 7, 7, 7), ("10-20", 10, 20, 15), ("exponential:100", 1, 2000, 100), ("lognormal:100:0.5", 1, 2000, 113)],
)
def test_lengths_have_the_distribution_asked_for(text: str, low: int, high: int, mean: float) -> None:
    draw, random = parse_lengths(text), Random(0)
    drawn = [draw(random) for _ in range(4000)]
    assert low <= min(drawn) <= max(drawn) <= high
    assert np.mean(drawn) == pytest.approx(mean, rel=0.06)


@pytest.mark.parametrize("text", ["", "0", "9-3", "x", "1-2-3", "lognormal:5", "exponential:0", "normal:3", "1e9"])
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="LOW-HIGH"):
        parse_lengths(text)


def test_a_trace_is_read_with_its_shared_beginnings(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"arrival_s": 0, "prompt_tokens": 50, "output_tokens": 3, "prefix": "a", "prefix_tokens": 40},
        {
            "arrival_s": 1.5,
            "prompt_tokens": 60,
            "output_tokens": 3,
            "max_tokens": 9,
            "prefix": "a",
            "prefix_tokens": 40,
        },
        {"timestamp": 2000, "input_length": 1100, "output_length": 7, "hash_ids": [5, 6]},
        {"timestamp": 2500, "input_length": 1000, "output_length": 7, "hash_ids": [5, 7]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second, third, fourth = read_trace(path)
    assert first.token_ids()[:40] == second.token_ids()[:40] != third.token_ids()[:40]
    assert first.token_ids()[40] != second.token_ids()[40]
    assert (second.prompt_tokens, second.output_tokens, second.max_tokens, second.arrival_s) == (60, 3, 9, 1.5)
    assert third.token_ids()[:512] == fourth.token_ids()[:512]
    assert third.token_ids()[512] != fourth.token_ids()[512]
    assert (third.prompt_tokens, fourth.prompt_tokens) == (1100, 1000)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"arrival_s": 0, "prompt_tokens": 5}', "'output_tokens' is missing"),
        ('{"arrival_s": 0, "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens=0"),
        ('{"arrival_s": -1, "prompt_tokens": 5, "output_tokens": 1}', "arrival_s=-1"),
        ('{"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 1, "prefix": "a", "prefix_tokens": 6}', "at most"),
        ('{"arrival_s": 9, "prompt_tokens": 5, "output_tokens": 1}\n{"arrival_s": 8, "prompt_tokens": 5, '
         '"output_tokens": 1}', "line 2: arrives before"),
        ("[1]", "line 1"),
        ("{", "line 1"),
    ],
)  # fmt: skip
def test_a_wrong_line_of_a_trace_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(InvalidRequest, match=message):
        list(read_trace(path))


def test_a_lone_request_takes_the_time_of_its_steps() -> None:
    config = EngineConfig(max_num_batched_tokens=512, block_size=16, num_blocks=200)
    run = simulate([Arrival(2.0, ((1, 700),), 3, 3)], A6000_13B, config)
    parts = [
        A6000_13B.step([(512, 0)], 0, 0, 0).total,
        A6000_13B.step([(188, 512)], 0, 0, 1).total,
        A6000_13B.step([], 1, 701, 1).total,
        A6000_13B.step([], 1, 702, 1).total,
    ]
    assert list(run.steps.seconds) == parts
    assert run.requests.first_token_s[0] == pytest.approx(2 + sum(parts[:2]))
    assert run.requests.last_token_s[0] == pytest.approx(2 + sum(parts))
    assert run.requests.output_tokens[0] == 3
    assert summarize(run)["itl_s"]["max"] == pytest.approx(max(parts[2:]))


def test_every_request_gets_exactly_its_output_whatever_the_scheduler() -> None:
    load = Synthetic(60, "1-90", "1-40", max_tokens=40, rate=500, num_prefixes=3, prefix_tokens=40)
    wanted = sorted((arrival.prompt_tokens, arrival.output_tokens) for arrival in load.arrivals())
    config = EngineConfig(max_num_batched_tokens=64, max_num_seqs=16, block_size=4, num_blocks=100)
    ways = [{"separate": True}, {"oracle": True}, {"admission": "aggressive"}, {"admission": "conservative"}]
    ways.append({"batch": True})
    for way in ways:
        if "batch" in way:
            load = replace(load, rate=None)  # the lengths change with it
            wanted = sorted((arrival.prompt_tokens, arrival.output_tokens) for arrival in load.arrivals())
        options = {name: value for name, value in way.items() if name != "admission"}
        run = simulate(
            load.arrivals(), A6000_13B, replace(config, admission=way.get("admission", "past_future")), **options
        )
        got = sorted(zip(run.requests.prompt_tokens, run.requests.output_tokens, strict=True))
        assert got == wanted, way
        summary = summarize(run)
        assert summary["output_tokens"] == sum(output for _, output in wanted)
        assert sum(run.steps.num_steady) + len(run.steps.late_gaps_s) == summary["output_tokens"] - 60
        assert sum(summary["time_share"].values()) + summary["idle_share"] == pytest.approx(1)
        assert (run.stats.num_used_blocks, run.stats.num_running) == (0, 0)


def test_a_batch_is_planned_before_it_starts() -> None:
    load = Synthetic(40, "9", "5", num_prefixes=8, prefix_tokens=64)
    config = EngineConfig(max_num_batched_tokens=64, max_num_seqs=8, block_size=4, num_blocks=60)
    planned, by_arrival = (summarize(simulate(load.arrivals(), A6000_13B, config, batch=b)) for b in (True, False))
    assert planned["cached_prompt_tokens"] == (40 - 8) * 64
    assert by_arrival["cached_prompt_tokens"] < planned["cached_prompt_tokens"] / 2
    with pytest.raises(InvalidRequest, match="beforehand"):
        simulate(replace(load, rate=9).arrivals(), A6000_13B, config, batch=True)


def test_a_fresh_engine_does_not_wait_for_its_first_outputs() -> None:
    """Nothing is known of the lengths but a limit of nearly the whole memory."""
    load = Synthetic(64, "100-300", "exponential:150", max_tokens=8000)
    config = EngineConfig(max_num_batched_tokens=512, block_size=16, num_blocks=512, max_model_len=8192)
    ours, oracle = (simulate(load.arrivals(), A6000_13B, config, oracle=knows) for knows in (False, True))
    assert len(ours.steps) <= 1.1 * len(oracle.steps)
    assert ours.stats.num_preemptions <= 3


def test_separate_steps_never_mix() -> None:
    load = Synthetic(30, "20-90", "2-30", rate=300)
    config = EngineConfig(max_num_batched_tokens=128, max_num_seqs=8, block_size=4, num_blocks=400)
    run = simulate(load.arrivals(), A6000_13B, config, separate=True)
    for decodes, chunks in zip(run.steps.num_decodes, run.steps.num_chunks, strict=True):
        assert not (decodes and chunks)
    with pytest.raises(InvalidRequest, match="max_num_seqs=8"):
        simulate([], A6000_13B, replace(config, max_num_batched_tokens=4), separate=True)


def test_arrivals_wait_outside_a_full_queue() -> None:
    config = EngineConfig(max_num_seqs=2, max_num_queued_requests=3, block_size=4, num_blocks=100)
    run = simulate(Synthetic(40, "9", "5").arrivals(), A6000_13B, config)
    assert len(run.requests) == 40
    assert max(run.steps.num_waiting) <= 3
    assert set(run.requests.arrival_s) == {0.0}


def test_a_request_that_is_too_long_is_refused_and_counted() -> None:
    config = EngineConfig(block_size=4, num_blocks=10)
    load = [Arrival(0, ((number, tokens),), 1, 1) for number, tokens in enumerate((50, 5, 60, 6, 70), 1)]
    summary = summarize(simulate(load, A6000_13B, config))
    assert (summary["requests"], summary["refused"]) == (2, 3)
    assert "3 refused" in table(summary)
    assert summarize(simulate(load[:1], A6000_13B, config))["refused"] == 1


def test_a_refused_request_of_a_batch_holds_no_prefix() -> None:
    """Four groups, one member of each too long. What they share is in use until the last of the others has ended."""
    load = [Arrival(0, ((2**30 + g, 16), (4 * g + m, 90 if m == 1 else 2)), 4, 4) for g in range(4) for m in range(4)]
    config = EngineConfig(block_size=4, num_blocks=24, max_num_seqs=3)
    run = simulate(load, A6000_13B, config, batch=True)
    assert (len(run.requests), run.num_refused) == (12, 4)
    assert run.stats.num_used_blocks == 0


def test_percentiles_count_weights() -> None:
    values, counts = np.array([3.0, 1.0]), np.array([1.0, 99.0])
    figures = percentiles(values, counts)
    assert (figures["p50"], figures["p99"], figures["max"]) == (1.0, 1.0, 3.0)
    assert figures["mean"] == pytest.approx(1.02)
    assert percentiles(np.array([])) == {}


def test_the_command_writes_a_summary_and_a_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "simulate --gpu h100 --model llama-3-8b --requests 20 --prompt-tokens 30-900 --output-tokens 5-20"
    assert main([*arguments.split(), "--rate", "50", "--out", str(tmp_path / "run"), "--no-plots", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert printed["requests"] == 20
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    steps = [event for event in trace if event["ph"] == "X"]
    assert len(steps) == printed["steps"]
    assert all(type(event["ts"]) is int for event in trace if "ts" in event)
    for before, after in pairwise(steps):  # a viewer drops a step that overlaps the one before by a nanosecond
        assert before["ts"] + before["dur"] <= after["ts"]
    assert sum(event["ph"] == "b" for event in trace) == sum(event["ph"] == "e" for event in trace) == 3 * 20
    assert max(event["args"]["used"] for event in trace if event["name"] == "memory %") > 0


def test_a_long_timeline_is_cut_and_says_so(tmp_path: Path) -> None:
    config = EngineConfig(max_num_batched_tokens=64, max_num_seqs=4, block_size=4, num_blocks=100)
    run = simulate(Synthetic(20, "9", "5-9").arrivals(), A6000_13B, config)
    write_trace(run, tmp_path / "trace.json", max_steps=12)
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in trace) == 12
    assert trace[-1]["name"] == f"{len(run.steps) - 12} more steps are left out"
    assert max(event.get("ts", 0.0) for event in trace) == trace[-1]["ts"]
    assert any(event["ph"] == "e" for event in trace)


def test_plots_are_written_or_their_absence_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--gpu", "h100", "--model", "llama-3-8b", "--requests", "9", "--out", str(tmp_path)]
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        assert main(arguments) == 1
        assert "fastserve[plots]" in capsys.readouterr().err
        assert (tmp_path / "trace.json").exists()
    else:
        assert main(arguments) == 0
        assert (tmp_path / "plots.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu none --model llama-3-8b", "known are"),
        ("--gpu a100 --model none", "model folder"),
        ("--gpu a100 --model llama-3-8b --requests 0", "--requests 0"),
        ("--gpu a100 --model llama-3-8b --rate -1", "--rate"),
        ("--gpu a100 --model llama-3-8b --prefixes 3", "--prefix-tokens"),
        ("--gpu a100 --model llama-3-8b --prompt-tokens many", "LOW-HIGH"),
        ("--gpu a100 --model llama-3-8b --weight-bits 0", "--weight-bits"),
        ("--gpu a100 --model llama-3-8b --admission hope", "past_future"),
        ("--gpu a100 --model llama-3-8b --workload nowhere.jsonl", "nowhere.jsonl"),
        ("--gpu a10 --model llama-33b", "smaller model"),
    ],
)
def test_wrong_flags_are_told_what_is_allowed(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *flags.split()]) == 1
    assert message in capsys.readouterr().err


def test_simulating_imports_no_torch() -> None:
    code = (
        "import sys; from fastserve.cli import main\n"
        "assert main('simulate --gpu a100 --model llama-3-8b --requests 3'.split()) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# The claims of bench/scheduling_claims.py, with fewer and shorter requests.


def test_chunks_that_carry_decodes_beat_separate_steps() -> None:
    case = replace(scheduling_claims.SARATHI[0], relative=(0.1, 1.0, 10.0))
    bars = scheduling_claims.sarathi(0.1, [case])
    assert all(bar.holds for bar in bars), [str(bar) for bar in bars]


def test_groups_save_what_an_lru_cache_cannot() -> None:
    bars = scheduling_claims.batchllm(0.05, prefix=400, own=48, output=24)
    assert all(bar.holds for bar in bars), [str(bar) for bar in bars]


def test_predicted_peaks_beat_hope_and_fear() -> None:
    bars = scheduling_claims.past_future(0.1, 16, scheduling_claims.DISTRIBUTIONS[:1])
    assert all(bar.holds for bar in bars), [str(bar) for bar in bars]
