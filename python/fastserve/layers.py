# SPDX-License-Identifier: Apache-2.0
"""Thin holders of weights: each layer knows its tensors and what computes it on its device, nothing else.

Activations are [tokens, width] buffers owned by the caller, of the device's activation dtype; a layer writes into the
`out` it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fastserve.config import EngineConfig
from fastserve.engine.device import Device
from fastserve.errors import FastserveError, ModelLoadError
from fastserve.weights.int8 import Int8Weight
from fastserve.weights.quantized import QuantizedWeight

GATED_ROWS = 16  # csrc/ops/ops.h


@dataclass(frozen=True)
class Precision:
    """The numbers that weights are kept in and multiplied with."""

    dtype: torch.dtype  # of weights that are not quantised
    keep_int4: bool  # False: int4 weights are written out as `dtype`
    keep_int8: bool  # the same of int8 weights; linears among them stay so only where the device has_int8
    int8_lm_head: bool  # one that is not quantised is rounded to int8
    activation_bits: int  # with which int4 and int8 weights are multiplied; see `linear_int4`

    @staticmethod
    def of(config: EngineConfig, device: Device, dtype: torch.dtype) -> Precision:
        """Raises FastserveError for what the device cannot."""
        wanted = {"auto": device.activation_bits[0], "int8": 8, "int12": 12, "float": 16}[config.activation_dtype]
        if wanted not in device.activation_bits:
            raise FastserveError(f"activation_dtype={config.activation_dtype!r} is not available on {device.name}")
        if config.lm_head_dtype == "int8" and not device.has_int8:
            raise FastserveError(f"lm_head_dtype='int8' is not available on {device.name}")
        keep = config.quantization == "auto"
        return Precision(dtype, keep and device.has_int4, keep, config.lm_head_dtype == "int8", wanted)


class Linear(Protocol):
    """out = x @ weight.T + bias."""

    in_features: int
    out_features: int
    is_gated: bool  # the weight is that of a gate and of what it gates, and out = silu(x @ gate.T) * (x @ up.T)
    takes_bf16: bool  # where activations are float32, x may be bfloat16, to which it is rounded anyway

    @property
    def num_bytes(self) -> int: ...

    def workspace_bytes(self, max_tokens: int) -> int:
        """Bytes of scratch that a call with up to `max_tokens` rows needs."""

    def __call__(self, out: torch.Tensor, x: torch.Tensor, workspace: torch.Tensor) -> None: ...


def can_gate(device: Device, width: int, has_bias: bool) -> bool:
    """Whether gate and up projections with `width` outputs each can be one layer with `is_gated`."""
    return device.has_gated and not has_bias and width % GATED_ROWS == 0


def in_turns(num_rows: int) -> torch.Tensor:
    """The order of rows [gate | up] in which gated ops take them: 16 of the gate, the same 16 of up, and so on."""
    return torch.arange(num_rows).view(2, -1, GATED_ROWS).transpose(0, 1).reshape(-1)


def make_linear(
    device: Device, weight: torch.Tensor, bias: torch.Tensor | None = None, is_gated: bool = False
) -> Linear:
    """The layer for a weight [out_features, in_features] in float32, bfloat16 or float16 and a bias [out_features],
    both on the host; neither is kept. A weight for `is_gated` is [gate | up]."""
    return PackedLinear(device, weight, bias, is_gated) if device.exact else TorchLinear(device, weight, bias)


class PackedLinear:
    """The weight packed once, in its own dtype; a row's result depends on nothing but the row."""

    def __init__(self, device: Device, weight: torch.Tensor, bias: torch.Tensor | None, is_gated: bool = False) -> None:
        self.device = device
        self.is_gated = is_gated
        num_rows, self.in_features = weight.shape
        self.out_features = num_rows // 2 if is_gated else num_rows
        self.takes_bf16 = device.multiplies_bf16(self.in_features) and weight.dtype == torch.bfloat16
        self.packed = device.empty(device.packed_linear_shape(num_rows, self.in_features), weight.dtype)
        device.ops.pack_linear(self.packed, device.upload(weight[in_turns(num_rows)] if is_gated else weight))
        self.bias = None if bias is None else device.keep(bias.to(torch.float32))

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.packed) + num_bytes(self.bias)

    def workspace_bytes(self, max_tokens: int) -> int:
        return self.device.linear_workspace_bytes(max_tokens, self.in_features, self.packed.dtype)

    def __call__(self, out: torch.Tensor, x: torch.Tensor, workspace: torch.Tensor) -> None:
        if self.is_gated:
            self.device.ops.linear_gated(out, x, self.packed, workspace)
        else:
            self.device.ops.linear(out, x, self.packed, self.bias, workspace, self.device.linear_counters)


