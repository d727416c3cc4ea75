# SPDX-License-Identifier: Apache-2.0
"""The one form of int8 weights: read from checkpoints or rounded here, packed by devices and gathered by embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastserve.errors import ModelLoadError
from fastserve.weights.quantized import GROUP_MULTIPLE

ROWS_AT_ONCE = 8192  # so that the float32 copies of a large vocabulary stay small


@dataclass(frozen=True)
class Int8Weight:
    """w[n, k] = scales[n, k // group_size] * codes[n, k], as GGUF's Q8_0 has it.

    codes: int8 [N, K]. scales: float16 [N, ceil(K / group_size)]. group_size: a multiple of 32, or K itself or more for
    one group per row.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.codes.numel() + 2 * self.scales.numel()

    def check(self, name: str) -> None:
        """Raises ModelLoadError naming the tensor unless every scale is a finite number."""
        if not bool(torch.isfinite(self.scales).all()):
            raise ModelLoadError(f"{name}: scales hold NaN or infinity; every scale must be a finite float16")

    def dequantize(self) -> torch.Tensor:
        """The weight as float32 [N, K], exactly."""
        _, depth = self.shape
        return self.codes.float().mul_(self.scales.float().repeat_interleave(self.group_size, dim=1)[:, :depth])

    def rows(self, order: torch.Tensor) -> Int8Weight:
        """Its rows in another order, or some of them."""
        return Int8Weight(self.codes[order], self.scales[order], self.group_size)

    @staticmethod
    def stack(weights: Sequence[Int8Weight]) -> Int8Weight:
        """The rows of several weights of the same inputs and group size under one another."""
        if len(weights) == 1:
            return weights[0]
        codes, scales = torch.cat([w.codes for w in weights]), torch.cat([w.scales for w in weights])
        return Int8Weight(codes, scales, weights[0].group_size)


def round_int8(weight: torch.Tensor, group_size: int = GROUP_MULTIPLE) -> Int8Weight:
    """The weight [N, K] of any float dtype in groups of `group_size` inputs, as in Int8Weight.

    The largest magnitude of a group becomes 127, as far as its scale fits float16; every code is the nearest for the
    scale as stored.
    """
    num_rows, depth = weight.shape
    size = min(group_size, depth)
    num_groups = -(-depth // size)
    codes = torch.empty(num_rows, depth, dtype=torch.int8)
    scales = torch.empty(num_rows, num_groups, dtype=torch.float16)
    for begin in range(0, num_rows, ROWS_AT_ONCE):
        rows = weight[begin : begin + ROWS_AT_ONCE].float()
        groups = torch.nn.functional.pad(rows, (0, num_groups * size - depth)).unflatten(1, (-1, size))
        scale = (groups.abs().amax(2) / 127).half()
        nearest = torch.where(scale[..., None] > 0, groups / scale[..., None].float(), 0.0).round().clamp(-128, 127)
        codes[begin : begin + ROWS_AT_ONCE] = nearest.to(torch.int8).flatten(1)[:, :depth]
        scales[begin : begin + ROWS_AT_ONCE] = scale
    return Int8Weight(codes, scales, group_size)
