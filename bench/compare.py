# SPDX-License-Identifier: Apache-2.0
"""fastserve beside other engines on this machine: same prompts, same token counts, same threads, runs in turns.

    python bench/compare.py --engine fastserve:build/models/smollm2-135m \\
        --engine transformers:build/models/smollm2-135m \\
        --engine openvino:model.gguf:build/peers/openvino/bin/python --workload single --workload batch32

An engine is KIND:MODEL[:PYTHON], with the Python of an environment where it is installed (pip install openvino-genai;
pip install transformers torch). Each runs in a process of its own, all at once, and computes only when it is its turn,
so that drift of the machine meets all alike. Prompts are real text, cut by the tokenizer of --tokenizer; end-of-text is
ignored. Every workload runs `--repeat` times with other text; a run is preceded by the same prompts for a single token
elsewhere in the text, whose time is taken off where decoding is wanted. Figures are medians with their range, beside
the floors: bytes at the measured read rate, operations at the measured product rate. Writes NAME.json and NAME.md, and
NAME.png where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastserve import __version__
from fastserve.bench.offline import QUIET_SHARE, busy_seconds, cut_prompts, english_text
from fastserve.doctor import cpu_name
from fastserve.tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Workload:
    num: int
    length: int  # own tokens of a prompt
    num_output: int
    figure: str  # decode, prefill (tokens/s) or total (seconds)
    num_shared: int = 0


WORKLOADS = {
    "single": Workload(1, 128, 128, "decode"),
    "prefill512": Workload(1, 512, 1, "prefill"),
    "prefill2048": Workload(1, 2048, 1, "prefill"),
    "batch8": Workload(8, 128, 128, "decode"),
    "batch32": Workload(32, 128, 128, "decode"),
    "batch64": Workload(64, 128, 128, "decode"),
    "shared": Workload(64, 32, 64, "total", num_shared=1024),
}
UNITS = {"decode": "tok/s", "prefill": "tok/s", "total": "s"}


class Engine:
    def __init__(self, given: str, threads: int, log: Path) -> None:
        kind, model, *python = given.split(":")
        self.kind = kind
        worker = [python[0] if python else sys.executable, str(FOLDER / "engine_worker.py")]
        self.command = [*worker, kind, model, "--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )
        self.about = self._read()
        self.name = f"{self.about['name']}, {Path(model).name}"
        self.peak_bytes = 0

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.command)}: the process ended; its log is beside the results")
        return json.loads(line)

    def run(self, prompts: list[list[int]], num_output: int) -> float:
        """Seconds; NaN, with a message, if the engine fails or does not make the tokens asked for."""
        assert self.process.stdin is not None
        print(json.dumps({"prompts": prompts, "num_output": num_output}), file=self.process.stdin, flush=True)
        answer = self._read()
        if "error" in answer or answer["counts"] != [num_output] * len(prompts):
            print(f"  {self.name}: {answer.get('error') or answer['counts']}", file=sys.stderr)
            return float("nan")
        self.peak_bytes = answer["peak_bytes"]
        return float(answer["seconds"])

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def one_run(engine: Engine, workload: Workload, ids: list[int], turn: int) -> tuple[float, float, float]:
    """(the workload's figure, the share of the machine that other processes took, CPU seconds of the engine)"""
    w = workload
    stride = 2 * w.num * (w.length + w.num_shared)
    prompts = cut_prompts(ids, w.num, w.length, w.num_shared, offset=turn * stride)
    others = cut_prompts(ids, w.num, w.length, w.num_shared, offset=turn * stride + stride // 2)
    first = engine.run(others, 1) if w.figure == "decode" else 0.0
    busy, own, begin = busy_seconds(), engine.cpu_seconds(), time.perf_counter()
    seconds = engine.run(prompts, w.num_output)
    spent = engine.cpu_seconds() - own
    foreign = busy_seconds() - busy - spent
    share = max(0.0, foreign / (time.perf_counter() - begin) / (os.cpu_count() or 1))
    if w.figure == "decode":
        return w.num * (w.num_output - 1) / (seconds - first), share, spent
    if w.figure == "prefill":
        return w.num * w.length / seconds, share, spent
    return seconds, share, spent


def machine_rates(threads: int) -> tuple[float, float]:
    """(bytes/s of a plain read, operations/s of torch's best bfloat16 product), now."""
    torch.set_num_threads(threads)
    memory, matrix = torch.ones(2**27), torch.randn(2048, 2048).bfloat16()

    def best(work: Any, count: int) -> float:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        return min(times)

    return memory.numel() * 4 / best(memory.sum, 5), 2 * 2048**3 / best(lambda: matrix @ matrix, 5)


def floor_of(workload: Workload, config: dict[str, Any], read: float, product: float) -> float:
    """The figure of an engine with bfloat16 weights and cache that only waits for memory or multipliers."""
    h, m, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or h // heads
    blocks = layers * (h * dim * (2 * heads + 2 * kv_heads) + 3 * h * m)
    head = h * config["vocab_size"]
    kv_bytes = layers * 2 * kv_heads * dim * 2
    attention = layers * 4 * heads * dim  # operations per (query, key)

    def step(num: int, context: int, shared: int) -> float:
        read_s = (2 * (blocks + head) + kv_bytes * (shared + num * (context - shared))) / read
        return max(read_s, num * (2 * (blocks + head) + attention * context) / product)

    def prefill(tokens: int, context: int) -> float:
        return tokens * (2 * blocks + attention * context / 2) / product

    w = workload
    if w.figure == "decode":
        return w.num / step(w.num, w.length + w.num_output // 2, 0)
    if w.figure == "prefill":
        return w.length / prefill(w.length, w.length)
    context = w.num_shared + w.length
    fill = prefill(w.num_shared, w.num_shared) + w.num * w.length * (2 * blocks + attention * context) / product
    return fill + w.num_output * step(w.num, context + w.num_output // 2, w.num_shared)


def markdown(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {machine['system']}; {report['repeat']} runs each, in turns; "
        f"read {machine['read_bytes_per_s'] / 1e9:.1f} GB/s, bf16 product {machine['flops_per_s'] / 1e9:.0f} GFLOP/s.",
        "Medians (range); * = other processes took more than 6 % of the machine in the median run.",
        "",
        "| engine | " + " | ".join(f"{name} ({UNITS[WORKLOADS[name].figure]})" for name in report["workloads"]) + " |",
        "| --- |" + " --- |" * len(report["workloads"]),
        "| limit of the machine, bf16 | " + " | ".join(f"{floor:.1f}" for floor in report["floors"].values()) + " |",
    ]
    for engine in report["engines"]:
        cells = []
        for name in report["workloads"]:
            values = engine["figures"][name]
            mark = "*" if engine["others"][name] > QUIET_SHARE else ""
            cells.append(f"{statistics.median(values):.1f}{mark} ({min(values):.1f} to {max(values):.1f})")
        lines.append(f"| {engine['name']} | " + " | ".join(cells) + " |")
    lines += ["", "CPU seconds of a run, prompts and all (engines that spin while they wait spend more):", ""]
    lines += ["| engine | " + " | ".join(report["workloads"]) + " |", "| --- |" + " --- |" * len(report["workloads"])]
    for engine in report["engines"]:
        spent = [f"{statistics.median(engine['cpu_seconds'][name]):.2f}" for name in report["workloads"]]
        lines.append(f"| {engine['name']} | " + " | ".join(spent) + " |")
    lines += ["", *(f"    {engine['command']}" for engine in report["engines"])]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    names = report["workloads"]
    figure = Figure(figsize=(3 * len(names), 4))
    for column, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), column + 1)
        values = [statistics.median(engine["figures"][name]) for engine in report["engines"]]
        axes.bar([engine["kind"] for engine in report["engines"]], values)
        axes.axhline(report["floors"][name], color="black", linestyle="--")
        axes.set_title(f"{name} ({UNITS[WORKLOADS[name].figure]})", fontsize=9)
        axes.tick_params(axis="x", rotation=45, labelsize=7)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", required=True, metavar="KIND:MODEL[:PYTHON]")
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="may be repeated (default: all)")
    parser.add_argument("--tokenizer", default="build/models/smollm2-135m", help="model folder, for the prompts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--text", help="a UTF-8 file to cut prompts from (default: Python's language reference)")
    parser.add_argument("--out", default="build/compare", help="results are OUT.json, OUT.md, OUT.png")
    arguments = parser.parse_args()
    names = arguments.workload or list(WORKLOADS)
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    ids = Tokenizer.from_dir(arguments.tokenizer).encode(english_text(arguments.text))
    config = json.loads((Path(arguments.tokenizer) / "config.json").read_text())

    read, product = machine_rates(arguments.threads)
    engines = []
    for index, given in enumerate(arguments.engine):
        engines.append(Engine(given, arguments.threads, out.with_name(f"{out.name}.{index}.log")))
        engines[-1].run(cut_prompts(ids, 1, 16, offset=len(ids) // 2), 2)  # first-use costs
        print(f"{engines[-1].name}: loaded in {engines[-1].about['load_s']:.1f} s", flush=True)
    figures: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in engines]
    shares: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in engines]
    cpu: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in engines]
    for turn in range(arguments.repeat):
        for name in names:
            for index, engine in enumerate(engines):
                value, share, spent = one_run(engine, WORKLOADS[name], ids, turn)
                figures[index][name].append(value)
                shares[index][name].append(share)
                cpu[index][name].append(spent)
                unit = UNITS[WORKLOADS[name].figure]
                print(f"  {name:12} {engine.name:50} {value:8.1f} {unit:6} others {100 * share:.0f} %", flush=True)
    report = {
        "machine": {
            "cpu": cpu_name(),
            "threads": arguments.threads,
            "system": platform.platform(),
            "read_bytes_per_s": read,
            "flops_per_s": product,
        },
        "fastserve": __version__,
        "command": " ".join(sys.argv),
        "repeat": arguments.repeat,
        "workloads": names,
        "floors": {name: floor_of(WORKLOADS[name], config, read, product) for name in names},
        "engines": [
            {
                "kind": engine.kind,
                "name": engine.name,
                "command": " ".join(engine.command),
                "load_s": engine.about["load_s"],
                "peak_bytes": engine.peak_bytes,
                "figures": figures[index],
                "cpu_seconds": cpu[index],
                "others": {name: statistics.median(shares[index][name]) for name in names},
            }
            for index, engine in enumerate(engines)
        ],
    }
    for engine in engines:
        engine.close()
    out.with_name(out.name + ".json").write_text(json.dumps(report, indent=2) + "\n")
    out.with_name(out.name + ".md").write_text(markdown(report))
    plot(report, out.with_name(out.name + ".png"))
    print(markdown(report))


if __name__ == "__main__":
    main()
