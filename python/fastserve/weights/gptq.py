# SPDX-License-Identifier: Apache-2.0
"""GPTQ (Frantar et al. 2022): round a weight one input at a time, and let the inputs that are still to come make up
for the error, as far as their activations are correlated with this one's.

What it finds is then improved by coordinate descent (as in QuantEase, Behdin et al. 2023, there on codes alone): each
scale, minimum and code in turn takes the value that is best while all others stay as they are.

A layer sees what the rounded layers before it make of a text. Before its own weight is rounded it is moved to where it
makes of that, as nearly as it can, what it made of the original (as in QEP, Arai and Ichikawa 2025).
"""

from __future__ import annotations

import torch

from fastserve.errors import FastserveError
from fastserve.weights.quantized import MAX_CODE, SYMMETRIC_ZERO, QuantizedWeight
from fastserve.weights.round_int4 import GroupGrids, as_float16, choose_grid

BLOCK = 128  # inputs after which the rest of the weight is updated, in one matrix product
DAMPING = 0.01  # of the mean of the diagonal, added to it: keeps the inverse finite
MAX_DAMPING = 10.0
SWEEPS = 4  # of coordinate descent


def round_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, group_size: int, form: str, drift: torch.Tensor | None = None
) -> QuantizedWeight:
    """Rounds float32 [N, K] so that the outputs for the activations seen in calibration change least.

    hessian: float32 or float64 [K, K], the sum of x x^T over the activations x of the layer. drift: the same, the sum
    of (x* - x) x^T, where x* are the activations of the model as it was: outputs are then to be what the weight makes
    of x*, not of x. None: all zero. group_size and form as in `round_int4`. Raises FastserveError if the Hessian holds
    no usable numbers.
    """
    num_rows, depth = weight.shape
    damped, inverse = _inverse_factor(hessian)
    if drift is not None:
        weight = weight + (weight @ drift) @ (inverse.T @ inverse)  # the best weight before it is rounded
    spread = inverse.diagonal()
    importance = (1 / spread.square()).contiguous()  # the cost of an error in this input, once the rest has adapted
    left = weight.clone()  # what is still to be rounded, errors so far made up for
    codes = torch.empty((num_rows, depth), dtype=torch.uint8)
    grids = GroupGrids(num_rows, depth, group_size, form)
    block = BLOCK if group_size >= depth else max(group_size, BLOCK // group_size * group_size)
    rows = slice(0, num_rows)
    grid = None
    for begin in range(0, depth, block):
        end = min(begin + block, depth)
        errors = torch.empty((num_rows, end - begin))
        for k in range(begin, end):
            if k % group_size == 0:
                group = slice(k, min(k + group_size, depth))
                grid = choose_grid(left[:, group], form, importance[group] / importance[group].mean())
                grids.put(rows, k // group_size, grid)
            assert grid is not None
            column = left[:, k : k + 1]
            rounded = grid.codes(column)
            codes[:, k] = rounded[:, 0].to(torch.uint8)
            error = (column - grid.values(rounded)) / spread[k]
            left[:, k + 1 : end] -= error * inverse[k, k + 1 : end]
            errors[:, k - begin] = error[:, 0]
        left[:, end:] -= errors @ inverse[begin:end, end:]
    return _descend(weight, damped, grids.weight(codes))


def _descend(weight: torch.Tensor, hessian: torch.Tensor, start: QuantizedWeight) -> QuantizedWeight:
    """A weight with at most the error of `start`: the sum over outputs of d H d^T, d = what differs from `weight`.

    Group by group, each scale, then each minimum, then each code steps to its own optimum (rounded). `gradient` is
    d H, so that the optimum of one number, with all others as they are, is a division away.
    """
    codes = start.codes.to(torch.float32)
    scales = start.scales.to(torch.float32)
    minimums = None if start.minimums is None else start.minimums.to(torch.float32)
    for _ in range(SWEEPS):
        now = QuantizedWeight(
            codes.to(torch.uint8),
            scales.to(torch.float16),
            start.group_size,
            start.zero_points,
            None if minimums is None else minimums.to(torch.float16),
        )
        gradient = (now.dequantize() - weight) @ hessian
        for group, begin in enumerate(range(0, weight.shape[1], start.group_size)):
            inputs = slice(begin, min(begin + start.group_size, weight.shape[1]))
            own = hessian[inputs, inputs].contiguous()
            slope = gradient[:, inputs].contiguous()
            code, scale = codes[:, inputs], scales[:, group]  # views: what is written here is kept
            zero: torch.Tensor | float = 0.0 if minimums is not None else SYMMETRIC_ZERO
            if start.zero_points is not None:
                zero = start.zero_points[:, group, None].to(torch.float32)
            moved = torch.zeros_like(slope)

            unit = code - zero
            curvature = ((unit @ own) * unit).sum(1)
            step = torch.where(curvature > 0, (unit * slope).sum(1) / curvature, torch.zeros_like(curvature))
            new_scale = as_float16(scale - step)
            change = (new_scale - scale)[:, None] * unit
            scale.copy_(new_scale)
            slope += change @ own
            moved += change
            if minimums is not None:
                minimum = minimums[:, group]
                new_minimum = as_float16(minimum - slope.sum(1) / own.sum())
                change = (new_minimum - minimum)[:, None].expand_as(slope)
                minimum.copy_(new_minimum)
                slope += change @ own
                moved += change
            inverse = torch.where(scale != 0, 1 / scale, torch.zeros_like(scale))
            for k in range(own.shape[0]):
                best = (code[:, k] - slope[:, k] / own[k, k] * inverse).round_().clamp_(0, MAX_CODE)
                difference = (best - code[:, k]) * scale
                code[:, k] = best
                slope += difference[:, None] * own[k]
                moved[:, k] += difference
            gradient += moved @ hessian[inputs]
    return QuantizedWeight(
        codes.to(torch.uint8),
        scales.to(torch.float16),
        start.group_size,
        start.zero_points,
        None if minimums is None else minimums.to(torch.float16),
    )


def _inverse_factor(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [K, K]: the damped Hessian, and upper triangular U with U^T U = H^-1 of it."""
    exact = hessian.to(torch.float64)
    diagonal = exact.diagonal()
    if not bool(torch.isfinite(exact).all()) or float(diagonal.max()) <= 0:
        raise FastserveError("the activations of a layer are all zero or not finite; use another calibration text")
    damping = DAMPING
    while damping <= MAX_DAMPING:
        damped = exact + torch.eye(len(exact), dtype=torch.float64) * (damping * float(diagonal.mean()))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                return damped.to(torch.float32), inverse.to(torch.float32)
        damping *= 10
    raise FastserveError("the activations of a layer are too uniform to be told apart; use a longer calibration text")
