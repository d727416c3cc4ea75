# SPDX-License-Identifier: Apache-2.0
"""The op-case table in the formats of a GPU: the CPU's cases are float32 between ops."""

from __future__ import annotations

from dataclasses import replace

import torch

from op_cases import Arguments, OpCase

# The arguments of each op that share the activations' format. In cases of these ops in a narrow format the weights
# have that format too.
ACTIVATIONS = {
    "embedding": ("out", "weight"),
    "embedding_int8": ("out",),
    "rms_norm": ("out", "x", "residual", "weight"),
    "silu_mul": ("out", "gate_up"),
    "rope_kv_write": ("q", "k", "v", "kv_cache", "q_norm", "k_norm"),
}


def convert(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same values rounded to dtype, with the same strides."""
    span = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    storage = torch.zeros(span if tensor.numel() else 0, dtype=dtype)
    return storage.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def narrowed(case: OpCase, dtype: torch.dtype) -> OpCase:
    """The case with activations and weights of `dtype`; its reference then sees the rounded inputs."""
    names = ACTIVATIONS[case.op]

    def make(generator: torch.Generator) -> Arguments:
        arguments = case.make(generator)
        return {
            name: convert(value, dtype) if name in names and value is not None else value
            for name, value in arguments.items()
        }

    return replace(case, id=f"{case.id}-{str(dtype).removeprefix('torch.')}", make=make)
