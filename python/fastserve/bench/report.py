# SPDX-License-Identifier: Apache-2.0
"""The outcomes of a benchmark as figures: the JSON keys and the console report of `vllm bench serve`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastserve.bench.client import Outcome

METRICS = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
WIDTH = 50


def samples(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Seconds of every metric over the requests that succeeded. Answers of one token have no TPOT."""
    done = [one for one in outcomes if not one.error]
    return {
        "ttft": [one.ttft for one in done if one.ttft is not None],
        "tpot": [tpot for one in done if (tpot := one.tpot) is not None],
        "itl": [gap for one in done for gap in one.itls],
        "e2el": [one.latency for one in done],
    }


def num_good(outcomes: Sequence[Outcome], slos_ms: dict[str, float]) -> int:
    """Requests that met every one of the objectives; an answer of one token has a TPOT of 0 here."""
    good = 0
    for one in outcomes:
        took = {"ttft": one.ttft or 0.0, "tpot": one.tpot or 0.0, "e2el": one.latency}
        good += not one.error and all(1000 * took[name] <= limit for name, limit in slos_ms.items())
    return good


def peaks(outcomes: Sequence[Outcome]) -> tuple[float, int]:
    """The most tokens in one second of the run, and the most requests that were open in one second."""
    done = [one for one in outcomes if not one.error]
    if not done:
        return 0.0, 0
    begin = min(one.start for one in done)
    seconds = int(max(one.start + one.latency for one in done) - begin) + 1
    tokens, is_open = np.zeros(seconds), np.zeros(seconds, int)
    for one in done:
        is_open[int(one.start - begin) : int(one.start + one.latency - begin) + 1] += 1
        if one.ttft is None:
            continue
        times = one.start + one.ttft - begin + np.concatenate([[0.0], np.cumsum(one.itls)])
        share = one.num_output / len(times)  # a piece may be more than one token
        np.add.at(tokens, np.minimum(times.astype(int), seconds - 1), share)
    return float(tokens.max()), int(is_open.max())


def result(
    outcomes: Sequence[Outcome], duration: float, slos_ms: dict[str, float] | None, percentiles: Sequence[float]
) -> dict[str, Any]:
    """Every figure under vLLM's keys. Times of lists are in seconds, times of statistics in milliseconds."""
    done = [one for one in outcomes if not one.error]
    num_input, num_output = sum(one.num_input for one in done), sum(one.num_output for one in done)
    tokens_per_s, num_open = peaks(outcomes)
    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration,
        "request_goodput": num_good(outcomes, slos_ms) / duration if slos_ms else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "max_output_tokens_per_s": tokens_per_s,
        "max_concurrent_requests": num_open,
    }
    for name, values in samples(outcomes).items():
        ms = 1000 * np.array(values or [0.0])
        figures[f"mean_{name}_ms"] = float(ms.mean())
        figures[f"median_{name}_ms"] = float(np.median(ms))
        figures[f"std_{name}_ms"] = float(ms.std())
        for percentile in percentiles:
            figures[f"p{percentile:g}_{name}_ms"] = float(np.percentile(ms, percentile))
    return figures


def detail(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What happened to each request, in the order of arrival."""
    return {
        "input_lens": [one.num_input for one in outcomes],
        "output_lens": [one.num_output for one in outcomes],
        "ttfts": [one.ttft or 0.0 for one in outcomes],
        "itls": [one.itls for one in outcomes],
        "latencies": [one.latency for one in outcomes],
        "start_times": [one.start for one in outcomes],
        "queue_times": [one.queue_time for one in outcomes],
        "generated_texts": [one.text for one in outcomes],
        "errors": [one.error for one in outcomes],
    }


def console(figures: dict[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The report for people."""

    def row(label: str, value: float | int) -> str:
        shown = f"{value:d}" if isinstance(value, int) else f"{value:.2f}"
        return f"{label:<40}{shown:>10}"

    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    lines += [
        row("Successful requests:", figures["completed"]),
        row("Failed requests:", figures["failed"]),
        row("Benchmark duration (s):", figures["duration"]),
        row("Total input tokens:", figures["total_input_tokens"]),
        row("Total generated tokens:", figures["total_output_tokens"]),
        row("Request throughput (req/s):", figures["request_throughput"]),
    ]
    if figures["request_goodput"] is not None:
        lines.append(row("Request goodput (req/s):", figures["request_goodput"]))
    lines += [
        row("Output token throughput (tok/s):", figures["output_throughput"]),
        row("Peak output token throughput (tok/s):", figures["max_output_tokens_per_s"]),
        row("Peak concurrent requests:", figures["max_concurrent_requests"]),
        row("Total token throughput (tok/s):", figures["total_token_throughput"]),
    ]
    for name in metrics:
        title, short = METRICS[name]
        lines += [
            f"{title:-^{WIDTH}}",
            row(f"Mean {short} (ms):", figures[f"mean_{name}_ms"]),
            row(f"Median {short} (ms):", figures[f"median_{name}_ms"]),
        ]
        lines += [row(f"P{one:g} {short} (ms):", figures[f"p{one:g}_{name}_ms"]) for one in percentiles]
    return "\n".join([*lines, "=" * WIDTH])
