# SPDX-License-Identifier: Apache-2.0
"""What three papers claim of scheduling, on simulated GPUs: this engine's scheduler beside the baselines. And how far
the cost of a step is from what was measured.

    python bench/scheduling_claims.py                    all of it, at the papers' scale
    python bench/scheduling_claims.py cost               the cost model against measurements
    python bench/scheduling_claims.py sarathi --scale 0.2

Prints a table for each; exits with 1 if a bar does not hold. docs/simulation.md explains them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from fastserve.config import EngineConfig
from fastserve.simulate.budget import choose_budget
from fastserve.simulate.cost import CostModel
from fastserve.simulate.hardware import find_gpu, find_model
from fastserve.simulate.report import summarize
from fastserve.simulate.simulation import simulate
from fastserve.simulate.workload import Arrival, Synthetic


@dataclass(frozen=True)
class Bar:
    """A figure and what it has to be."""

    what: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool:
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)

    def __str__(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return f"  {'ok  ' if self.holds else 'FAIL'} {self.what}: {self.value:.3f} ({bound})"


def run(arrivals: Iterable[Arrival], cost: CostModel, config: EngineConfig, **options: Any) -> dict[str, Any]:
    return summarize(simulate(arrivals, cost, config, **options))


# -- the cost of a step, against what was measured ------------------------------------------------------------------

SARATHI_MACHINE = CostModel(find_gpu("a6000"), find_model("llama-13b"))


@dataclass(frozen=True)
class Published:
    """A figure that SARATHI's paper gives for LLaMA-13B on an A6000."""

    what: str
    figure: float
    computed: Callable[[CostModel], float]
    bound: str = "about"  # or at most, at least

    def error(self, cost: CostModel = SARATHI_MACHINE) -> float:
        """As a share of the figure; 0 on the right side of a bound."""
        error = self.computed(cost) / self.figure - 1
        return {"about": error, "at most": max(error, 0.0), "at least": min(error, 0.0)}[self.bound]


def step_ms(cost: CostModel, chunk: int = 0, decodes: int = 0, context: int = 1024) -> float:
    rows = decodes + (chunk > 0)
    return 1e3 * cost.step([(chunk, 0)] if chunk else [], decodes, decodes * context, rows).total


def in_chunks(cost: CostModel, chunk: int, length: int = 2048) -> float:
    """Seconds for a prompt, over those for the whole in one step."""
    whole = cost.step([(length, 0)], 0, 0, 1).total
    return (
        sum(cost.step([(chunk, at)], 0, 0, int(at + chunk == length)).total for at in range(0, length, chunk)) / whole
    )


def attention_in_chunks(cost: CostModel, chunk: int, length: int = 2048) -> float:
    whole = cost.attention_seconds([(length, 0)])
    return sum(cost.attention_seconds([(chunk, at)]) for at in range(0, length, chunk)) / whole


PUBLISHED = (
    Published("ms for a token of a decode, batch of 4 at 1024", 12.49, lambda cost: step_ms(cost, 0, 4) / 4),
    Published(
        "ms for the same that rides on a prompt of 1021 tokens",
        1.2,
        lambda cost: (step_ms(cost, 1021, 3) - step_ms(cost, 1021)) / 3,
    ),
    Published("ms of a step of 128 tokens", 55.0, lambda cost: step_ms(cost, 128)),
    Published("ms of a step of 256 tokens", 69.8, lambda cost: step_ms(cost, 256)),
    Published("ms of a step of 257 tokens", 92.3, lambda cost: step_ms(cost, 257)),
    Published("times as long, a prompt in chunks of 64", 5.0, lambda cost: in_chunks(cost, 64)),
    Published("times as long, its attention alone", 3.0, lambda cost: attention_in_chunks(cost, 64)),
    Published("times as long, in chunks of 128", 2.0, lambda cost: in_chunks(cost, 128), "at least"),
    Published("times as long, in chunks of 256", 1.2, lambda cost: in_chunks(cost, 256), "at most"),
    Published("times as long, in chunks of 512", 1.1, lambda cost: in_chunks(cost, 512), "at most"),
    Published("of the peak rate, in chunks of 256", 0.875, lambda cost: 1 / in_chunks(cost, 256)),
)


