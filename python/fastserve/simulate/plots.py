# SPDX-License-Identifier: Apache-2.0
"""Pictures of a simulation: batch composition, memory, latency. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastserve.errors import FastserveError
from fastserve.simulate.report import COSTS, gaps
from fastserve.simulate.simulation import Simulation

BINS = 240  # of time; a pixel shows the mean of many steps


def write_plots(run: Simulation, path: Path) -> None:
    """One picture of six panels. FastserveError: matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot, ticker
    except ModuleNotFoundError:
        raise FastserveError("plots need matplotlib: pip install 'fastserve[plots]'") from None
    figure, axes = pyplot.subplots(3, 2, figsize=(13, 9.5), layout="constrained")
    figure.suptitle(
        f"{run.cost.model.name} on {run.cost.gpu.name}: {len(run.requests)} requests, {len(run.steps)} steps"
    )
    over_time = {axes[0][0]: _batches, axes[1][0]: _memory, axes[2][0]: _requests, axes[2][1]: _time}
    for axis, draw in over_time.items():
        draw(run, axis)
        axis.set(
            xlabel="time (s)", xlim=(0, run.makespan_s), ylim=(0, 1.2 * axis.get_ylim()[1])
        )  # the legend is on top
    for axis, draw in {axes[0][1]: _latency, axes[1][1]: _gaps}.items():
        draw(run, axis)
        axis.set(xlabel="seconds", ylim=(0, 101), xscale="log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _binned(run: Simulation, *columns: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Means over time bins, weighted with the steps' seconds; 0 where no step begins."""
    begin, seconds = np.array(run.steps.begin_s), np.array(run.steps.seconds)
    edges = np.linspace(0.0, run.makespan_s, min(BINS, len(seconds)) + 1)
    place = np.clip(np.searchsorted(edges, begin, side="right") - 1, 0, len(edges) - 2)
    weight = np.maximum(np.bincount(place, seconds, len(edges) - 1), 1e-12)
    means = [np.bincount(place, seconds * np.array(column), len(edges) - 1) / weight for column in columns]
    return (edges[:-1] + edges[1:]) / 2, means


def _batches(run: Simulation, axis: Any) -> None:
    steps = run.steps
    prefill = np.array(steps.num_tokens) - np.array(steps.num_decodes)
    at, (decodes, chunks) = _binned(run, steps.num_decodes, prefill)
    axis.stackplot(at, decodes, chunks, labels=("decodes", "prompt tokens"))
    axis.axhline(run.config.max_num_batched_tokens, color="black", linestyle=":", linewidth=1, label="budget")
    axis.set(title="Tokens of a step", ylabel="tokens")
    axis.legend(loc="upper left", ncols=3)


def _memory(run: Simulation, axis: Any) -> None:
    at, (used,) = _binned(run, run.steps.num_used_blocks)
    axis.fill_between(at, 100 * used / run.stats.num_blocks, alpha=0.4)
    peak, preempted = run.stats.peak_used_blocks / run.stats.num_blocks, run.stats.num_preemptions
    axis.set(title=f"KV cache used (at most {peak:.0%}, {preempted} preemptions)", ylabel="%")
    lost = np.array(run.steps.begin_s)[np.array(run.steps.num_preempted) > 0]
    axis.plot(lost, np.zeros(len(lost)), "|", color="tab:red", markersize=14, label="preemption")
    if len(lost):
        axis.legend(loc="upper left")


def _requests(run: Simulation, axis: Any) -> None:
    at, (running, waiting) = _binned(run, run.steps.num_running, run.steps.num_waiting)
    axis.plot(at, running, color="tab:green", label="running")
    if max(run.steps.num_waiting, default=0) <= 10 * max(run.steps.num_running, default=0):
        axis.plot(at, waiting, color="tab:orange", label="waiting")
    axis.set(title="Requests", ylabel="requests")
    axis.legend(loc="upper left", ncols=2)


def _latency(run: Simulation, axis: Any) -> None:
    log = run.requests
    arrival = np.array(log.arrival_s)
    for label, times in (("first token", log.first_token_s), ("last token", log.last_token_s)):
        axis.plot(np.sort(np.array(times) - arrival), np.linspace(0, 100, len(log)), label=label)
    axis.set(title="From arrival to token", ylabel="% of requests")
    axis.legend(loc="upper left")


def _gaps(run: Simulation, axis: Any) -> None:
    values, counts = gaps(run)
    if len(values):
        order = np.argsort(values)
        axis.plot(values[order], 100 * np.cumsum(counts[order]) / counts.sum())
    axis.set(title="Between two tokens of a request", ylabel="% of tokens")


def _time(run: Simulation, axis: Any) -> None:
    steps = run.steps
    seconds = np.maximum(np.array(steps.seconds), 1e-12)
    at, shares = _binned(run, *(100 * np.array(getattr(steps, f"{name}_s")) / seconds for name in COSTS))
    axis.stackplot(at, *shares, labels=[name.replace("_", " ") for name in COSTS])
    axis.set(title="A step's time goes to", ylabel="%")
    axis.legend(loc="upper left", ncols=5, columnspacing=0.8, handlelength=1)
