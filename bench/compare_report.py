# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of what compare.py measured."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from compare_workloads import WORKLOADS

from fastserve.bench.offline import QUIET_SHARE

KV_BYTES = 2 << 30  # of KV cache, asked of every engine that lets it be set
PARTS = 7  # of a step that a plot names


def values(report: dict[str, Any], workload: str, engine: str) -> list[float]:
    return [run["value"] for run in report["cells"].get(workload, {}).get(engine, {}).get("runs", [])]


def median(report: dict[str, Any], workload: str, engine: str) -> float | None:
    found = values(report, workload, engine)
    return statistics.median(found) if found else None


def best_peer(report: dict[str, Any], workload: str, *, least: bool) -> tuple[str, float] | None:
    """The peer with the best median, and that median."""
    found = [
        (engine, value)
        for engine in report["about"]
        if not engine.startswith("fastserve") and (value := median(report, workload, engine)) is not None
    ]
    return (min if least else max)(found, key=lambda one: one[1]) if found else None


def markdown(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {machine['system']}, fastserve {report['fastserve']}. "
        f"Best seen: read {machine['read_bytes_per_s'] / 1e9:.1f} GB/s, bf16 product "
        f"{machine['bf16_flops_per_s'] / 1e9:.0f} GFLOP/s, int8 product {machine['int8_ops_per_s'] / 1e9:.0f} GOP/s "
        "(torch, 2048 x 2048 x 2048).",
        "",
    ]
    lines += _offline(report) + _memory(report) + _serving(report) + _quality(report) + _parts(report)
    lines += ["## Commands", "", *(f"    {about['command']}" for about in report["about"].values()), ""]
    return "\n".join(lines)


def _offline(report: dict[str, Any]) -> list[str]:
    names = [name for name in (*WORKLOADS, "startup") if report["cells"].get(name)]
    if not names:
        return []
    units = {name: WORKLOADS[name].unit if name in WORKLOADS else "s" for name in names}
    lines = [
        "## Speed",
        "",
        f"Medians (range; runs). \\* = other processes took more than {100 * QUIET_SHARE:.0f} % of the ",
    ]
    lines[-1] += (
        "machine in the median run. Ratios above 1: fastserve is ahead. neighbour: batch8 with its prompts, beside a "
    )
    lines[-1] += "process that always wants a core."
    head = ["engine", *(f"{name}, {units[name]}" for name in names)]
    lines += ["", *_header(head)]
    for mode, floors in report["floors"].items():
        cells = [f"{floors[n]:.1f}" if n in floors and n != "neighbour" else "" for n in names]
        lines.append(_row([f"*limit of the machine, {mode}*", *cells]))
    for engine in report["about"]:
        lines.append(_row([engine, *(_cell(report, name, engine) for name in names)]))
    for engine in (e for e in report["about"] if e.startswith("fastserve")):
        ratios, shares = [], []
        for name in names:
            own, peer = median(report, name, engine), best_peer(report, name, least=units[name] == "s")
            if own is None:
                ratios.append("")
                shares.append("")
                continue
            if peer is None:
                ratios.append("")
            else:
                ratio = peer[1] / own if units[name] == "s" else own / peer[1]
                ratios.append(f"{ratio:.2f} ({peer[0]})")
            floor = report["floors"][report["about"][engine]["mode"]].get(name) if name != "neighbour" else None
            shares.append(
                "" if floor is None else f"{100 * (floor / own if units[name] == 's' else own / floor):.0f} %"
            )
        lines.append(_row([f"**{engine} / best peer**", *ratios]))
        lines.append(_row([f"{engine}, of its limit", *shares]))
    slower = []
    for engine in report["about"]:
        quiet = [run["seconds"] for run in _runs(report, "batch8", engine)]
        beside = [run["seconds"] for run in _runs(report, "neighbour", engine)]
        if quiet and beside:
            slower.append(f"{engine} {statistics.median(beside) / statistics.median(quiet):.2f}")
    if slower:
        lines += ["", "Times slower beside a process that always wants a core: " + ", ".join(slower) + "."]
    lines += ["", "CPU seconds of a run's measured part (engines that spin while they wait spend more):", ""]
    lines += _header(["engine", *names])
    for engine in report["about"]:
        spent = [[run["cpu_s"] for run in _runs(report, name, engine)] for name in names]
        lines.append(_row([engine, *(f"{statistics.median(one):.2f}" if one else "" for one in spent)]))
    return [*lines, ""]


