# SPDX-License-Identifier: Apache-2.0
"""Thin holders of weights: each layer knows its tensors and what computes it on its device, nothing else.

Activations are [tokens, width] buffers owned by the caller, of the device's activation dtype; a layer writes into the
`out` it is given.
"""

from __future__ import annotations

from typing import Protocol

import torch

from fastserve.engine.device import Device


class Linear(Protocol):
    """out = x @ weight.T + bias."""

    in_features: int
    out_features: int

    @property
    def num_bytes(self) -> int: ...

    def workspace_bytes(self, max_tokens: int) -> int:
        """Bytes of scratch that a call with up to `max_tokens` rows needs."""

    def __call__(self, out: torch.Tensor, x: torch.Tensor, workspace: torch.Tensor) -> None: ...


def make_linear(device: Device, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The layer for a weight [out_features, in_features] in float32, bfloat16 or float16 and a bias [out_features],
    both on the host; neither is kept."""
    return PackedLinear(device, weight, bias) if device.exact else TorchLinear(device, weight, bias)


class PackedLinear:
    """The weight packed once, in its own dtype; a row's result depends on nothing but the row."""

    def __init__(self, device: Device, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.device = device
        self.out_features, self.in_features = weight.shape
        self.packed = device.empty(device.packed_linear_shape(self.out_features, self.in_features), weight.dtype)
        device.ops.pack_linear(self.packed, device.upload(weight))
        self.bias = None if bias is None else device.upload(bias.to(torch.float32).contiguous())

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.packed) + num_bytes(self.bias)

    def workspace_bytes(self, max_tokens: int) -> int:
        return self.device.linear_workspace_bytes(max_tokens, self.in_features, self.packed.dtype)

    def __call__(self, out: torch.Tensor, x: torch.Tensor, workspace: torch.Tensor) -> None:
        self.device.ops.linear(out, x, self.packed, self.bias, workspace)


class TorchLinear:
    """torch's matrix product. How it sums may depend on the number of rows."""

    def __init__(self, device: Device, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight = device.upload(weight.contiguous())
        self.bias = None if bias is None else device.upload(bias.to(weight.dtype).contiguous())

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.weight) + num_bytes(self.bias)

    def workspace_bytes(self, max_tokens: int) -> int:
        return 0

    def __call__(self, out: torch.Tensor, x: torch.Tensor, workspace: torch.Tensor) -> None:
        if self.bias is None:
            torch.mm(x, self.weight.T, out=out)
        else:
            torch.addmm(self.bias, x, self.weight.T, out=out)


class RMSNorm:
    """out = x / rms(x) * weight; with a residual, residual += x first. weight [width], kept in the device's activation
    dtype."""

    def __init__(self, device: Device, weight: torch.Tensor, eps: float) -> None:
        self.ops = device.ops
        self.weight = device.upload(weight.to(device.activation_dtype(weight.dtype)).contiguous())
        self.eps = eps

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.weight)

    def __call__(self, out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        self.ops.rms_norm(out, x, residual, self.weight, self.eps)


def num_bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
