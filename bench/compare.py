# SPDX-License-Identifier: Apache-2.0
"""fastserve beside other engines on this machine: same prompts, same token counts, same threads, runs in turns.

    python bench/compare.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --peer llamacpp=llama.cpp/build/bin \\
        --peer openvino=openvino/bin/python --peer vllm=vllm/bin/python --peer transformers=transformers/bin/python

Peers are optional (docs/performance.md says how to install them): a Python where the engine is installed, or the folder
of llama.cpp's programs. fastserve runs as bfloat16 and as int4, where AMX makes 16-bit activations its default also
with 12-bit activations (w4a12). llama.cpp runs as Q4_0, Q8_0, BF16 and the given Q4_1 file; what is missing is made of
that file with llama-quantize, beside the results.

Every engine is in a process of its own and computes only when it is its turn, so that drift of the machine meets all
alike. Prompts are real text, no two runs begin alike, end-of-text is ignored. A decode figure leaves the prompts out:
the time of as many other prompts with one token each is taken off. A run is repeated up to --repeat times while its
repetitions took less than --budget seconds, and stopped after --limit seconds.

What is measured is kept in OUT.json after every run, and the same command goes on from there, so a comparison may be
made in parts (--workload, --engine). OUT.md has the tables, OUT-*.png the plots where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compare_engines import EngineError, LlamaEngine, Run, WorkerEngine
from compare_report import markdown, write_plots
from compare_serving import Server, fastserve_server, llama_server, load, running, vllm_server, write_trace
from compare_workloads import MODES, WORKLOADS, Shape, demand_of, floor_of, machine_rates

from fastserve import __version__, _native
from fastserve.bench.offline import busy_seconds, english_text
from fastserve.doctor import cpu_name
from fastserve.evaluate import windows
from fastserve.tokenizer import Tokenizer

PEERS = ("llamacpp", "openvino", "vllm", "transformers")
SERVED = ("capacity", "trace")
ALL = (*WORKLOADS, "startup", *SERVED, "parts", "quality")
WITHOUT = {  # what takes minutes and tells nothing: an engine that does not keep prefixes, slower twins of an engine
    "transformers": ("batch64", "shared_cold", "shared_warm", "neighbour"),
    "llama.cpp q4_1": ("batch32", "batch64", "prefill2048", "neighbour", "shared_cold", "shared_warm"),
    "llama.cpp q8_0": ("batch32", "neighbour", "shared_cold", "shared_warm"),
    "llama.cpp bf16": ("neighbour", "shared_cold", "shared_warm"),
}
QUALITY_CONTEXT = 1024
QUIET = 0.06  # share of the machine that others may take
Engine = WorkerEngine | LlamaEngine


class Results:
    """OUT.json: {"machine", "about", "cells": {workload: {engine: {"runs": [...], "problem": text}}}}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"cells": {}, "about": {}, "machine": {}}
        if path.exists():
            self.data = json.loads(path.read_text())

    def runs(self, workload: str, engine: str) -> list[dict[str, Any]]:
        return list(self._cell(workload, engine)["runs"])

    def failed(self, workload: str, engine: str) -> bool:
        return "problem" in self._cell(workload, engine)

    def add(self, workload: str, engine: str, run: dict[str, Any]) -> None:
        cell = self._cell(workload, engine)
        cell["runs"].append(run)
        cell.pop("problem", None)
        self.save()
        others = f"others {100 * run['others']:.0f} %" if "others" in run else ""
        print(f"  {workload:12} {engine:24} {run['value']:9.2f}  {others}", flush=True)

    def fail(self, workload: str, engine: str, problem: str) -> None:
        self._cell(workload, engine)["problem"] = problem
        self.save()
        print(f"  {workload:12} {engine:24} {problem}", file=sys.stderr, flush=True)

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.rename(self.path)

    def _cell(self, workload: str, engine: str) -> dict[str, Any]:
        cell: dict[str, Any] = self.data["cells"].setdefault(workload, {}).setdefault(engine, {"runs": []})
        return cell


