# SPDX-License-Identifier: Apache-2.0
"""Pictures of a simulation: batch composition, memory, latency. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastserve.errors import FastserveError
from fastserve.simulate.report import gaps
from fastserve.simulate.simulation import Simulation

BINS = 240  # of time; a pixel shows the mean of many steps


def write_plots(run: Simulation, path: Path) -> None:
    """One picture of four panels. FastserveError: matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise FastserveError("plots need matplotlib: pip install 'fastserve[plots]'") from None
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 7), layout="constrained")
    figure.suptitle(
        f"{run.cost.model.name} on {run.cost.gpu.name}: {len(run.requests)} requests, {len(run.steps)} steps"
    )
    _batches(run, axes[0][0])
    _memory(run, axes[1][0])
    _latency(run, axes[0][1])
    _gaps(run, axes[1][1])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _binned(run: Simulation, *columns: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Means over time bins, weighted with the steps' seconds."""
    begin, seconds = np.array(run.steps.begin_s), np.array(run.steps.seconds)
    edges = np.linspace(0.0, run.makespan_s, min(BINS, len(seconds)) + 1)
    place = np.clip(np.searchsorted(edges, begin, side="right") - 1, 0, len(edges) - 2)
    weight = np.bincount(place, seconds, len(edges) - 1)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, seconds * np.array(column), len(edges) - 1) / weight for column in columns]
    return edges[:-1], means


def _batches(run: Simulation, axis: Any) -> None:
    steps = run.steps
    prefill = np.array(steps.num_tokens) - np.array(steps.num_decodes)
    at, (decodes, chunks) = _binned(run, steps.num_decodes, prefill)
    axis.stackplot(at, np.nan_to_num(decodes), np.nan_to_num(chunks), labels=("decodes", "prompt tokens"))
    axis.set(title="Tokens of a step", xlabel="time (s)", ylabel="tokens")
    axis.legend(loc="upper right")


def _memory(run: Simulation, axis: Any) -> None:
    steps = run.steps
    at, (used, running, waiting) = _binned(run, steps.num_used_blocks, steps.num_running, steps.num_waiting)
    axis.plot(at, 100 * used / run.stats.num_blocks, label="KV cache used (%)")
    axis.set(title="Memory and requests", xlabel="time (s)", ylabel="%", ylim=(0, 105))
    other = axis.twinx()
    other.plot(at, running, color="tab:green", label="running")
    if max(steps.num_waiting, default=0) <= 10 * max(steps.num_running, default=0):
        other.plot(at, waiting, color="tab:orange", label="waiting")
    other.set(ylabel="requests", ylim=(0, None))
    lines = [*axis.get_lines(), *other.get_lines()]
    axis.legend(lines, [line.get_label() for line in lines], loc="lower right")


def _latency(run: Simulation, axis: Any) -> None:
    log = run.requests
    arrival = np.array(log.arrival_s)
    for label, times in (("first token", log.first_token_s), ("last token", log.last_token_s)):
        axis.plot(np.sort(np.array(times) - arrival), np.linspace(0, 100, len(log)), label=label)
    axis.set(title="From arrival to token", xlabel="seconds", ylabel="% of requests")
    axis.legend(loc="lower right")


def _gaps(run: Simulation, axis: Any) -> None:
    values, counts = gaps(run)
    if len(values):
        order = np.argsort(values)
        axis.plot(1e3 * values[order], 100 * np.cumsum(counts[order]) / counts.sum())
        axis.set_xscale("log")
    axis.set(title="Between two tokens of a request", xlabel="milliseconds", ylabel="% of tokens", ylim=(0, 101))
