# SPDX-License-Identifier: Apache-2.0
"""The one form of int4 weights that checkpoints are read into and devices pack from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastserve.errors import ModelLoadError

MAX_CODE = 15
SYMMETRIC_ZERO = 8  # the code of weight 0 where neither zero points nor minimums are given
GROUP_MULTIPLE = 32  # inputs that always share a scale


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [N, K] of 4-bit codes in groups along K.

    With g = k // group_size, one of three forms, each exact for the checkpoints that have it:

        symmetric    w[n, k] = scales[n, g] * (codes[n, k] - 8)                   GPTQ sym, Q4_0
        zero points  w[n, k] = scales[n, g] * (codes[n, k] - zero_points[n, g])   AWQ, GPTQ asym
        minimums     w[n, k] = scales[n, g] * codes[n, k] + minimums[n, g]        Q4_1

    codes: uint8 [N, K], values 0 to 15. scales: float16 [N, ceil(K / group_size)]. zero_points: int16, the same shape.
    minimums: float16, the same shape. group_size: a multiple of 32, or K itself or more for one group per row.
    input_order: int32 [K] or None. Column k of `codes` multiplies input input_order[k] (GPTQ's act-order, where the
    inputs of a group are not neighbours); None: input k.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int
    zero_points: torch.Tensor | None = None
    minimums: torch.Tensor | None = None
    input_order: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def form(self) -> int:
        """0 symmetric, 1 zero points, 2 minimums: the `form` of the op `linear_int4`."""
        return 2 if self.minimums is not None else int(self.zero_points is not None)

    @property
    def num_groups(self) -> int:
        return -(-self.shape[1] // self.group_size)

    def check(self, name: str) -> None:
        """Raises ModelLoadError naming the tensor unless all of the above holds and every number is finite."""
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint8:
            raise ModelLoadError(
                f"{name}: codes are {self.codes.dtype} {list(self.codes.shape)}; expected uint8 [N, K]"
            )
        num_rows, depth = self.shape
        whole_row = self.group_size >= depth
        if self.group_size < 1 or (self.group_size % GROUP_MULTIPLE != 0 and not whole_row):
            raise ModelLoadError(
                f"{name}: group size {self.group_size} is not supported; multiples of {GROUP_MULTIPLE} are, and one "
                f"group per row (here {depth} or more)"
            )
        if self.zero_points is not None and self.minimums is not None:
            raise ModelLoadError(f"{name}: has both zero points and minimums; a weight has at most one of them")
        expected = {"scales": torch.float16, "zero_points": torch.int16, "minimums": torch.float16}
        for field, dtype in expected.items():
            tensor = getattr(self, field)
            if tensor is None:
                continue
            if tensor.dtype != dtype or tuple(tensor.shape) != (num_rows, self.num_groups):
                raise ModelLoadError(
                    f"{name}: {field} are {tensor.dtype} {list(tensor.shape)}; expected {dtype} "
                    f"{[num_rows, self.num_groups]} for a weight {[num_rows, depth]} in groups of {self.group_size}"
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ModelLoadError(f"{name}: {field} hold NaN or infinity; every scale must be a finite float16")
        if self.codes.numel() and int(self.codes.max()) > MAX_CODE:
            raise ModelLoadError(f"{name}: code {int(self.codes.max())} does not fit in 4 bits")
        if self.zero_points is not None and self.zero_points.numel():
            low, high = int(self.zero_points.min()), int(self.zero_points.max())
            if low < 0 or high > MAX_CODE + 1:
                raise ModelLoadError(f"{name}: zero points from {low} to {high}; allowed are 0 to {MAX_CODE + 1}")
        order = self.input_order
        if order is not None and (
            order.dtype != torch.int32
            or tuple(order.shape) != (depth,)
            or not torch.equal(order.sort().values, torch.arange(depth, dtype=torch.int32))
        ):
            raise ModelLoadError(f"{name}: the order of inputs is not a permutation of 0 to {depth - 1}")

    def dequantize(self) -> torch.Tensor:
        """The weight as float32 [N, K], inputs in their own order. Slow; for references and conversions."""
        _, depth = self.shape

        def spread(groups: torch.Tensor) -> torch.Tensor:
            return groups.float().repeat_interleave(self.group_size, dim=1)[:, :depth]

        codes = self.codes.float()
        if self.minimums is not None:
            weight = spread(self.scales) * codes + spread(self.minimums)
        elif self.zero_points is not None:
            weight = spread(self.scales) * (codes - spread(self.zero_points))
        else:
            weight = spread(self.scales) * (codes - SYMMETRIC_ZERO)
        if self.input_order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.input_order.long(), weight)
        return weight

    def rows(self, order: torch.Tensor) -> QuantizedWeight:
        """Its rows in another order, or some of them."""

        def picked(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[order]

        return QuantizedWeight(
            self.codes[order], self.scales[order], self.group_size, picked(self.zero_points), picked(self.minimums),
            self.input_order,
        )  # fmt: skip

    @staticmethod
    def stack(weights: Sequence[QuantizedWeight], name: str) -> QuantizedWeight:
        """The rows of several weights of the same inputs under one another. They must agree in form, group size and
        order of inputs; ModelLoadError otherwise."""
        first = weights[0]
        for other in weights[1:]:
            same_form = all(
                (getattr(first, field) is None) == (getattr(other, field) is None)
                for field in ("zero_points", "minimums", "input_order")
            )
            if not same_form or other.group_size != first.group_size or other.shape[1] != first.shape[1]:
                raise ModelLoadError(f"{name}: projections of the same input are quantised in different forms")
            if first.input_order is not None and not torch.equal(first.input_order, _order_of(other)):
                raise ModelLoadError(f"{name}: projections of the same input order their inputs differently")

        def joined(field: str) -> torch.Tensor | None:
            parts = [getattr(weight, field) for weight in weights]
            return None if parts[0] is None else torch.cat(parts)

        codes, scales = joined("codes"), joined("scales")
        assert codes is not None
        assert scales is not None
        return QuantizedWeight(
            codes, scales, first.group_size, joined("zero_points"), joined("minimums"), first.input_order
        )


def _order_of(weight: QuantizedWeight) -> torch.Tensor:
    assert weight.input_order is not None
    return weight.input_order