class DecoderLayer(Protocol):
    """The linears of a decoder layer."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


class TorchLinear:
    """torch's matrix product. How it sums may depend on the number of rows."""

    is_gated = takes_bf16 = False

    def __init__(self, device: Device, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight = device.keep(weight)
        self.bias = None if bias is None else device.keep(bias.to(weight.dtype))

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


def make_int4_linear(
    device: Device,
    parts: Sequence[QuantizedWeight],
    biases: Sequence[torch.Tensor],
    activation_bits: int,
    name: str,
    is_gated: bool = False,
) -> Linear:
    """Projections of the same input as one layer, their outputs side by side. `biases` is empty or has one for each.
    Of a gate and what it gates, `is_gated` makes one gated layer if their forms allow it."""
    try:
        joined = [QuantizedWeight.stack(parts, name)]
    except ModelLoadError:  # different forms or orders of inputs
        joined = list(parts)
    if len(joined) == len(parts):
        bias_of = list(biases) or [None] * len(parts)
    else:
        bias_of = [torch.cat(list(biases)) if biases else None]
    if is_gated and len(joined) == 1:
        return Int4Linear(device, joined[0], None, activation_bits, is_gated)
    layers = [Int4Linear(device, weight, bias, activation_bits) for weight, bias in zip(joined, bias_of, strict=True)]
    return layers[0] if len(layers) == 1 else SideBySide(layers)


class _QuantizedLinear:
    """What layers of packed codes share. A row's result depends on nothing but the row."""

    packed: torch.Tensor
    input_order: torch.Tensor | None = None

    def __init__(
        self,
        device: Device,
        shape: tuple[int, int],
        group_size: int,
        bias: torch.Tensor | None,
        activation_bits: int,
        is_gated: bool,
    ) -> None:
        self.device = device
        self.is_gated = is_gated
        num_rows, self.in_features = shape
        self.out_features = num_rows // 2 if is_gated else num_rows
        self.group_size = group_size
        self.activation_bits = activation_bits
        self.takes_bf16 = device.multiplies_bf16(self.in_features) and activation_bits == 16
        self.bias = None if bias is None else device.keep(bias.to(torch.float32))

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.packed) + num_bytes(self.bias)

    def workspace_bytes(self, max_tokens: int) -> int:
        reorders = self.input_order is not None
        return self.device.quantized_workspace_bytes(max_tokens, self.in_features, self.activation_bits, reorders)