def cost_of_a_step(scale: float = 1.0) -> list[Bar]:
    bars = []
    print(f"{'LLaMA-13B on an A6000':55}  computed  published   error")
    for point in PUBLISHED:
        bound = "" if point.bound == "about" else point.bound
        print(
            f"{point.what:55} {point.computed(SARATHI_MACHINE):9.3f} {bound:>8} {point.figure:5g} {point.error():+7.1%}"
        )
        bars.append(Bar(f"cost: {point.what}, error", abs(point.error()), at_most=0.2))
    return bars


# -- SARATHI: chunks that carry decodes, against steps of prompts and steps of decodes -----------------------------


@dataclass(frozen=True)
class SarathiCase:
    name: str
    gpu: str
    model: str
    max_num_seqs: int
    context: int  # prompt and output together
    fixed_budget: int | None = None  # None: what choose_budget says
    relative: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0)  # P:D as multiples of the balanced one

    @property
    def cost(self) -> CostModel:
        return CostModel(find_gpu(self.gpu), find_model(self.model))

    @property
    def budget(self) -> int:
        return self.fixed_budget or choose_budget(self.cost)

    @property
    def balance(self) -> float:
        """As many chunks as decode steps: each chunk of budget - decodes carries the decodes of the others."""
        return (self.budget - self.max_num_seqs + 1) / (self.max_num_seqs - 1)


SARATHI = (
    SarathiCase("13B on A6000", "a6000", "llama-13b", 18, 1024),
    SarathiCase("8B on A100", "a100", "llama-3-8b", 16, 1024),
    SarathiCase("13B on A6000", "a6000", "llama-13b", 18, 1024, 256),  # the paper's own two budgets
    SarathiCase("13B on A6000", "a6000", "llama-13b", 18, 1024, 512),
)


