# SPDX-License-Identifier: Apache-2.0
"""What a simulation came to: a summary, and a timeline that Perfetto and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fastserve.simulate.simulation import Simulation

MICROSECONDS = 1e6
COSTS = ("linear", "prefill_attention", "decode_attention", "head", "launch")


def summarize(run: Simulation) -> dict[str, Any]:
    """All figures as JSON values. Times are seconds of the virtual clock unless the name says otherwise."""
    requests, steps = run.requests, run.steps
    prompt, cached, output = sum(requests.prompt_tokens), sum(requests.cached_tokens), sum(requests.output_tokens)
    span = max(run.makespan_s, 1e-12)
    seconds = np.array(steps.seconds)
    used = np.array(steps.num_used_blocks) / run.stats.num_blocks
    arrival, first, last = (
        np.array(column) for column in (requests.arrival_s, requests.first_token_s, requests.last_token_s)
    )
    more = np.array(requests.output_tokens) > 1
    tpot = (last - first)[more] / (np.array(requests.output_tokens)[more] - 1)
    return {
        "gpu": run.cost.gpu.name,
        "model": run.cost.model.name,
        "config": {name: value for name, value in asdict(run.config).items() if value is not None},
        "num_blocks": run.stats.num_blocks,
        "requests": len(requests),
        "refused": run.num_refused,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "makespan_s": run.makespan_s,
        "requests_per_s": len(requests) / span,
        "tokens_per_s": (prompt + output) / span,
        "output_tokens_per_s": output / span,
        "steps": len(steps),
        "tokens_per_step": run.stats.num_computed_tokens / max(len(steps), 1),
        "computed_tokens": run.stats.num_computed_tokens,
        "cached_prompt_tokens": cached,
        "cached_share": cached / max(prompt, 1),
        "preemptions": run.stats.num_preemptions,
        "preemptions_per_request": run.stats.num_preemptions / max(len(requests), 1),
        "memory_mean": float(np.average(used, weights=seconds)) if len(steps) else 0.0,
        "memory_peak": run.stats.peak_used_blocks / run.stats.num_blocks,
        "ttft_s": percentiles(first - arrival),
        "tpot_s": percentiles(tpot),
        "itl_s": gap_percentiles(run),
        "latency_s": percentiles(last - arrival),
        "step_s": percentiles(seconds),
        "time_share": {name: sum(getattr(steps, f"{name}_s")) / span for name in COSTS},
        "idle_share": 1 - float(seconds.sum()) / span,
        "wall_s": run.wall_s,
    }


def percentiles(values: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """Mean, p50, p90, p99 and maximum; empty without values. `weights` count equal values."""
    if len(values) == 0:
        return {}
    order = np.argsort(values)
    values = values[order]
    weights = np.ones(len(values)) if weights is None else weights[order]
    below = np.cumsum(weights)
    figures = {"mean": float(np.average(values, weights=weights))}
    for percent in (50, 90, 99):
        figures[f"p{percent}"] = float(values[np.searchsorted(below, percent / 100 * below[-1])])
    return figures | {"max": float(values[-1])}


def gaps(run: Simulation) -> tuple[np.ndarray, np.ndarray]:
    """Times between neighbouring tokens of a request, and how often each occurred."""
    steps = run.steps
    counts = np.array(steps.num_steady, dtype=float)
    some = counts > 0
    values = np.concatenate([np.array(steps.seconds)[some], np.array(steps.late_gaps_s)])
    return values, np.concatenate([counts[some], np.ones(len(steps.late_gaps_s))])


def gap_percentiles(run: Simulation) -> dict[str, float]:
    return percentiles(*gaps(run))


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""

    def times(name: str) -> str:
        figures = summary[f"{name}_s"]
        return "  ".join(f"{key} {_time(figures[key])}" for key in ("mean", "p50", "p99", "max")) if figures else "-"

    s = summary
    shares = "  ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in s["time_share"].items())
    refused = f"; {s['refused']} refused: longer than the model or the memory allows" if s["refused"] else ""
    rows = [
        ("on", f"{s['model']}, {s['gpu']}, {s['num_blocks']} blocks of {s['config']['block_size']} tokens"),
        ("requests", f"{s['requests']} in {_time(s['makespan_s'])}, {s['requests_per_s']:.2f} per second{refused}"),
        ("throughput", f"{s['tokens_per_s']:.0f} tokens/s, {s['output_tokens_per_s']:.0f} of them output"),
        ("prompts", f"{s['prompt_tokens']} tokens, {s['cached_share']:.1%} of them from the prefix cache"),
        ("steps", f"{s['steps']} of {s['tokens_per_step']:.1f} tokens; {times('step')}"),
        ("memory", f"{s['memory_mean']:.1%} on average, {s['memory_peak']:.1%} at most"),
        ("preemptions", f"{s['preemptions']}, {s['preemptions_per_request']:.2f} per request"),
        ("TTFT", times("ttft")),
        ("TPOT", times("tpot")),
        ("ITL", times("itl")),
        ("latency", times("latency")),
        ("time goes to", f"{shares}  idle {max(s['idle_share'], 0):.0%}"),
    ]
    return "\n".join(f"{name:>12}  {text}" for name, text in rows)


def _time(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def write_trace(run: Simulation, path: Path, max_steps: int = 100_000, max_requests: int = 2000) -> None:
    """The timeline in the Trace Event Format (JSON): the first `max_steps` steps, counters of batch and memory, and the
    requests that ended first, with their time in the queue, to the first token, and to the last. 650 bytes a step:
    viewers hold a timeline in memory."""
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for number, name in ((1, "engine"), (2, "requests")):
            _event(file, {"ph": "M", "pid": number, "name": "process_name", "args": {"name": name}})
        _event(file, {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "steps"}})
        num_steps = min(len(run.steps), max_steps)
        _write_steps(run, file, num_steps)
        whole = num_steps == len(run.steps)
        until = run.makespan_s if whole else run.steps.begin_s[num_steps]
        _write_requests(run, file, max_requests, until)
        name = "end" if whole else f"{len(run.steps) - num_steps} more steps are left out"
        end = {"ph": "i", "pid": 1, "tid": 1, "s": "t", "name": name, "ts": _whole(until)}
        file.write(json.dumps(end) + "\n]}\n")


def _write_steps(run: Simulation, file: TextIO, num_steps: int) -> None:
    steps = run.steps
    for i in range(num_steps):
        at = _whole(steps.begin_s[i])
        arguments = {f"{name}_us": round(getattr(steps, f"{name}_s")[i] * MICROSECONDS, 1) for name in COSTS}
        arguments |= {"tokens": steps.num_tokens[i], "preempted": steps.num_preempted[i]}
        name = f"{steps.num_decodes[i]} decodes + {steps.num_chunks[i]} chunks"
        step = {"ph": "X", "pid": 1, "tid": 1, "name": name, "ts": at, "args": arguments}
        _event(file, step | {"dur": _whole(steps.begin_s[i] + steps.seconds[i]) - at})
        decodes = steps.num_decodes[i]
        counters = {
            "tokens": {"decode": decodes, "prefill": steps.num_tokens[i] - decodes},
            "requests": {"running": steps.num_running[i], "waiting": steps.num_waiting[i]},
            "memory %": {"used": round(100 * steps.num_used_blocks[i] / run.stats.num_blocks, 2)},
        }
        for counter, values in counters.items():
            _event(file, {"ph": "C", "pid": 1, "name": counter, "ts": at, "args": values})


def _write_requests(run: Simulation, file: TextIO, max_requests: int, until: float) -> None:
    log = run.requests
    for i in range(min(len(log), max_requests)):
        if log.last_token_s[i] > until:
            break  # they are in the order in which they ended
        times: Sequence[float] = (log.arrival_s[i], log.first_scheduled_s[i], log.first_token_s[i], log.last_token_s[i])
        for phase, begin, end in zip(("queue", "prompt", "output"), times, times[1:], strict=False):
            common = {"pid": 2, "tid": 1, "cat": "request", "id2": {"local": str(i)}, "name": phase}
            counts = {"prompt": log.prompt_tokens[i], "cached": log.cached_tokens[i], "output": log.output_tokens[i]}
            _event(file, common | {"ph": "b", "ts": _whole(begin), "args": counts})
            _event(file, common | {"ph": "e", "ts": _whole(end)})


def _whole(seconds: float) -> int:
    """Microseconds. With fractions one step overlaps the next by a rounding error, and viewers drop it."""
    return round(seconds * MICROSECONDS)


def _event(file: TextIO, event: dict[str, Any]) -> None:
    file.write(json.dumps(event) + ",\n")