class Int4Linear(_QuantizedLinear):
    """4-bit codes, packed once, code for code."""

    def __init__(
        self,
        device: Device,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        activation_bits: int,
        is_gated: bool = False,
    ) -> None:
        super().__init__(device, weight.shape, weight.group_size, bias, activation_bits, is_gated)
        if is_gated:
            weight = weight.rows(in_turns(weight.shape[0]))
        self.form = weight.form
        shape = device.packed_int4_shape(*weight.shape, weight.group_size, weight.form)
        self.packed = device.empty(shape, torch.uint8)

        def there(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
            return None if tensor is None else device.upload(tensor.to(dtype).contiguous())

        device.ops.pack_int4(
            self.packed,
            there(weight.codes, torch.uint8),
            there(weight.scales, torch.float16),
            there(weight.zero_points, torch.uint8),
            there(weight.minimums, torch.float16),
            weight.group_size,
        )
        self.input_order = None if weight.input_order is None else device.keep(weight.input_order)
        self.takes_bf16 = self.takes_bf16 and self.input_order is None

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + num_bytes(self.input_order)

    def __call__(self, out: torch.Tensor, x: torch.Tensor, workspace: torch.Tensor) -> None:
        if self.is_gated:
            self.device.ops.linear_int4_gated(
                out, x, self.packed, self.input_order, workspace, self.group_size, self.form, self.activation_bits
            )
        else:
            self.device.ops.linear_int4(
                out, x, self.packed, self.bias, self.input_order, workspace, self.group_size, self.form,
                self.activation_bits, self.device.linear_counters,
            )  # fmt: skip


class Int8Linear(_QuantizedLinear):
    """8-bit codes, packed once, code for code."""

    def __init__(
        self,
        device: Device,
        weight: Int8Weight,
        bias: torch.Tensor | None,
        activation_bits: int,
        is_gated: bool = False,
    ) -> None:
        super().__init__(device, weight.shape, weight.group_size, bias, activation_bits, is_gated)
        if is_gated:
            weight = weight.rows(in_turns(weight.shape[0]))
        self.packed = device.empty(device.packed_int8_shape(*weight.shape, weight.group_size), torch.uint8)
        codes, scales = device.upload(weight.codes.contiguous()), device.upload(weight.scales.contiguous())
        device.ops.pack_int8(self.packed, codes, scales, weight.group_size)

    def __call__(self, out: torch.Tensor, x: torch.Tensor, workspace: torch.Tensor) -> None:
        ops, size, bits = self.device.ops, self.group_size, self.activation_bits
        if self.is_gated:
            ops.linear_int8_gated(out, x, self.packed, workspace, size, bits)
        else:
            ops.linear_int8(out, x, self.packed, self.bias, workspace, size, bits, self.device.linear_counters)


class SideBySide:
    """Layers of the same input that cannot be packed as one."""

    is_gated = takes_bf16 = False

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.layers = layers
        self.in_features = layers[0].in_features
        self.out_features = sum(layer.out_features for layer in layers)

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers)

    def workspace_bytes(self, max_tokens: int) -> int:
        return max(layer.workspace_bytes(max_tokens) for layer in self.layers)

    def __call__(self, out: torch.Tensor, x: torch.Tensor, workspace: torch.Tensor) -> None:
        begin = 0
        for layer in self.layers:
            layer(out[:, begin : begin + layer.out_features], x, workspace)
            begin += layer.out_features


class Embedding:
    """Rows of a table [vocabulary, width], out[t] = table[token_ids[t]]; one of 8-bit codes is kept as it is."""

    def __init__(self, device: Device, table: torch.Tensor | Int8Weight) -> None:
        self.ops = device.ops
        self.group_size = 0
        self.scales: torch.Tensor | None = None
        if isinstance(table, Int8Weight):
            self.table = device.keep(table.codes)
            self.scales = device.keep(table.scales)
            self.group_size = table.group_size
        else:
            self.table = device.keep(table)

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.table) + num_bytes(self.scales)

    def __call__(self, out: torch.Tensor, token_ids: torch.Tensor) -> None:
        if self.scales is None:
            self.ops.embedding(out, token_ids, self.table)
        else:
            self.ops.embedding_int8(out, token_ids, self.table, self.scales, self.group_size)


class RMSNorm:
    """out = x / rms(x) * weight; with a residual, residual += x first. weight [width], kept in the device's activation
    dtype."""

    def __init__(self, device: Device, weight: torch.Tensor, eps: float) -> None:
        self.ops = device.ops
        self.weight = device.keep(weight.to(device.activation_dtype(weight.dtype)))
        self.eps = eps

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.weight)

    def __call__(self, out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        self.ops.rms_norm(out, x, residual, self.weight, self.eps)


def num_bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
