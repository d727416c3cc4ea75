# SPDX-License-Identifier: Apache-2.0
"""Linear on AMX's tile registers: the bits that Intel documents, from the processor and from the emulation alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastserve import _native

AMX = [isa for isa in _native.isas() if isa.startswith("amx")]


@pytest.fixture(autouse=True)
def restore_isa() -> Iterator[None]:
    isa = _native.isa()
    yield
    _native.set_isa(isa)


def documented(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x @ weight.T as TDPBF16PS sums it: 32 k at a time, even and odd ones apart, then their sum to the total.

    A product of two bfloat16 is exact in float32, so that adding it rounds as a fused multiply-add does."""
    total = np.zeros((len(x), len(weight)), np.float32)
    for begin in range(0, x.shape[1], 32):
        even, odd = np.zeros_like(total), np.zeros_like(total)
        for k in range(begin, min(begin + 32, x.shape[1])):
            product = np.multiply.outer(x[:, k], weight[:, k])
            if k % 2 == 0:
                even = even + product
            else:
                odd = odd + product
        total = total + (even + odd)
    return total


@pytest.mark.skipif(not AMX, reason="neither AMX nor its emulation is in this build and machine")
@pytest.mark.parametrize("isa", AMX)
@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "depth"), [(1, 32, 32), (16, 64, 576), (17, 40, 33), (33, 96, 70), (71, 33, 1)]
)
def test_linear_sums_as_documented(isa: str, num_tokens: int, num_rows: int, depth: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, depth, generator=generator).bfloat16()
    weight = torch.randn(num_rows, depth, generator=generator).bfloat16()
    packed = torch.empty(_native.packed_linear_shape(num_rows, depth), dtype=torch.bfloat16)
    _native.ops.pack_linear(packed, weight)
    out = torch.empty(num_tokens, num_rows)
    num_bytes = _native.linear_workspace_bytes(num_tokens, depth, "bfloat16")
    _native.set_isa(isa)
    _native.ops.linear(out, x.float(), packed, None, torch.empty(num_bytes, dtype=torch.uint8))
    assert np.array_equal(out.numpy(), documented(x.float().numpy(), weight.float().numpy()))
