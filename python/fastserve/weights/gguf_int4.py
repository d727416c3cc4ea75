# SPDX-License-Identifier: Apache-2.0
"""The 4-bit blocks of GGUF files as QuantizedWeight, code for code.

A block holds 32 neighbours of a row: the scale, in Q4_1 also the minimum, both float16, and 16 bytes whose low nibbles
are the first 16 codes and whose high nibbles the other 16. Q4_0 means scale * (code - 8), Q4_1 scale * code + minimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from fastserve.weights.quantized import SYMMETRIC_ZERO, QuantizedWeight

BLOCK = 32
FLOATS_OF = {"Q4_0": 1, "Q4_1": 2}  # in front of each block's codes
# Projections of the same input, which an engine computes as one matrix: they are int4 together, in one form.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def read_int4(data: np.ndarray, kind: str, num_rows: int, depth: int) -> QuantizedWeight:
    """The blocks (uint8, of a whole tensor) of a weight [num_rows, depth]; `kind` is Q4_0 or Q4_1. The scales are as
    the file has them, finite or not."""
    num_floats = FLOATS_OF[kind]
    blocks = torch.from_numpy(np.array(data, dtype=np.uint8)).reshape(num_rows, depth // BLOCK, -1)
    floats = blocks[..., : 2 * num_floats].contiguous().view(torch.float16)
    packed = blocks[..., 2 * num_floats :]
    codes = torch.cat((packed & 15, packed >> 4), dim=-1).reshape(num_rows, depth)
    minimums = floats[..., 1].contiguous() if num_floats == 2 else None
    return QuantizedWeight(codes, floats[..., 0].contiguous(), BLOCK, minimums=minimums)


def with_minimums(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight with minimums in place of the fixed zero; exact, for 8 is a power of two."""
    if weight.minimums is not None:
        return weight
    return replace(weight, minimums=weight.scales * -SYMMETRIC_ZERO)


def int4_linears(kinds: Mapping[str, str]) -> dict[str, bool]:
    """Which linears stay int4: name (without ".weight") -> whether with minimums, from the type of each tensor."""
    chosen: dict[str, bool] = {}
    for name, kind in kinds.items():
        prefix, _, last = name.removesuffix(".weight").rpartition(".")
        if not last.endswith("_proj") or kind not in FLOATS_OF:
            continue
        mates = next((group for group in TOGETHER if last in group), (last,))
        theirs = [kinds[f"{prefix}.{mate}.weight"] for mate in mates]
        if all(other in FLOATS_OF for other in theirs):
            chosen[f"{prefix}.{last}"] = "Q4_1" in theirs
    return chosen
