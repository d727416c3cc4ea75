# SPDX-License-Identifier: Apache-2.0
"""GPTQ (Frantar et al. 2022): round a weight one input at a time, and let the inputs that are still to come make up
for the error, as far as their activations are correlated with this one's."""

from __future__ import annotations

import torch

from fastserve.errors import FastserveError
from fastserve.weights.quantized import QuantizedWeight
from fastserve.weights.round_int4 import GroupGrids, choose_grid

BLOCK = 128  # inputs after which the rest of the weight is updated, in one matrix product
DAMPING = 0.01  # of the mean of the diagonal, added to it: keeps the inverse finite
MAX_DAMPING = 10.0


def round_gptq(weight: torch.Tensor, hessian: torch.Tensor, group_size: int, form: str) -> QuantizedWeight:
    """Rounds float32 [N, K] so that the outputs for the activations seen in calibration change least.

    hessian: float32 or float64 [K, K], the sum of x x^T over the activations x of the layer. group_size and form as
    in `round_int4`. Raises FastserveError if the Hessian holds no usable numbers.
    """
    num_rows, depth = weight.shape
    inverse = _inverse_factor(hessian)
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
    return grids.weight(codes)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """float32 [K, K], upper triangular U with U^T U = H^-1, of the damped Hessian."""
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
                return inverse.to(torch.float32)
        damping *= 10
    raise FastserveError("the activations of a layer are too uniform to be told apart; use a longer calibration text")
