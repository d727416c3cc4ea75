# SPDX-License-Identifier: Apache-2.0
"""How long the prefix analysis of a whole batch takes on one core, and its memory.

    python bench/prefix_analysis.py [--prompts 10000] [--length 1000] [--no-lists]

For each kind of batch: the analysis of token ids that lie in one array, and the whole plan of prompts that are Python
lists. A million prompts of 1,000 tokens are 4 GB of token ids; as lists they would be 8 GB more: give --no-lists.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from fastserve import SamplingParams, _native
from fastserve.engine.prefix_plan import plan_prefixes

BLOCK_SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the global prefix analysis.")
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=1_000)
    parser.add_argument("--no-lists", action="store_true", help="only the analysis, no plan of Python lists")
    given = parser.parse_args()
    analysis_figures(given.prompts, given.length, lists=not given.no_lists)


def analysis_figures(num_prompts: int = 10_000, length: int = 1_000, *, lists: bool = True) -> None:
    groups = max(1, num_prompts // 100)
    for name, num_groups, shared in (
        (f"{groups} groups share {length * 4 // 5}", groups, length * 4 // 5),
        (f"one group shares {length - length // 100}", 1, length - length // 100),
        ("nothing shared", num_prompts, 0),
    ):
        tokens = make_tokens(num_prompts, length, num_groups, shared)
        starts = np.arange(num_prompts + 1) * length
        before = reset_peak_memory()
        begin = time.process_time()
        analysis = _native.PrefixAnalysis(tokens.reshape(-1), starts, block_size=BLOCK_SIZE)
        seconds = time.process_time() - begin
        num_bytes = peak_memory() - before
        from_lists = ""
        if lists:
            prompts, params = tokens.tolist(), [SamplingParams()] * num_prompts
            begin = time.process_time()
            plan_prefixes(prompts, params, BLOCK_SIZE)
            from_lists = f", {time.process_time() - begin:.2f} s from Python lists"
        saved = 1 - analysis.num_computed / analysis.num_tokens
        print(
            f"analysis of {num_prompts} prompts of {length} tokens, {name}: {seconds * 1e3:.0f} ms, "
            f"{num_bytes / 1e6:.0f} MB ({num_bytes / tokens.size:.3f} bytes a token){from_lists}; {saved:.1%} saved"
        )


def make_tokens(num_prompts: int, length: int, num_groups: int, shared: int) -> np.ndarray:
    """int32 [prompts, length]: the groups in random order, each with one beginning."""
    random = np.random.default_rng(0)
    heads = random.integers(0, 50_000, (num_groups, shared), dtype=np.int32)
    group = random.permutation(np.arange(num_prompts) % num_groups)
    tokens = np.empty((num_prompts, length), np.int32)
    for begin in range(0, num_prompts, 10_000):  # no temporary of the whole size
        part = tokens[begin : begin + 10_000]
        part[:, :shared] = heads[group[begin : begin + 10_000]]
        part[:, shared:] = random.integers(0, 50_000, (len(part), length - shared), dtype=np.int32)
    return tokens


def reset_peak_memory() -> int:
    """Bytes in use now, from which `peak_memory` counts on."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