def _cell(report: dict[str, Any], name: str, engine: str) -> str:
    cell = report["cells"].get(name, {}).get(engine, {})
    runs = cell.get("runs", [])
    if not runs:
        return str(cell.get("problem", "")).replace("|", "/")[:60]
    ordered = sorted(run["value"] for run in runs)
    middle = min(runs, key=lambda run: abs(run["value"] - statistics.median(ordered)))
    mark = "\\*" if middle["others"] > QUIET_SHARE else ""
    spread = f" ({ordered[0]:.1f} to {ordered[-1]:.1f}; {len(ordered)})" if len(ordered) > 1 else " (1)"
    return f"{statistics.median(ordered):.1f}{mark}{spread}"


def _memory(report: dict[str, Any]) -> list[str]:
    peaks = {}
    for engine in report["about"]:
        found = [r["peak_bytes"] for n in (*WORKLOADS, "startup") for r in _runs(report, n, engine)]
        if found:
            peaks[engine] = max(found)
    if not peaks:
        return []
    lines = [
        "## Memory",
        "",
        "Peak resident bytes of the process over all of the above; MB. fastserve, OpenVINO and vLLM are ",
    ]
    lines[-1] += (
        f"asked for {KV_BYTES / 1e6:.0f} MB of KV cache; fastserve's is there as far as it was used and 512 MB ahead."
    )
    lines += ["", *_header(["engine", "peak", "weights' file"])]
    for engine, peak in peaks.items():
        lines.append(_row([engine, f"{peak / 1e6:.0f}", f"{report['about'][engine]['weight_bytes'] / 1e6:.0f}"]))
    return [*lines, ""]


def _serving(report: dict[str, Any]) -> list[str]:
    cells = {name: report["cells"].get(name, {}) for name in ("capacity", "trace")}
    if not any(cells.values()):
        return []
    lines = [
        "## Serving",
        "",
        "60 short chats (64 to 192 tokens in, 32 to 96 out) beside 12 long prompts (1,024 to 1,536 in, ",
    ]
    lines[-1] += (
        "64 out) over HTTP, by `fastserve bench serve`. Capacity: all at once. Trace: Poisson arrivals, equal for all."
    )
    columns = [f"p{p}_{m}_ms" for m in ("ttft", "itl") for p in (50, 90, 99)]
    head = ["server", "capacity, requests/s", "rate", "reached", *(c[:-3].replace("_", " ") + ", ms" for c in columns)]
    lines += ["", *_header(head)]
    for engine in {**cells["capacity"], **cells["trace"]}:
        whole = _runs(report, "capacity", engine)
        trace = _runs(report, "trace", engine)
        problem = cells["trace"].get(engine, {}).get("problem") or cells["capacity"].get(engine, {}).get("problem", "")
        row = [engine, f"{whole[0]['value']:.2f}" if whole else problem[:60]]
        if trace:
            row += [f"{trace[0]['rate']:.2f}", f"{trace[0]['value']:.2f}", *(f"{trace[0][c]:.0f}" for c in columns)]
        else:
            row += ["", problem[:60] if whole else "", *("" for _ in columns)]
        lines.append(_row(row))
    return [*lines, ""]


def _quality(report: dict[str, Any]) -> list[str]:
    cells = report["cells"].get("quality", {})
    if not cells:
        return []
    lines = [
        "## Quality",
        "",
        "Perplexity of the same text, tokens with 512 to 1,023 before them. llama-perplexity scores the second half ",
    ]
    lines[-1] += "of each window of 1,024 only, so it is compared with its own bf16, the others with fastserve's."
    lines += ["", *_header(["engine", "perplexity", "tokens scored", "against bf16"])]
    for engine in cells:
        for run in _runs(report, "quality", engine):
            family = "llama.cpp" if engine.startswith("llama.cpp") else "fastserve"
            base = median(report, "quality", f"{family} bf16")
            loss = "" if base is None else f"{100 * (run['value'] / base - 1):+.2f} %"
            lines.append(_row([engine, f"{run['value']:.3f}", f"{run['tokens']:,}", loss]))
    return [*lines, ""]


def _parts(report: dict[str, Any]) -> list[str]:
    lines = []
    for engine in report["cells"].get("parts", {}):
        for run in _runs(report, "parts", engine):
            for title, parts in run["parts"].items():
                share = 100 * parts["python_ms"] / parts["ms"]
                lines.append(_row([engine, title, f"{parts['ms']:.2f}", f"{parts['python_ms']:.2f}", f"{share:.1f} %"]))
    if not lines:
        return []
    head = ["engine", "step", "ms", "outside ops, ms", "outside ops"]
    return ["## Time of a step", "", *_header(head), *lines, ""]


def _runs(report: dict[str, Any], workload: str, engine: str) -> list[dict[str, Any]]:
    return list(report["cells"].get(workload, {}).get(engine, {}).get("runs", []))