def make_engines(a: argparse.Namespace, peers: dict[str, str], out: Path) -> tuple[list[Engine], dict[str, str]]:
    """The engines, and of each the mode in which it holds the weights (see MODES)."""
    engines: list[Engine] = []
    modes: dict[str, str] = {}

    def log(name: str) -> Path:
        return out.with_name(f"{out.name}.{name.replace(' ', '-')}.log")

    def worker(name: str, kind: str, model: str, python: str, mode: str) -> None:
        engines.append(WorkerEngine(name, kind, model, python, a.threads, log(name)))
        modes[name] = mode

    worker("fastserve int4", "fastserve", a.int4, sys.executable, "int4")
    if _native.isa().startswith("amx"):  # elsewhere that is the default
        worker("fastserve w4a12", "fastserve_w4a12", a.int4, sys.executable, "int4")
    worker("fastserve bf16", "fastserve", a.model, sys.executable, "bf16")
    if "llamacpp" in peers:
        programs = Path(peers["llamacpp"])
        for form in ("q4_0", "q4_1", "q8_0", "bf16"):
            name = f"llama.cpp {form}"
            engines.append(LlamaEngine(name, gguf_of(a, form, programs, out), programs, a.threads, log(name)))
            modes[name] = {"q4_0": "int4", "q4_1": "int4", "q8_0": "int8"}.get(form, form)
    if "openvino" in peers:
        form = "q8_0" if "llamacpp" in peers else "q4_1"
        file = gguf_of(a, form, Path(peers.get("llamacpp", "")), out)
        worker(f"openvino {form}", "openvino", file, peers["openvino"], "int8" if form == "q8_0" else "int4")
    for kind in ("vllm", "transformers"):
        if kind in peers:
            worker(f"{kind} bf16", kind, a.model, peers[kind], "bf16")
    return engines, modes


def gguf_of(a: argparse.Namespace, form: str, programs: Path, out: Path) -> str:
    """The given Q4_1 file, or one made of it."""
    if not a.gguf:
        raise SystemExit("--peer llamacpp and --peer openvino need --gguf, the model as a Q4_1 GGUF file")
    if form == "q4_1":
        return str(a.gguf)
    file = out.with_name(f"model.{form}.gguf")
    if not file.exists():
        partial = file.with_suffix(".partial")
        command = [str(programs / "llama-quantize"), "--allow-requantize", str(a.gguf), str(partial), form]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        partial.rename(file)
    return str(file)