def sarathi(scale: float = 1.0, cases: Iterable[SarathiCase] = SARATHI) -> list[Bar]:
    bars = []
    for case in cases:
        cost = case.cost
        config = EngineConfig(
            max_num_batched_tokens=case.budget, max_num_seqs=case.max_num_seqs, block_size=16, policy="fcfs"
        )
        whole = replace(config, max_num_batched_tokens=case.context)
        label = f"{case.name}, {case.max_num_seqs} requests, budget {case.budget}"
        print(f"SARATHI {label}: balanced at P:D {case.balance:.1f}")
        ratios, itl = {}, {}
        for relative in case.relative:
            prompt = round(case.context * (1 - 1 / (1 + relative * case.balance)))
            load = Synthetic(max(8 * case.max_num_seqs, round(1600 * scale)), str(prompt), str(case.context - prompt))
            mixed = run(load.arrivals(), cost, config)
            separate = run(load.arrivals(), cost, whole, separate=True)
            ratios[relative] = mixed["tokens_per_s"] / separate["tokens_per_s"]
            itl[relative] = mixed["itl_s"].get("p99", 0.0)
            print(
                f"    P:D {relative:5.2f} x balance ({prompt} + {case.context - prompt}): {ratios[relative]:.3f}x, "
                f"p99 gap {itl[relative] * 1e3:.1f} ms, separate {separate['itl_s'].get('p99', 0.0) * 1e3:.1f} ms"
            )
        decodes = case.max_num_seqs - 1
        chunk = cost.step(
            [(case.budget - decodes, case.context // 2)], decodes, decodes * case.context, case.max_num_seqs
        )
        if 1.0 in ratios:
            bars.append(Bar(f"{label}: throughput at balance over separate steps", ratios[1.0], at_least=1.2))
            bars.append(Bar(f"{label}: p99 gap over a chunk step's time", itl[1.0] / chunk.total, at_most=1.3))
        if case.fixed_budget is None:  # too small a budget costs prompts their rate: nobody has to choose one
            bars.append(Bar(f"{label}: the least throughput ratio of all P:D", min(ratios.values()), at_least=0.98))
    return bars


# -- BatchLLM: groups of equal prefixes, against an LRU cache in order of arrival ----------------------------------


def batchllm(scale: float = 1.0, members: int = 16, prefix: int = 2000, own: int = 200, output: int = 100) -> list[Bar]:
    """Memory for a tenth of the prefixes, beside nothing else."""
    num_prefixes = max(20, round(400 * scale))
    cost = CostModel(find_gpu("a100"), find_model("qwen2.5-7b"))
    config = EngineConfig(
        max_num_batched_tokens=2048,
        max_num_seqs=128,
        block_size=16,
        num_blocks=num_prefixes // 10 * prefix // 16,
    )
    load = Synthetic(
        num_prefixes * members, str(own), str(output), num_prefixes=num_prefixes, prefix_tokens=prefix, order="random"
    )
    optimum = num_prefixes * (members - 1) * prefix
    figures = {}
    for order in ("random", "planned"):  # the same requests in the same random order
        figures[order] = result = run(load.arrivals(), cost, config, batch=order == "planned")
        saved = result["cached_prompt_tokens"] / optimum
        print(
            f"BatchLLM {num_prefixes} prefixes x {members} members, {order}: {saved:.1%} of what can be saved, "
            f"{result['requests_per_s']:.2f} requests/s, {result['tokens_per_step']:.0f} tokens a step"
        )
    return [
        Bar(
            "BatchLLM, LRU by arrival: share of the optimum saved",
            _saved(figures["random"], optimum),
            None,
            0.3,
        ),
        Bar("BatchLLM, planned: share of the optimum saved", _saved(figures["planned"], optimum), at_least=0.95),
        Bar(
            "BatchLLM, planned: throughput over LRU",
            figures["planned"]["requests_per_s"] / figures["random"]["requests_per_s"],
            at_least=1.3,
        ),
    ]


def _saved(summary: dict[str, Any], optimum: int) -> float:
    return float(summary["cached_prompt_tokens"]) / optimum


# -- Past-Future: admission by the predicted peak, against hope and against the worst case -------------------------

DISTRIBUTIONS = (("32-4096", "2048-4096"), ("3000-5000", "3000-5000"), ("2048-4096", "32-4096"))


def past_future(
    scale: float = 1.0, shrink: int = 1, distributions: Iterable[tuple[str, str]] = DISTRIBUTIONS
) -> list[Bar]:
    """120,000 tokens of memory, all requests waiting from the start. `shrink` divides every length and the memory."""
    cost = CostModel(find_gpu("a100"), find_model("llama-2-7b"))
    bars = []
    for prompt, output in distributions:
        low, high = (int(part) for part in output.split("-"))
        load = Synthetic(
            round(3000 * scale),
            "-".join(str(int(part) // shrink) for part in prompt.split("-")),
            f"{max(1, low // shrink)}-{high // shrink}",
            max_tokens=high // shrink,
        )
        figures = {}
        for name in ("aggressive", "conservative", "past_future", "oracle"):
            config = EngineConfig(
                max_num_batched_tokens=max(512 // shrink, 128),
                max_num_seqs=128,
                block_size=max(1, 16 // shrink),
                num_blocks=120_000 // shrink // max(1, 16 // shrink),
                max_model_len=16384,
                admission="past_future" if name == "oracle" else name,
                enable_prefix_caching=False,
            )
            figures[name] = result = run(load.arrivals(), cost, config, oracle=name == "oracle")
            print(
                f"Past-Future {prompt} / {output}, {name:>12}: {result['steps']} steps, "
                f"{result['makespan_s']:.0f} s, memory {result['memory_mean']:.1%}, "
                f"{result['preemptions_per_request']:.1%} preemptions per request"
            )
        ours, label = figures["past_future"], f"Past-Future {prompt} / {output}"
        evictions = figures["aggressive"]["preemptions"] / max(ours["preemptions"], 1)
        bars += [
            Bar(f"{label}: conservative / ours, steps", figures["conservative"]["steps"] / ours["steps"], 1.25),
            Bar(f"{label}: aggressive / ours, preemptions", evictions, 8),
            Bar(f"{label}: ours / oracle, steps", ours["steps"] / figures["oracle"]["steps"], None, 1.05),
        ]
    return bars


CLAIMS: dict[str, Callable[[float], list[Bar]]] = {
    "cost": cost_of_a_step,
    "sarathi": sarathi,
    "batchllm": batchllm,
    "past-future": past_future,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", choices=[[], *CLAIMS], help="which (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the requests (default: 1)")
    arguments = parser.parse_args()
    bars = [bar for name in arguments.claims or CLAIMS for bar in CLAIMS[name](arguments.scale)]
    print(*bars, sep="\n")
    return 0 if all(bar.holds for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
