# SPDX-License-Identifier: Apache-2.0
"""An offline batch whose prompts share prefixes, in a KV cache too small for them all: planned, and as it arrives.

    python bench/offline_prefixes.py MODEL_FOLDER [--groups 8] [--members 8] [--shared 512] [--own 32] [--out 32]

Both runs are on the same engine, whose cache holds two groups. `planned` is LLM.generate; `arrival` is the same with
batch_order="arrival": first come, first served, with the prefix cache alone (least recently used goes first). Runs
alternate; figures are medians with their range. Then the time to analyse 10,000 prompts of 1,000 tokens, on one core.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefix_analysis import analysis_figures

from fastserve import LLM, SamplingParams, _native
from fastserve.doctor import cpu_name
from fastserve.engine.prefix_plan import plan_prefixes
from fastserve.tokenizer import Tokenizer

TEXT = Path(__file__).resolve().parent.parent / "LICENSE"


def main() -> None:
    parser = argparse.ArgumentParser(description="Global prefix sharing of an offline batch, against an LRU cache.")
    parser.add_argument("model")
    for name, default in (("groups", 8), ("members", 8), ("shared", 512), ("own", 32), ("out", 32), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--groups-in-cache", type=int, default=2)
    parser.add_argument("--admission", default="past_future", help="a module of fastserve.admission")
    parser.add_argument("--num-threads", type=int)
    given = parser.parse_args()
    options = {"num_threads": given.num_threads} if given.num_threads else {}

    block_size = 32
    blocks_of_group = -(-given.shared // block_size) + given.members * -(-(given.own + given.out) // block_size)
    options |= {
        "num_blocks": given.groups_in_cache * blocks_of_group,
        "block_size": block_size,
        "admission": given.admission,
    }
    ids = Tokenizer.from_dir(given.model).encode(TEXT.read_text())
    prompts = make_prompts(ids, given)
    params = SamplingParams(temperature=0, max_tokens=given.out, ignore_eos=True)
    plan = plan_prefixes(prompts, [params] * len(prompts), block_size)
    print(f"{cpu_name()}, {given.num_threads or 'all'} threads, {_native.isa()}; {Path(given.model).name}")
    print(
        f"{len(prompts)} requests = {given.groups} groups x {given.members}, {given.shared} shared + {given.own} own "
        f"tokens, {given.out} out, in random order; a cache of {options['num_blocks']} blocks of {block_size} tokens, "
        f"{given.groups_in_cache} groups"
    )
    saved = 1 - plan.min_computed / plan.num_tokens
    print(f"prompt tokens: {plan.num_tokens}; to compute at best {plan.min_computed}: {saved:.1%} saved")

    runs: dict[str, list[Run]] = {"planned": [], "arrival": []}
    for _ in range(given.repeat):
        for name, order in (("planned", "prefix"), ("arrival", "arrival")):
            runs[name].append(run(given.model, prompts, params, options | {"batch_order": order}))
    assert len({str(one.tokens) for each in runs.values() for one in each}) == 1, "the tokens differ"
    for name, each in runs.items():
        one, rates = each[0], sorted(len(prompts) * given.out / run.seconds for run in each)
        of_best = one.num_prefilled / plan.min_computed
        print(
            f"{name}: {one.num_prefilled} prompt tokens computed, {of_best:.3f} of the best, "
            f"{one.num_preemptions} preemptions, {one.num_steps} steps; "
            f"{statistics.median(rates):.1f} output tok/s ({rates[0]:.1f} to {rates[-1]:.1f})"
        )
    pairs = zip(runs["planned"], runs["arrival"], strict=True)
    ratios = sorted(slow.seconds / fast.seconds for fast, slow in pairs)
    low, high = ratios[0], ratios[-1]
    print(f"planned / arrival: {statistics.median(ratios):.2f}x ({low:.2f} to {high:.2f}); all tokens are equal")
    analysis_figures()


@dataclass
class Run:
    seconds: float
    tokens: list[list[int]]
    num_prefilled: int  # prompt tokens computed, and whatever was computed again after a preemption
    num_preemptions: int
    num_steps: int


def run(model: str, prompts: list[list[int]], params: SamplingParams, options: dict[str, Any]) -> Run:
    """One engine with an empty cache, warmed up by one short prompt."""
    with LLM(model, **options) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2), use_tqdm=False)
        before = llm.loaded.engine.stats
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        after = llm.loaded.engine.stats
    decoded = sum(len(output.outputs[0].token_ids) - 1 for output in outputs)  # the last one is never computed
    return Run(
        seconds,
        [list(output.outputs[0].token_ids) for output in outputs],
        after.num_computed_tokens - before.num_computed_tokens - decoded,
        after.num_preemptions - before.num_preemptions,
        after.num_steps - before.num_steps,
    )


def make_prompts(ids: list[int], given: argparse.Namespace) -> list[list[int]]:
    """Text, cut so that groups differ from their first token and members from their first own token."""
    order = [(group, member) for group in range(given.groups) for member in range(given.members)]
    random.Random(0).shuffle(order)
    prompts = []
    for group, member in order:
        start = 97 * group
        own = 31 * (group * given.members + member) % (len(ids) - given.own)
        head = [100 + group, *(ids * 8)[start : start + given.shared - 1]]
        prompts.append([*head, 1000 + member, *ids[own : own + given.own - 1]])
    return prompts


if __name__ == "__main__":
    main()
