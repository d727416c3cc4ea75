# SPDX-License-Identifier: Apache-2.0
"""The blocks of GGUF files that are kept code for code: Q4_0 and Q4_1 as QuantizedWeight, Q8_0 as Int8Weight.

A block holds 32 neighbours of a row. In 4 bits: the scale, in Q4_1 also the minimum, both float16, and 16 bytes whose
low nibbles are the first 16 codes and whose high nibbles the other 16. Q4_0 means scale * (code - 8), Q4_1 scale * code
+ minimum. Q8_0: the scale, and 32 signed bytes; scale * code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from fastserve.weights.int8 import Int8Weight
from fastserve.weights.quantized import SYMMETRIC_ZERO, QuantizedWeight

BLOCK = 32
FLOATS_OF = {"Q4_0": 1, "Q4_1": 2}  # in front of each block's codes
# Projections of the same input, which an engine computes as one matrix: they are kept together, in one form.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
VOCABULARY = ("model.embed_tokens", "lm_head")  # kept in 8 bits, not in 4


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


def read_int8(data: np.ndarray, num_rows: int, depth: int) -> Int8Weight:
    """The same of Q8_0."""
    blocks = torch.from_numpy(np.array(data, dtype=np.uint8)).reshape(num_rows, depth // BLOCK, 2 + BLOCK)
    codes = blocks[..., 2:].contiguous().view(torch.int8).reshape(num_rows, depth)
    return Int8Weight(codes, blocks[..., :2].contiguous().view(torch.float16)[..., 0].contiguous(), BLOCK)


def with_minimums(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight with minimums in place of the fixed zero; exact, for 8 is a power of two."""
    if weight.minimums is not None:
        return weight
    return replace(weight, minimums=weight.scales * -SYMMETRIC_ZERO)


def kept_kinds(kinds: Mapping[str, str]) -> dict[str, str]:
    """Which matrices stay as they are, by name without ".weight", and in which form: Q4_0, Q4_1 (also Q4_0 beside Q4_1)
    or Q8_0. From the type of each tensor."""
    chosen: dict[str, str] = {}
    for name, kind in kinds.items():
        matrix = name.removesuffix(".weight")
        prefix, _, last = matrix.rpartition(".")
        if matrix in VOCABULARY and kind == "Q8_0":
            chosen[matrix] = kind
        if not last.endswith("_proj"):
            continue
        mates = next((group for group in TOGETHER if last in group), (last,))
        theirs = {kinds[f"{prefix}.{mate}.weight"] for mate in mates}
        if theirs <= set(FLOATS_OF):
            chosen[matrix] = max(theirs)
        elif theirs == {"Q8_0"}:
            chosen[matrix] = kind
    return chosen
