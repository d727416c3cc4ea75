# SPDX-License-Identifier: Apache-2.0
"""Rounds weights to 4-bit codes: for each group of inputs the grid with the least squared error among a few dozen.

Plain rounding takes the grid that just holds the largest weight. A slightly smaller one clips that weight and serves
all others better; which one is found by trying (the clipping search of AWQ and OmniQuant, here for each group).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastserve.weights.quantized import MAX_CODE, SYMMETRIC_ZERO, QuantizedWeight

FORMS = ("symmetric", "zero-points", "minimums")
LEAST_SQUARES_ROUNDS = 2
ELEMENTS_AT_ONCE = 1 << 24  # of temporaries: 64 MB each


@dataclass(frozen=True)
class Grid:
    """The 16 values that each row of a group can take: scale * (code - zero_point), or scale * code + minimum.

    scales, minimums: float32 [R] holding float16 values; zero_points: float32 [R] holding integers 0 to 15. One of
    the last two is None.
    """

    scales: torch.Tensor
    zero_points: torch.Tensor | None
    minimums: torch.Tensor | None

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest codes, as float32 [R, G], of float32 values [R, G]."""
        inverse = torch.where(self.scales != 0, 1 / self.scales, torch.zeros_like(self.scales))[:, None]
        if self.minimums is not None:
            codes = (values - self.minimums[:, None]) * inverse
        else:
            assert self.zero_points is not None
            codes = values * inverse + self.zero_points[:, None]
        return codes.round_().clamp_(0, MAX_CODE)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What float32 codes [R, G] stand for."""
        if self.minimums is not None:
            return self.scales[:, None] * codes + self.minimums[:, None]
        assert self.zero_points is not None
        return self.scales[:, None] * (codes - self.zero_points[:, None])

    def error(self, values: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """[R]: the squared error of rounding `values`, weighted by `importance` [G]."""
        difference = self.values(self.codes(values)).sub_(values).square_()
        return difference.sum(1) if importance is None else difference @ importance


def choose_grid(values: torch.Tensor, form: str, importance: torch.Tensor | None = None) -> Grid:
    """The best grid that is tried for each row of `values` (float32 [R, G], one group of R outputs).

    importance: float32 [G], how much the squared error of each input counts; None: all the same.
    """
    grids = iter({"symmetric": _symmetric, "zero-points": _zero_points, "minimums": _minimums}[form](values))
    best = next(grids)
    error = best.error(values, importance)
    for grid in grids:
        best, error = _better(best, error, grid, grid.error(values, importance))
    for _ in range(LEAST_SQUARES_ROUNDS if form == "minimums" else 0):
        grid = _least_squares(values, best.codes(values), importance)
        best, error = _better(best, error, grid, grid.error(values, importance))
    return best


def round_int4(
    weight: torch.Tensor, group_size: int, form: str, importance: torch.Tensor | None = None
) -> QuantizedWeight:
    """Rounds each weight of float32 [N, K] to the nearest value of its group's best grid.

    group_size: as in QuantizedWeight. form: one of FORMS. importance: float32 [K] or None, see `choose_grid`.
    """
    num_rows, depth = weight.shape
    codes = torch.empty((num_rows, depth), dtype=torch.uint8)
    grids = GroupGrids(num_rows, depth, group_size, form)
    for group, begin in enumerate(range(0, depth, group_size)):
        inputs = slice(begin, min(begin + group_size, depth))
        rows_at_once = max(1, ELEMENTS_AT_ONCE // (inputs.stop - begin))
        for first in range(0, num_rows, rows_at_once):
            rows = slice(first, first + rows_at_once)
            values = weight[rows, inputs]
            grid = choose_grid(values, form, None if importance is None else importance[inputs])
            codes[rows, inputs] = grid.codes(values).to(torch.uint8)
            grids.put(rows, group, grid)
    return grids.weight(codes)


class GroupGrids:
    """Collects the grids of all groups of a weight [N, K]."""

    def __init__(self, num_rows: int, depth: int, group_size: int, form: str) -> None:
        shape = (num_rows, -(-depth // group_size))
        self.group_size = group_size
        self.scales = torch.empty(shape, dtype=torch.float16)
        self.zero_points = torch.empty(shape, dtype=torch.int16) if form == "zero-points" else None
        self.minimums = torch.empty(shape, dtype=torch.float16) if form == "minimums" else None

    def put(self, rows: slice, group: int, grid: Grid) -> None:
        self.scales[rows, group] = grid.scales.to(torch.float16)
        if self.zero_points is not None and grid.zero_points is not None:
            self.zero_points[rows, group] = grid.zero_points.to(torch.int16)
        if self.minimums is not None and grid.minimums is not None:
            self.minimums[rows, group] = grid.minimums.to(torch.float16)

    def weight(self, codes: torch.Tensor) -> QuantizedWeight:
        return QuantizedWeight(codes, self.scales, self.group_size, self.zero_points, self.minimums)


def _better(best: Grid, error: torch.Tensor, other: Grid, other_error: torch.Tensor) -> tuple[Grid, torch.Tensor]:
    """Row by row the grid with the smaller error; of equal ones the first."""
    take = other_error < error

    def pick(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
        return None if a is None or b is None else torch.where(take, b, a)

    scales = torch.where(take, other.scales, best.scales)
    grid = Grid(scales, pick(best.zero_points, other.zero_points), pick(best.minimums, other.minimums))
    return grid, torch.where(take, other_error, error)


def as_float16(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-65504, 65504).to(torch.float16).to(torch.float32)


def _symmetric(values: torch.Tensor) -> Iterator[Grid]:
    """Codes reach from -8 to 7: the side that has one more may be either, so scales of both signs are tried."""
    largest = values.abs().amax(1)
    zero = torch.full_like(largest, SYMMETRIC_ZERO)
    for part in torch.linspace(1.2, 0.55, 27).tolist():
        for sign in (1, -1):
            yield Grid(as_float16(largest * (sign * part / 8)), zero, None)


def _zero_points(values: torch.Tensor) -> Iterator[Grid]:
    """The range of the weights and zero, and parts of it."""
    low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
    for part in torch.linspace(1.05, 0.55, 21).tolist():
        scales = as_float16((high - low) * (part / MAX_CODE))
        zero = torch.where(scales != 0, -low * part / scales, torch.zeros_like(scales))
        for rounded in (zero.floor(), zero.ceil()):
            yield Grid(scales, rounded.clamp(0, MAX_CODE), None)


def _minimums(values: torch.Tensor) -> Iterator[Grid]:
    """From the least to the largest weight in 15 steps; in fewer steps, for weights that lie on such a grid already;
    and parts of that range."""
    low, high = values.amin(1), values.amax(1)
    minimums = as_float16(low)
    for steps in range(MAX_CODE, MAX_CODE // 2, -1):
        yield Grid(as_float16((high - low) / steps), None, minimums)
    for part in torch.linspace(0.97, 0.6, 16).tolist():
        clipped = (high - low) * ((1 - part) / 2)
        yield Grid(as_float16((high - low) * (part / MAX_CODE)), None, as_float16(low + clipped))


def _least_squares(values: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor | None) -> Grid:
    """The scale and minimum that fit these codes best."""
    counts = torch.ones_like(values) if importance is None else importance.expand_as(values)
    total = counts.sum(1)
    mean_code = (counts * codes).sum(1) / total
    mean_value = (counts * values).sum(1) / total
    spread = codes - mean_code[:, None]
    variance = (counts * spread * spread).sum(1)
    slope = torch.where(variance > 0, (counts * spread * values).sum(1) / variance, torch.zeros_like(variance))
    scales = as_float16(slope)
    return Grid(scales, None, as_float16(mean_value - scales * mean_code))
