# SPDX-License-Identifier: Apache-2.0
"""`fastserve bench throughput|latency|startup`: one model on this machine, without a server.

Prompts are real text (the Python language reference that every Python carries, or --text), cut into pieces of equal
length; end-of-text is ignored, so that every request makes exactly the tokens asked for. Imports nothing heavy at the
top: the command line reads this file for its flags.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.errors import FastserveError

if TYPE_CHECKING:
    from fastserve.llm import LLM

PERCENTILES = (10, 25, 50, 75, 90, 99)
QUIET_SHARE = 0.06  # of the machine, taken by others: above it a figure is marked


# --- the text and the clock ---


def english_text(path: str | None) -> str:
    if path is not None:
        return Path(path).read_text()
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def cut_prompts(ids: list[int], num: int, length: int, num_shared: int = 0, offset: int = 0) -> list[list[int]]:
    """`num` prompts of num_shared common and `length` own tokens of a text, which starts again where it ends."""

    def piece(begin: int, count: int) -> list[int]:
        return [ids[(begin + i) % len(ids)] for i in range(count)]

    shared = piece(offset, num_shared)
    return [shared + piece(offset + num_shared + i * length, length) for i in range(num)]


def busy_seconds() -> float:
    """CPU time that the whole machine has spent since it started; 0 where that is not known."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
    return float(user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Stopwatch:
    """Wall time of a block, and the share of the machine that other processes took meanwhile."""

    seconds = 0.0
    others = 0.0

    def __enter__(self) -> Stopwatch:
        self._begin, self._busy, self._own = time.perf_counter(), busy_seconds(), own_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begin
        foreign = busy_seconds() - self._busy - (own_seconds() - self._own)
        share = foreign / self.seconds / (os.cpu_count() or 1)
        self.others = min(max(0.0, share), 1.0)  # the kernel counts in ticks of 10 ms: a short block can be off by some


@dataclass(frozen=True)
class Run:
    seconds: float
    first_s: float  # until all requests had their first token
    ttfts: list[float]
    others: float


def run(llm: LLM, prompts: list[list[int]], num_output: int) -> Run:
    from fastserve.config import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
    with Stopwatch() as watch:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for output in outputs:
        if len(output.outputs[0].token_ids) != num_output:
            raise FastserveError(f"a request made {len(output.outputs[0].token_ids)} tokens instead of {num_output}")
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    begin = min(m.arrival_s for m in metrics)
    ttfts = [(m.first_token_s or m.arrival_s) - m.arrival_s for m in metrics]
    return Run(watch.seconds, max(m.first_token_s or begin for m in metrics) - begin, ttfts, watch.others)


def open_model(arguments: argparse.Namespace, **options: Any) -> LLM:
    from fastserve.llm import LLM

    given = {
        "dtype": arguments.dtype,
        "num_threads": arguments.num_threads,
        "max_num_batched_tokens": arguments.max_num_batched_tokens,
        **options,
    }
    return LLM(arguments.model, **{name: value for name, value in given.items() if value is not None})


def finish(arguments: argparse.Namespace, figures: dict[str, Any], lines: list[str]) -> int:
    from fastserve import __version__, _native
    from fastserve.doctor import cpu_name

    figures["machine"] = {
        "cpu": cpu_name(),
        "isa": _native.isa(),
        "threads": _native.num_threads(),
        "version": __version__,
        "command": " ".join(sys.argv),
    }
    print(f"fastserve {__version__}, {arguments.model}; {cpu_name()}, {_native.num_threads()} threads, {_native.isa()}")
    print("\n".join(lines))
    if figures.get("others", 0.0) > QUIET_SHARE:
        print(f"Other processes took {100 * figures['others']:.0f} % of the machine: these figures mean little.")
    if arguments.output_json:
        Path(arguments.output_json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


# --- throughput ---


def add_throughput_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--num-prompts", type=int, default=64, help="requests of the batch (default: 64)")
    parser.add_argument("--prefix-len", type=int, default=0, help="tokens that all prompts begin with (default: 0)")
    parser.add_argument("--repeat", type=int, default=3, help="runs; medians are printed (default: 3)")


def run_throughput(arguments: argparse.Namespace) -> int:
    num, length, shared = arguments.num_prompts, arguments.input_len, arguments.prefix_len
    llm = open_model(arguments)
    ids = llm.get_tokenizer().encode(english_text(arguments.text))
    run(llm, cut_prompts(ids, 2, 16, offset=len(ids) // 2), 2)  # first-use costs
    runs: dict[str, list[Run]] = {"cold": [], "warm": []}
    for turn in range(arguments.repeat):  # other text in each turn: nothing is cached when it starts
        prompts = cut_prompts(ids, num, length, shared, offset=turn * (shared + num * length))
        for state in runs if shared else ("cold",):
            runs[state].append(run(llm, prompts, arguments.output_len))
    figures: dict[str, Any] = {"num_prompts": num, "input_len": length, "prefix_len": shared}
    figures["output_len"] = arguments.output_len
    lines = [f"{num} prompts of {shared + length} tokens ({shared} in common), {arguments.output_len} tokens each"]
    for state, measured in runs.items():
        if not measured:
            continue
        seconds = statistics.median(one.seconds for one in measured)
        decode_s = statistics.median(one.seconds - one.first_s for one in measured)
        figures[state] = {
            "seconds": seconds,
            "all_seconds": [one.seconds for one in measured],
            "requests_per_s": num / seconds,
            "output_tokens_per_s": num * arguments.output_len / seconds,
            "total_tokens_per_s": num * (shared + length + arguments.output_len) / seconds,
            "decode_tokens_per_s": num * (arguments.output_len - 1) / decode_s if arguments.output_len > 1 else None,
        }
        spread = f"{min(one.seconds for one in measured):.2f} to {max(one.seconds for one in measured):.2f}"
        one = figures[state]
        lines.append(
            f"{state}: {seconds:.2f} s ({spread}), {one['output_tokens_per_s']:.1f} output tok/s, "
            f"{one['total_tokens_per_s']:.1f} tok/s with the prompts"
        )
    figures["others"] = max(one.others for measured in runs.values() for one in measured)
    llm.close()
    return finish(arguments, figures, lines)


# --- latency ---


def add_latency_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--batch-size", type=int, default=1, help="requests at the same time (default: 1)")
    parser.add_argument("--num-iters-warmup", type=int, default=1, help="runs that are not measured (default: 1)")
    parser.add_argument("--num-iters", type=int, default=5, help="runs (default: 5)")


def run_latency(arguments: argparse.Namespace) -> int:
    import numpy as np

    num, length = arguments.batch_size, arguments.input_len
    llm = open_model(arguments, enable_prefix_caching=False)
    ids = llm.get_tokenizer().encode(english_text(arguments.text))
    prompts = cut_prompts(ids, num, length)
    for _ in range(arguments.num_iters_warmup):
        run(llm, prompts, arguments.output_len)
    measured = [run(llm, prompts, arguments.output_len) for _ in range(arguments.num_iters)]
    seconds = [one.seconds for one in measured]
    figures: dict[str, Any] = {
        "avg_latency": float(np.mean(seconds)),
        "latencies": seconds,
        "percentiles": {str(p): float(np.percentile(seconds, p)) for p in PERCENTILES},
        "median_ttft_s": statistics.median(ttft for one in measured for ttft in one.ttfts),
        "prefill_tokens_per_s": statistics.median(num * length / one.first_s for one in measured),
        "others": max(one.others for one in measured),
    }
    lines = [
        f"batch of {num}: {length} tokens in, {arguments.output_len} out, {arguments.num_iters} runs",
        f"latency: mean {figures['avg_latency']:.3f} s, "
        + ", ".join(f"p{p} {figures['percentiles'][str(p)]:.3f}" for p in PERCENTILES),
        f"first token: {figures['median_ttft_s']:.3f} s; prompts: {figures['prefill_tokens_per_s']:.1f} tok/s",
    ]
    if arguments.output_len > 1:
        decode = [num * (arguments.output_len - 1) / (one.seconds - one.first_s) for one in measured]
        figures["decode_tokens_per_s"] = statistics.median(decode)
        lines.append(f"decoding: {statistics.median(decode):.1f} tok/s ({min(decode):.1f} to {max(decode):.1f})")
    llm.close()
    return finish(arguments, figures, lines)


# --- startup ---

REQUESTS = 64  # at a time, where memory is measured

_FIRST_TOKEN = """
import json, sys, time
begin = time.perf_counter()
from fastserve.llm import LLM
from fastserve.config import SamplingParams
imported = time.perf_counter()
llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
loaded = time.perf_counter()
llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
figures = {
    "import_s": imported - begin, "load_s": loaded - imported, "first_token_s": time.perf_counter() - loaded,
    "seconds": time.time() - float(sys.argv[3]),
}

from fastserve.engine.memory import peak_memory_bytes

runner, requests = llm.loaded.runner, int(sys.argv[4])
length = min(llm.loaded.config.max_num_batched_tokens // requests + 1, runner.max_model_len - 2)
params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
llm.generate([[5 + i] * length for i in range(requests)], params, use_tqdm=False)
for cache in runner.kv_cache:
    cache.zero_()  # all of it is there now
plan, peak = runner.memory_plan, peak_memory_bytes()
figures |= {"peak_bytes": peak, "weight_bytes": plan.weight_bytes, "kv_bytes": plan.kv_bytes}
print(json.dumps({**figures, "other_bytes": peak - plan.weight_bytes - plan.kv_bytes}))
"""


def add_startup_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--num-threads", type=int, help="threads (default: the physical cores)")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=1 << 28, help="of the KV cache (default: 256 MB)")
    parser.add_argument("--num-iters", type=int, default=3, help="processes, one after the other (default: 3)")
    parser.add_argument("--output-json", help="write all figures to this file")


def run_startup(arguments: argparse.Namespace) -> int:
    """New processes, so that imports count; all but the first find the files in the page cache.

    Memory is the peak of such a process after a full step, 64 requests at a time and a write to all of the KV cache.
    `other_bytes` is what is neither the weights as they are kept nor the KV cache asked for.
    """
    names = ("dtype", "num_threads", "kv_cache_memory_bytes")
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    measured = []
    others = 0.0
    for _ in range(arguments.num_iters):
        with Stopwatch() as watch:
            given = [arguments.model, json.dumps(options), str(time.time()), str(REQUESTS)]
            command = [sys.executable, "-c", _FIRST_TOKEN, *given]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise FastserveError(f"the process failed: {done.stderr.strip().splitlines()[-1:]}")
        measured.append(json.loads(done.stdout.splitlines()[-1]))
        others = max(others, watch.others)
    median = {name: statistics.median(one[name] for one in measured) for name in measured[0]}
    figures: dict[str, Any] = {"median": median, "runs": measured, "others": others}
    lines = [
        f"start to first token, {arguments.num_iters} new processes: {median['seconds']:.2f} s "
        f"({min(one['seconds'] for one in measured):.2f} to {max(one['seconds'] for one in measured):.2f})",
        f"of it imports {median['import_s']:.2f} s, model {median['load_s']:.2f} s, "
        f"first token {median['first_token_s']:.2f} s",
        f"peak memory {median['peak_bytes'] / 1e6:.0f} MB: weights {median['weight_bytes'] / 1e6:.0f}, KV cache "
        f"{median['kv_bytes'] / 1e6:.0f}, all else {median['other_bytes'] / 1e6:.0f}",
    ]
    return finish(arguments, figures, lines)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--num-threads", type=int, help="threads (default: the physical cores)")
    parser.add_argument("--max-num-batched-tokens", type=int, help="tokens of one step")
    parser.add_argument("--input-len", type=int, default=128, help="own tokens of a prompt (default: 128)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens to generate for each (default: 128)")
    parser.add_argument("--text", help="a UTF-8 file to cut prompts from (default: Python's language reference)")
    parser.add_argument("--output-json", help="write all figures to this file")