def _header(cells: list[str]) -> list[str]:
    return [_row(cells), "|" + " --- |" * len(cells)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# --- plots ---


def write_plots(report: dict[str, Any], out: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: pip install 'fastserve[plots]'")
        return
    drawn = {"batch": _plot_batches, "latency": _plot_latency, "parts": _plot_parts, "roofline": _plot_roofline}
    for name, draw in drawn.items():
        figure = Figure(figsize=(8, 5))
        draw(report, figure.add_subplot())
        figure.tight_layout()
        figure.savefig(out.with_name(f"{out.name}-{name}.png"), dpi=110)


def _plot_batches(report: dict[str, Any], axes: Any) -> None:
    sizes = {"single": 1, "batch8": 8, "batch32": 32, "batch64": 64}
    for engine in report["about"]:
        points = [(size, value) for name, size in sizes.items() if (value := median(report, name, engine)) is not None]
        if points:
            style = "-o" if engine.startswith("fastserve") else "--o"
            axes.plot(*zip(*points, strict=True), style, label=engine)
    for mode, floors in report["floors"].items():
        axes.plot(sizes.values(), [floors[name] for name in sizes], ":", label=f"limit, {mode}")
    axes.set(
        xscale="log", yscale="log", xlabel="requests at a time", ylabel="tokens/s, decode", title="Decode throughput"
    )
    axes.set_xticks(list(sizes.values()), [str(size) for size in sizes.values()])
    axes.legend(fontsize=7)


def _plot_latency(report: dict[str, Any], axes: Any) -> None:
    names = [f"p{p}_{metric}_ms" for metric in ("ttft", "itl") for p in (50, 90, 99)]
    engines = [engine for engine in report["cells"].get("trace", {}) if _runs(report, "trace", engine)]
    width = 0.8 / max(1, len(engines))
    for index, engine in enumerate(engines):
        run = _runs(report, "trace", engine)[0]
        axes.bar([i + index * width for i in range(len(names))], [run[name] for name in names], width, label=engine)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], [n[:-3].replace("_", " ") for n in names])
    axes.set(yscale="log", ylabel="ms", title="Latency of the mixed trace, equal rate")
    if engines:
        axes.legend(fontsize=7)


def _plot_parts(report: dict[str, Any], axes: Any) -> None:
    bars = {}
    for engine in report["cells"].get("parts", {}):
        for run in _runs(report, "parts", engine):
            for title, parts in run["parts"].items():
                bars[f"{engine}\n{title}"] = {
                    k: v / parts["ms"] for k, v in parts.items() if k not in ("ms", "python_ms")
                }
    totals: dict[str, float] = {}
    for parts in bars.values():
        for part, share in parts.items():
            totals[part] = totals.get(part, 0.0) + share
    shown = sorted(totals, key=lambda part: -totals[part])[:PARTS]
    left = dict.fromkeys(bars, 0.0)
    for part in [*shown, "the rest"]:
        widths = [parts.get(part, 0.0) if part != "the rest" else 1 - left[bar] for bar, parts in bars.items()]
        axes.barh(list(bars), widths, left=list(left.values()), label=part)
        left = {bar: left[bar] + width for bar, width in zip(bars, widths, strict=True)}
    axes.set(xlabel="share of a step", title="Where the time of a step goes")
    axes.tick_params(axis="y", labelsize=7)
    if bars:
        axes.legend(fontsize=6, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _plot_roofline(report: dict[str, Any], axes: Any) -> None:
    """Operations a second against operations a byte, each engine with the bytes of the mode it holds the weights in."""
    machine = report["machine"]
    read, peaks = machine["read_bytes_per_s"], (machine["bf16_flops_per_s"], machine["int8_ops_per_s"])
    reach = [2.0**i for i in range(-1, 13)]
    for peak, name in zip(peaks, ("bf16", "int8"), strict=True):
        axes.plot(reach, [min(peak, read * x) / 1e9 for x in reach], "k-", linewidth=0.8)
        axes.annotate(f"{name} product", (reach[-1], peak / 1e9), ha="right", va="bottom", fontsize=7)
    for engine, about in report["about"].items():
        points = []
        for name, (operations, num_bytes) in report["demands"][about["mode"]].items():
            if (value := median(report, name, engine)) is not None:
                points.append((operations / num_bytes, value * operations / 1e9))
        if points:
            axes.plot(*zip(*points, strict=True), "o" if engine.startswith("fastserve") else "x", label=engine)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GOP/s", title="Roofline of this machine")
    axes.legend(fontsize=7)
