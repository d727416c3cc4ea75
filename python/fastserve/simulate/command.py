# SPDX-License-Identifier: Apache-2.0
"""`fastserve simulate`: its arguments, and what it does with them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DESCRIPTION = """Serve a workload on a GPU that is not there: the engine's own scheduler, block pool and policies
run in virtual time, and a roofline says how long each step takes. Shows throughput, latency and memory before you buy,
and what a policy changes. Example: fastserve simulate --gpu a100 --model llama-3.1-8b --requests 2000 --rate 20
--prompt-tokens lognormal:800:0.8 --output-tokens exponential:200 --max-tokens 2000 --out run"""
LENGTH = "N, LOW-HIGH, lognormal:MEDIAN:SIGMA or exponential:MEAN"


def add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", required=True, help="a10, a6000, a100, h100, h200, or TFLOPS:TB/s:GB:SMS of another")
    parser.add_argument("--model", required=True, help="a name (an unknown one lists them) or a model folder")
    parser.add_argument("--weight-bits", type=float, help="bits of a linear weight (default: 16, or as in the folder)")
    load = parser.add_argument_group("workload")
    load.add_argument("--workload", metavar="FILE", help="a JSONL trace, one request a line (docs/simulation.md)")
    load.add_argument("--requests", type=int, default=1000, help="number of requests (default: 1000)")
    load.add_argument("--prompt-tokens", default="512", help=f"{LENGTH} (default: 512)")
    load.add_argument("--output-tokens", default="128", help=f"{LENGTH} (default: 128)")
    load.add_argument("--max-tokens", type=int, help="what each request allows (default: exactly its output)")
    load.add_argument("--rate", type=float, help="mean arrivals per second (default: all at the start)")
    load.add_argument("--prefixes", type=int, default=0, help="number of shared beginnings (default: 0)")
    load.add_argument("--prefix-tokens", type=int, default=0, help="tokens of each, before a prompt's own")
    orders = ("random", "grouped")
    load.add_argument("--order", choices=orders, default="random", help="of the shared beginnings (default: random)")
    load.add_argument("--seed", type=int, default=0, help="of the workload (default: 0)")
    group = parser.add_argument_group("engine")
    group.add_argument("--admission", default="past_future", help="past_future, aggressive, conservative or oracle")
    group.add_argument("--policy", default="fcfs", help="who starts first (default: fcfs)")
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        help="tokens of a step (default: what suits GPU and model, docs/simulation.md)",
    )
    group.add_argument("--max-num-seqs", type=int, default=128, help="requests of a step (default: 128)")
    group.add_argument("--max-model-len", type=int, help="longest context (default: the model's)")
    group.add_argument("--block-size", type=int, default=16, help="tokens of a KV block (default: 16)")
    group.add_argument("--num-blocks", type=int, help="KV blocks (default: what fits beside the weights)")
    group.add_argument("--no-prefix-caching", action="store_true", help="compute every prompt in full")
    group.add_argument("--batch", action="store_true", help="plan shared prefixes beforehand, as LLM.generate does")
    group.add_argument("--separate", action="store_true", help="baseline: prompts and decodes in steps of their own")
    out = parser.add_argument_group("output")
    out.add_argument("--out", metavar="DIR", help="write summary.json, trace.json (for ui.perfetto.dev), plots.png")
    out.add_argument("--no-plots", action="store_true", help="no plots.png (it needs matplotlib)")
    out.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Raises FastserveError for what cannot be simulated, OSError for files."""
    from tqdm import tqdm

    from fastserve.simulate.cost import CostModel
    from fastserve.simulate.report import summarize, table, write_trace
    from fastserve.simulate.simulation import simulate

    folder = Path(arguments.out) if arguments.out else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    arrivals, total = _workload(arguments)
    cost = CostModel(_gpu(arguments), _model(arguments))
    with tqdm(total=total, desc="Simulating", unit="request", disable=None) as bar:

        def progress(now: float) -> None:
            bar.update()
            if bar.n % 64 == 0:
                bar.set_postfix_str(f"virtual time {now:.1f} s", refresh=False)

        oracle = arguments.admission == "oracle"
        ways = {"batch": arguments.batch, "separate": arguments.separate, "oracle": oracle}
        result = simulate(arrivals, cost, _config(arguments, cost), progress=progress, **ways)
    summary = summarize(result)
    print(json.dumps(summary, indent=2) if arguments.json else table(summary))
    if folder is not None:
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        write_trace(result, folder / "trace.json")
        if not arguments.no_plots:
            from fastserve.simulate.plots import write_plots

            write_plots(result, folder / "plots.png")
        print(f"written to {folder}", file=sys.stderr)
    return 0


def _gpu(arguments: argparse.Namespace) -> Any:
    from fastserve.simulate.hardware import find_gpu

    return find_gpu(arguments.gpu)


def _model(arguments: argparse.Namespace) -> Any:
    from dataclasses import replace

    from fastserve.errors import InvalidRequest
    from fastserve.simulate.hardware import find_model

    model, bits = find_model(arguments.model), arguments.weight_bits
    if bits is None:
        return model
    if not 1 <= bits <= 32:
        raise InvalidRequest(f"--weight-bits {bits} is not allowed: it must be from 1 to 32")
    return replace(model, weight_bits=bits)


def _config(arguments: argparse.Namespace, cost: Any) -> Any:
    from fastserve.config import EngineConfig
    from fastserve.simulate.budget import choose_budget

    names = ("policy", "max_num_seqs", "max_model_len", "block_size", "num_blocks")
    budget = arguments.max_num_batched_tokens
    return EngineConfig(
        **{name: getattr(arguments, name) for name in names},
        max_num_batched_tokens=choose_budget(cost) if budget is None else budget,
        admission="past_future" if arguments.admission == "oracle" else arguments.admission,
        enable_prefix_caching=not arguments.no_prefix_caching,
    )


def _workload(arguments: argparse.Namespace) -> tuple[Iterable[Any], int | None]:
    from fastserve.errors import InvalidRequest
    from fastserve.simulate.workload import MAX_TOKENS, Synthetic, parse_lengths, read_trace

    if arguments.workload:
        return read_trace(arguments.workload), None
    bounds = {
        "requests": (1, 2**30),
        "max_tokens": (1, MAX_TOKENS),
        "rate": (1e-6, 1e9),
        "prefixes": (0, 2**29),
        "prefix_tokens": (1 if arguments.prefixes else 0, MAX_TOKENS),
    }
    for name, (low, high) in bounds.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            flag = "--" + name.replace("_", "-")
            raise InvalidRequest(f"{flag} {value} is not allowed: it must be from {low:g} to {high:g}")
    for text in (arguments.prompt_tokens, arguments.output_tokens):
        parse_lengths(text)
    workload = Synthetic(
        num_requests=arguments.requests,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        max_tokens=arguments.max_tokens,
        rate=arguments.rate,
        num_prefixes=arguments.prefixes,
        prefix_tokens=arguments.prefix_tokens,
        order=arguments.order,
        seed=arguments.seed,
    )
    return workload.arrivals(), arguments.requests
