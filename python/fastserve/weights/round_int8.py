# SPDX-License-Identifier: Apache-2.0
"""Weights rounded to 8 bits for `linear_int8`."""

from __future__ import annotations

import torch

GROUP_SIZE = 32
ROWS_AT_ONCE = 8192  # so that the float32 copies of a large vocabulary stay small


def round_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Codes int8 [N, K] and scales float16 [N, ceil(K / 32)] with weight ~ scale * code, and the group size 32.

    The largest magnitude of a group becomes 127, as far as its scale fits float16; every code is the nearest for the
    scale as stored.
    """
    num_rows, depth = weight.shape
    num_groups = -(-depth // GROUP_SIZE)
    codes = torch.empty(num_rows, depth, dtype=torch.int8)
    scales = torch.empty(num_rows, num_groups, dtype=torch.float16)
    for begin in range(0, num_rows, ROWS_AT_ONCE):
        rows = weight[begin : begin + ROWS_AT_ONCE].float()
        groups = torch.nn.functional.pad(rows, (0, num_groups * GROUP_SIZE - depth)).unflatten(1, (-1, GROUP_SIZE))
        scale = (groups.abs().amax(2) / 127).half()
        nearest = torch.where(scale[..., None] > 0, groups / scale[..., None].float(), 0.0).round().clamp(-128, 127)
        codes[begin : begin + ROWS_AT_ONCE] = nearest.to(torch.int8).flatten(1)[:, :depth]
        scales[begin : begin + ROWS_AT_ONCE] = scale
    return codes, scales, GROUP_SIZE
