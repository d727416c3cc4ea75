# SPDX-License-Identifier: Apache-2.0
"""Runs a calibration text through a model layer by layer, so that only one layer's weights are in memory at a time.

What stays is the state between two layers, for all tokens of the text: 2 x width float32 numbers a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """A linear that sums x x^T over the rows x it is given: `hessian`, float32 [in_features, in_features]."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.is_gated = linear.is_gated
        self.hessian = torch.zeros((self.in_features, self.in_features))

    @property
    def num_bytes(self) -> int:
        return self.linear.num_bytes

    def workspace_bytes(self, max_tokens: int) -> int:
        return self.linear.workspace_bytes(max_tokens)

    def __call__(self, out: torch.Tensor, x: torch.Tensor, workspace: torch.Tensor) -> None:
        self.hessian.addmm_(x.T, x)
        self.linear(out, x, workspace)


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
        self._residuals = torch.empty((len(self._windows), self._context, width))
        self._outs = torch.zeros_like(self._residuals)  # what the layer before adds to the residual
        for window, residual in zip(self._windows, self._residuals, strict=True):
            device.ops.embedding(residual, torch.tensor(window, dtype=torch.int32), embedding)

    @property
    def num_tokens(self) -> int:
        return len(self._windows) * self._context

    def record(self, layer: Any) -> None:
        """Runs the text through the layer and leaves the state between the layers as it is."""
        for _ in self._run(layer):
            pass

    def advance(self, layer: Any) -> None:
        """Takes the text through the layer: the next call sees the state after it."""
        for index, (residual, out) in enumerate(self._run(layer)):
            self._residuals[index].copy_(residual)
            self._outs[index].copy_(out)

    def _run(self, layer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        config, tokens = self.config, self._context
        linears = [layer.qkv, layer.o, layer.gate_up, layer.down]
        buffers = StepBuffers(self.device, config, torch.float32, linears, layer.gate_up_width, tokens, 1)
        blocks = -(-tokens // BLOCK_SIZE)
        cache = self.device.empty((blocks, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim), torch.float32)
        views = buffers.rows(tokens)
        for index, window in enumerate(self._windows):
            batch = self._batches.build(_whole(window))
            views.residual.copy_(self._residuals[index])
            views.sublayer_out.copy_(self._outs[index])
            layer.forward(batch, cache, self._cos_sin, views)
            yield views.residual, views.sublayer_out


def _whole(window: list[int]) -> StepPlan:
    """All of a window's tokens in one step, in the first blocks of the cache."""
    request = Request("calibration", window, SamplingParams(max_tokens=1), 0.0)
    request.block_ids = list(range(-(-len(window) // BLOCK_SIZE)))
    return StepPlan((StepItem(request, 0, len(window), sample=False),), (), len(window), 0)