@contextmanager
def neighbour(wanted: bool) -> Iterator[None]:
    """A process that always wants a core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def wait_for_rest(limit_s: float = 5.0) -> None:
    """Until the machine does nothing, or `limit_s`: an engine may go on for a while after its turn, as fastserve does
    with pages of its KV cache."""
    cores, period = os.cpu_count() or 1, 0.2
    for _ in range(round(limit_s / period)):
        busy = busy_seconds()
        time.sleep(period)
        if busy_seconds() - busy < QUIET * period * cores:
            return


def measured(work: Callable[[], Run], extra: float = 0.0) -> dict[str, Any]:
    """A run with the share of the machine that other processes took, less `extra` cores."""
    busy, begin = busy_seconds(), time.perf_counter()
    run = work()
    elapsed = time.perf_counter() - begin
    cores = os.cpu_count() or 1
    own = run.more.get("all_cpu_s", run.cpu_s)  # what an engine did outside the measured seconds is its own too
    others = max(0.0, (busy_seconds() - busy - own - extra * elapsed) / elapsed / cores)
    return {"value": run.value, "seconds": run.seconds, "cpu_s": run.cpu_s, "peak_bytes": run.peak_bytes,
            "others": min(others, 1.0), **run.more}  # fmt: skip


def run_offline(
    a: argparse.Namespace, results: Results, engines: list[Engine], names: list[str], ids: list[int]
) -> None:
    for turn in range(a.repeat):
        for name in names:
            for engine in engines:
                w = WORKLOADS[name]
                runs = results.runs(name, engine.name)
                spent = sum(one["seconds"] for one in runs)
                if len(runs) > turn or (runs and spent > a.budget) or skipped(engine.name, name):
                    continue
                if results.failed(name, engine.name) and not a.again:
                    continue
                try:
                    engine.open(600)
                    wait_for_rest()
                    with neighbour(w.neighbour):
                        one = measured(lambda e=engine, n=name, t=turn: e.run(n, t, ids, a.limit), float(w.neighbour))
                    results.add(name, engine.name, one)
                except EngineError as error:
                    results.fail(name, engine.name, str(error))


def skipped(engine: str, workload: str) -> bool:
    return workload in WITHOUT.get(engine, WITHOUT.get(engine.split()[0], ()))


def run_startup(a: argparse.Namespace, results: Results, engines: list[Engine]) -> None:
    for turn in range(a.repeat):
        for engine in engines:
            runs = results.runs("startup", engine.name)
            if len(runs) > turn or (runs and sum(one["seconds"] for one in runs) > a.budget):
                continue
            if engine.name.startswith("llama.cpp") and engine.name != "llama.cpp q4_0":
                continue
            try:
                results.add("startup", engine.name, measured(lambda e=engine: e.startup(300)))
            except EngineError as error:
                results.fail("startup", engine.name, str(error))


def servers_of(a: argparse.Namespace, peers: dict[str, str], out: Path) -> list[Server]:
    servers = [
        fastserve_server("fastserve int4", a.int4, a.threads),
        fastserve_server("fastserve bf16", a.model, a.threads),
    ]
    if "llamacpp" in peers:
        programs = Path(peers["llamacpp"])
        servers.append(llama_server("llama.cpp q4_0", programs, gguf_of(a, "q4_0", programs, out), a.threads))
    if "vllm" in peers:
        servers.append(vllm_server("vllm bf16", peers["vllm"], a.model, a.threads))
    return servers


def run_served(a: argparse.Namespace, results: Results, servers: list[Server], names: list[str], out: Path) -> None:
    """First every server's capacity; then all at one rate, 70 % of the best peer's (or of fastserve's, alone)."""
    trace, warm = (out.with_name(f"{out.name}.{kind}.jsonl") for kind in ("trace", "warm"))
    for name in (one for one in SERVED if one in names):
        rate = None
        if name == "trace":
            capacity = {s.name: r[0]["value"] for s in servers if (r := results.runs("capacity", s.name))}
            peers = [value for server, value in capacity.items() if not server.startswith("fastserve")]
            if not capacity:
                print("no trace: its rate follows from --workload capacity", file=sys.stderr)
                return
            rate = a.rate or 0.7 * max(peers or capacity.values())
        for server in servers:
            if results.runs(name, server.name) or (results.failed(name, server.name) and not a.again):
                continue
            try:
                with running(server, out.with_name(f"{out.name}.{server.name.replace(' ', '-')}.log")) as port:
                    load(port, warm, a.model, None, a.limit)  # what a server does once: compiling, buffers
                    figures = load(port, trace, a.model, rate, a.limit)
                results.add(name, server.name, {"value": figures["request_throughput"], "rate": rate, **figures})
            except EngineError as error:
                results.fail(name, server.name, str(error))


def run_parts(a: argparse.Namespace, results: Results) -> None:
    for name, model in (("fastserve int4", a.int4), ("fastserve bf16", a.model)):
        if results.runs("parts", name):
            continue
        command = [sys.executable, str(Path(__file__).with_name("step_profile.py")), model, "--json"]
        command += ["--threads", str(a.threads), "--batch", "1", "--batch", "8", "--batch", "64", "--prefill", "512"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            results.fail("parts", name, done.stderr.strip().splitlines()[-1])
            continue
        parts = json.loads(done.stdout)
        results.add("parts", name, {"value": next(iter(parts.values()))["ms"], "parts": parts})


def run_quality(
    a: argparse.Namespace, results: Results, engines: list[Engine], text: str, ids: list[int], out: Path
) -> None:
    """Perplexity in windows of 1,024, of tokens with at least 512 before them: llama-perplexity scores the second half
    of windows side by side, the others that of windows half a window apart."""
    file = out.with_name(f"{out.name}.text.txt")
    file.write_text(text, encoding="utf-8")
    num_ids = min(a.quality_tokens, len(ids))
    pieces = windows(num_ids, QUALITY_CONTEXT, QUALITY_CONTEXT // 2)
    given = json.dumps([(ids[one.begin : one.end], one.first_scored - one.begin) for one in pieces])
    for engine in engines:
        if results.runs("quality", engine.name):
            continue
        environment = None
        pattern = r"tokens (?P<tokens>\d+)  perplexity (?P<value>[\d.]+)"
        if isinstance(engine, LlamaEngine):
            chunks = a.quality_tokens // QUALITY_CONTEXT
            command = [str(engine.programs / "llama-perplexity"), "-m", engine.model, "-f", str(file)]
            command += ["-c", str(QUALITY_CONTEXT), "--chunks", str(chunks), "-t", str(a.threads)]
            pattern = r"Final estimate: PPL = (?P<value>[\d.]+)"
        elif engine.kind.startswith("fastserve"):
            command = [sys.executable, "-m", "fastserve.cli", "eval", "perplexity", engine.model, "--text", str(file)]
            command += ["--context", str(QUALITY_CONTEXT), "--stride", str(QUALITY_CONTEXT // 2)]
            command += ["--max-tokens", str(a.quality_tokens), "--num-threads", str(a.threads)]
            command += ["--activation-dtype", "int12" if engine.kind.endswith("w4a12") else "auto"]
        else:
            script, environment = str(Path(__file__).with_name("peer_perplexity.py")), engine.environment
            command = [engine.command[0], script, engine.kind, engine.model, "--threads", str(a.threads)]
        done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=False)
        found = re.search(pattern, done.stdout + done.stderr)
        if done.returncode or found is None:
            results.fail("quality", engine.name, (done.stderr.strip().splitlines() or ["no perplexity printed"])[-1])
            continue
        tokens = int(found["tokens"]) if "tokens" in found.groupdict() else chunks * (QUALITY_CONTEXT // 2 - 1)
        results.add("quality", engine.name, {"value": float(found["value"]), "tokens": tokens})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/models/smollm2-135m", help="model folder, bfloat16")
    parser.add_argument("--int4", default="build/models/smollm2-135m-int4", help="the same, int4")
    parser.add_argument("--gguf", help="the same as a Q4_1 GGUF file, for llama.cpp and OpenVINO")
    parser.add_argument("--peer", action="append", default=[], metavar="KIND=PATH", help=f"KIND: {', '.join(PEERS)}")
    parser.add_argument("--engine", action="append", help="only engines whose name begins so; may be repeated")
    parser.add_argument("--workload", action="append", choices=ALL, help="may be repeated (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="runs of a cell at most (default: 3)")
    parser.add_argument(
        "--budget", type=float, default=8, help="seconds after which a cell is not repeated (default: 8)"
    )
    parser.add_argument("--limit", type=float, default=150, help="seconds after which a run is stopped (default: 150)")
    parser.add_argument(
        "--rate", type=float, help="requests/s of the trace (default: 70 %% of the best peer's capacity)"
    )
    parser.add_argument("--text", help="UTF-8 file of prompts and perplexity (default: Python's language reference)")
    parser.add_argument("--quality-tokens", type=int, default=102400, help="of the text, for llama.cpp half are scored")
    parser.add_argument("--again", action="store_true", help="try again what failed in an earlier run")
    parser.add_argument("--out", default="bench/results/compare", help="results are OUT.json, OUT.md, OUT-*.png")
    return parser.parse_args()


def main() -> None:
    a = parse()
    peers = dict(one.split("=", 1) for one in a.peer)
    if unknown := set(peers) - set(PEERS):
        raise SystemExit(f"--peer {min(unknown)}: is one of {', '.join(PEERS)}")
    out = Path(a.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = Results(out.with_name(out.name + ".json"))
    text = english_text(a.text)
    tokenizer = Tokenizer.from_dir(a.model)
    ids = tokenizer.encode(text)
    names = a.workload or list(ALL)
    engines, modes = make_engines(a, peers, out)
    wanted = [e for e in engines if not a.engine or any(e.name.startswith(one) for one in a.engine)]

    rates = machine_rates(a.threads)
    before = results.data["machine"]
    if before.get("cpu") == cpu_name() and before.get("threads") == a.threads:  # a limit is the best that was seen
        rates = {name: max(rate, before[name]) for name, rate in rates.items()}
    config = json.loads((Path(a.model) / "config.json").read_text())
    results.data["machine"] = {"cpu": cpu_name(), "threads": a.threads, "system": platform.platform(), **rates}
    results.data["fastserve"] = __version__
    shape = Shape.of(config)
    results.data["floors"] = {m: {n: floor_of(n, shape, MODES[m], rates) for n in WORKLOADS} for m in MODES}
    results.data["demands"] = {
        m: {n: one for n in WORKLOADS if (one := demand_of(n, shape, MODES[m])) is not None} for m in MODES
    }
    for engine in engines:
        size = sum(f.stat().st_size for f in _weight_files(engine.model))
        about = {"mode": modes[engine.name], "command": " ".join(engine.command), "weight_bytes": size}
        results.data["about"][engine.name] = about
    try:
        run_offline(a, results, wanted, [name for name in names if name in WORKLOADS], ids)
    finally:
        for engine in wanted:
            engine.close()
    if "startup" in names:
        run_startup(a, results, wanted)
    if set(SERVED) & set(names):
        write_trace(out.with_name(f"{out.name}.trace.jsonl"), tokenizer, ids, 5)
        write_trace(out.with_name(f"{out.name}.warm.jsonl"), tokenizer, ids, 40_009)  # nothing that the trace has
        served = [s for s in servers_of(a, peers, out) if s.name in {e.name for e in wanted}]
        run_served(a, results, served, names, out)
    if "parts" in names:
        run_parts(a, results)
    if "quality" in names:
        run_quality(a, results, wanted, text, ids, out)
    results.save()
    page = markdown(results.data)
    out.with_name(out.name + ".md").write_text(page)
    write_plots(results.data, out)
    print(page)


def _weight_files(model: str) -> list[Path]:
    path = Path(model)
    return [path] if path.is_file() else list(path.glob("*.safetensors"))


if __name__ == "__main__":
    main()
