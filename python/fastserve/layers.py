# SPDX-License-Identifier: Apache-2.0
"""Thin holders of packed weights: each layer knows its tensors and which op computes it, nothing else.

Activations are float32 [tokens, width] buffers owned by the caller; a layer writes into the `out` it is given.
"""

from __future__ import annotations

import torch

from fastserve import _native
from fastserve._native import ops


class Linear:
    """out = x @ weight.T + bias, the weight packed once for the device.

    weight [out_features, in_features] in float32, bfloat16 or float16; bias [out_features] or None. The packed
    copy has the weight's dtype; the tensor given is not kept.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.packed = torch.empty(_native.packed_linear_shape(self.out_features, self.in_features), dtype=weight.dtype)
        ops.pack_linear(self.packed, weight)
        self.bias = None if bias is None else bias.to(torch.float32).contiguous()

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.packed) + num_bytes(self.bias)

    def workspace_bytes(self, max_tokens: int) -> int:
        """Bytes of scratch that a call with up to `max_tokens` rows needs."""
        return _native.linear_workspace_bytes(max_tokens, self.in_features, str(self.packed.dtype)[6:])

    def __call__(self, out: torch.Tensor, x: torch.Tensor, workspace: torch.Tensor) -> None:
        ops.linear(out, x, self.packed, self.bias, workspace)


class RMSNorm:
    """out = x / rms(x) * weight; with a residual, residual += x first. weight [width], kept in float32."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight.to(torch.float32).contiguous()
        self.eps = eps

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.weight)

    def __call__(self, out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        ops.rms_norm(out, x, residual, self.weight, self.eps)


def num_bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
