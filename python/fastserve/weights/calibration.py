# SPDX-License-Identifier: Apache-2.0
"""Runs a calibration text through a model layer by layer, so that only one layer's weights are in memory at a time.

What stays is the state between two layers, of the model as it was and of the rounded one, for all tokens of the text:
4 x width float32 numbers a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastserve.config import SamplingParams
from fastserve.engine.batch import BatchBuilder, StepBuffers
from fastserve.engine.device import Device
from fastserve.engine.scheduler import StepItem, StepPlan
from fastserve.layers import Linear
from fastserve.model_config import ModelConfig
from fastserve.request import Request
from fastserve.rope import cos_sin_table

BLOCK_SIZE = 32


class RecordingLinear:
    """A linear of a layer that is being rounded: as it was while the text passes through unrounded, else rounded, once
    it is. While `records` it adds up, over the rows x that it is given and the rows x* at the same places of the
    unrounded text, each float32 [in_features, in_features]:

        hessian   the sum of x x^T
        drift     the sum of (x* - x) x^T
    """

    def __init__(self, linear: Linear) -> None:
        self.exact = linear
        self.rounded: Linear | None = None
        self.is_exact = self.records = False
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.is_gated, self.takes_bf16 = linear.is_gated, False
        self._unrounded_x: torch.Tensor | None = None

    def record(self) -> None:
        shape = (self.in_features, self.in_features)
        self.hessian, self.drift, self.records = torch.zeros(shape), torch.zeros(shape), True

    @property
    def num_bytes(self) -> int:
        return self.exact.num_bytes

    def workspace_bytes(self, max_tokens: int) -> int:
        return max(one.workspace_bytes(max_tokens) for one in (self.exact, self.rounded) if one is not None)

    def __call__(self, out: torch.Tensor, x: torch.Tensor, workspace: torch.Tensor) -> None:
        if self.is_exact:
            self._unrounded_x = x.clone() if self.records else None
        elif self.records:
            assert self._unrounded_x is not None
            self.hessian.addmm_(x.T, x)
            self.drift.addmm_((self._unrounded_x - x).T, x)
        linear = self.exact if self.is_exact or self.rounded is None else self.rounded
        linear(out, x, workspace)


class _States:
    """Between two layers, for each window: the residual, and what the layer before adds to it."""

    def __init__(self, residuals: torch.Tensor) -> None:
        self.residuals = residuals
        self.outs = torch.zeros_like(residuals)


class CalibrationText:
    """Windows of a text, each a sequence of its own, on their way through the layers of a model on the CPU."""

    def __init__(
        self, config: ModelConfig, device: Device, embedding: torch.Tensor, token_ids: Sequence[int], context: int
    ) -> None:
        """embedding: [vocab_size, width] in any float dtype. The text is cut into windows of `context` tokens; what
        does not fill the last one is left out, unless it is the only one."""
        self.config = config
        self.device = device
        end = max(len(token_ids) // context * context, min(len(token_ids), context))
        self._windows = [list(token_ids[begin : begin + context]) for begin in range(0, end, context)]
        self._context = len(self._windows[0])
        self._cos_sin = cos_sin_table(config.rope, config.head_dim, self._context)
        self._batches = BatchBuilder(device, config, BLOCK_SIZE, max_decodes=0)
        width = config.hidden_size
        residuals = torch.empty((len(self._windows), self._context, width))
        for window, residual in zip(self._windows, residuals, strict=True):
            device.ops.embedding(residual, torch.tensor(window, dtype=torch.int32), embedding)
        self._exact, self._rounded = _States(residuals), _States(residuals.clone())

    @property
    def num_tokens(self) -> int:
        return len(self._windows) * self._context

    def record(self, layer: Any, linears: Sequence[RecordingLinear]) -> None:
        """Runs the text through the layer, whose linears these are, for those that record."""
        self._run(layer, linears, keep=False)

    def advance(self, layer: Any, linears: Sequence[RecordingLinear]) -> None:
        """Takes the text through the layer, unrounded and rounded: the next call sees the states after it."""
        self._run(layer, linears, keep=True)

    def _run(self, layer: Any, linears: Sequence[RecordingLinear], keep: bool) -> None:
        config, tokens = self.config, self._context
        buffers = StepBuffers(self.device, config, torch.float32, [layer], None, tokens, 1)
        blocks = -(-tokens // BLOCK_SIZE)
        cache = self.device.empty((blocks, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim), torch.float32)
        views = buffers.rows(tokens)
        for index, window in enumerate(self._windows):
            batch = self._batches.build(_whole(window))
            for states in (self._exact, self._rounded):
                for linear in linears:
                    linear.is_exact = states is self._exact
                views.residual.copy_(states.residuals[index])
                views.sublayer_out.copy_(states.outs[index])
                layer.forward(batch, cache, self._cos_sin, views)
                if keep:
                    states.residuals[index].copy_(views.residual)
                    states.outs[index].copy_(views.sublayer_out)


def _whole(window: list[int]) -> StepPlan:
    """All of a window's tokens in one step, in the first blocks of the cache."""
    request = Request("calibration", window, SamplingParams(max_tokens=1), 0.0)
    request.block_ids = list(range(-(-len(window) // BLOCK_SIZE)))
    return StepPlan((StepItem(request, 0, len(window), sample=False),), (), len(window), 0)
