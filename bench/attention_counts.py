# SPDX-License-Identifier: Apache-2.0
"""What the CUDA attention kernel moves, counted on the simulated device: no GPU takes part.

    python bench/attention_counts.py              every workload
    python bench/attention_counts.py shared       those with "shared" in their name

Needs build/sim (make simulated). For each workload: KV bytes read over the fewest possible (each token of a prefix
once, each token of a request once, per KV head), the bytes of partial results written and read, and those that blocks
put aside between spans and take up again (always the same 100 or 200 KB of a block), both over KV bytes; sectors of 32
bytes over those that the bytes need, wavefronts of shared memory over those that its bandwidth needs, tensor-core
products over those that the visible tokens need. Where a prefix is shared, also how many times fewer bytes than if
nobody shared, with the partial results on both sides.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "cuda")]

from attention_cases import Groups, Shape, cuda_arguments, replanned  # noqa: E402
from cuda_device import ASYNC_MODES, load_simulated  # noqa: E402


@dataclass(frozen=True)
class Workload:
    name: str
    query_lens: list[int]
    seq_lens: list[int]
    heads: int
    kv_heads: int
    groups: Groups = field(default_factory=list)
    dim: int = 128
    span: int = 256
    num_workers: int = 16  # twice the simulated device's multiprocessors

    @property
    def shape(self) -> Shape:
        return Shape(self.heads, self.kv_heads, self.dim, 32, self.span, 0, torch.float16, self.num_workers)


def tree(num_leaves: int, root: int, branches: int, branch: int, leaf: int) -> tuple[list[int], Groups]:
    """Decodes that share `root` tokens, in `branches` groups `branch` more, and have `leaf` of their own."""
    per = num_leaves // branches
    groups = [(0, root, 0, num_leaves)]
    groups += [(root, root + branch, i * per, (i + 1) * per) for i in range(branches)]
    return [root + branch + leaf] * num_leaves, groups


TREE_LENGTHS, TREE_GROUPS = tree(16, 1024, 4, 512, 256)
WORKLOADS = [
    Workload("decode 1 x 4096", [1], [4096], 8, 2),
    Workload("decode 16 x 1000..1960", [1] * 16, [1000 + 64 * i for i in range(16)], 8, 2),
    Workload("chunk 128 at 1024", [128], [1152], 8, 2),
    Workload("mixed chunk 64 at 1024, 8 decodes x 1000", [64] + [1] * 8, [1088] + [1000] * 8, 8, 2),
    Workload("shared tree 16 x (1024 + 512 + 256), g 4", [1] * 16, TREE_LENGTHS, 4, 1, TREE_GROUPS),
    Workload("shared 128 x (2048 + 128), g 1", [1] * 128, [2176] * 128, 1, 1, [(0, 2048, 0, 128)]),
    Workload("shared 128 x (2048 + 128), g 4", [1] * 128, [2176] * 128, 4, 1, [(0, 2048, 0, 128)]),
    Workload("shared 128 x (2048 + 128), g 4, 4 KV heads", [1] * 128, [2176] * 128, 16, 4, [(0, 2048, 0, 128)]),
]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch."""

    kv: int
    partials: int  # written and read
    parked: int


def measure(module: Any, work: Workload, groups: Groups) -> tuple[dict[str, Any], Traffic]:
    """The counters of one launch with the plan that shares `groups`."""
    arguments = cuda_arguments(
        torch.Generator().manual_seed(1), work.query_lens, work.seq_lens, work.shape, work.groups
    )
    starts = torch.tensor([0, *work.query_lens]).cumsum(0).tolist()
    planned = replanned(starts, work.seq_lens, work.shape, groups=groups, tokens_per_partial=4)
    module.run("attention", {**arguments, **planned})
    (launch,) = json.loads(module.counters())
    workspace = launch["buffers"].get("workspace", {"read": 0, "written": 0})
    # Rows of heads: field 1 of an item are its rows, field 7 its partials; a merge has rows and a range of parts.
    written = int((planned["items"][:, 1] * planned["items"][:, 7]).sum()) * work.heads
    merges = planned["merges"]
    read = int((merges[:, 1] * (merges[:, 3] - merges[:, 2])).sum()) * work.heads
    # All lanes read a partial's maximum and sum, 8 bytes of one sector, which the counter takes for 32 times 8.
    counted = workspace["read"] + workspace["written"] - read * 31 * 8
    partials = (written + read) * (work.dim + 2) * 4
    return launch, Traffic(launch["buffers"]["kv_cache"]["read"], partials, counted - partials)


def fewest_tokens(work: Workload) -> int:
    """Tokens that one KV head must read: each shared one once."""
    own = sum(work.seq_lens)
    return own - sum((last - first - 1) * (end - begin) for begin, end, first, last in work.groups)


def ratio(counts: dict[str, int], counted: str, ideal: str) -> float:
    return counts[counted] / counts[ideal] if counts[ideal] else 1.0


def print_row(module: Any, work: Workload) -> None:
    launch, moved = measure(module, work, work.groups)
    bytes_per_token = 2 * work.dim * 2 * work.kv_heads
    least = fewest_tokens(work) * bytes_per_token
    sectors = max(ratio(launch["global"][kind], "sectors", "ideal_sectors") for kind in ("async",))
    shared = [ratio(launch["shared"][kind], "wavefronts", "ideal") for kind in ("ldmatrix", "async")]
    pairs = sum(
        (length - rows + i + 1) * work.heads
        for rows, length in zip(work.query_lens, work.seq_lens, strict=True)
        for i in range(rows)
    )
    products = pairs * work.dim * 2 / (16 * 8 * 16)
    print(
        f"{work.name:42} {moved.kv / 1e6:8.2f} {moved.kv / least:6.3f} {moved.partials / moved.kv:9.1%} "
        f"{moved.parked / moved.kv:8.1%} {1 / sectors:8.1%} "
        f"{max(shared):7.3f} {launch['mma'] / products:8.2f} {launch['warp_instructions'] / launch['mma']:8.2f}",
        end="",
    )
    if work.groups:
        _, unshared = measure(module, work, [])
        print(f" {(unshared.kv + unshared.partials) / (moved.kv + moved.partials):8.2f}", end="")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="", help="part of a workload's name")
    arguments = parser.parse_args()
    module = load_simulated()
    if module is None:
        raise SystemExit("there is no build/sim: run `make simulated`")
    module.configure(ASYNC_MODES["late"], 0)
    columns = ("KV MB", "/least", "partials", "parked", "sectors", "banks", "products", "PTX/mma", "unshared")
    print(" " * 42 + "{:>9}{:>7}{:>10}{:>9}{:>9}{:>8}{:>9}{:>9}{:>9}".format(*columns))
    for work in WORKLOADS:
        if arguments.name in work.name:
            print_row(module, work)


if __name__ == "__main__":
    main()
