# SPDX-License-Identifier: Apache-2.0
"""QuantizedWeight: what it means, said once more in plain loops, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastserve.errors import ModelLoadError
from fastserve.weights.quantized import QuantizedWeight


def make(rows: int, depth: int, group_size: int, form: str, ordered: bool = False, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, -(-depth // group_size))
    scales = (torch.rand(shape, generator=generator) * 0.1 + 0.01).half()
    zeros = torch.randint(0, 17, shape, generator=generator, dtype=torch.int16)
    minimums = torch.randn(shape, generator=generator).half()
    return QuantizedWeight(
        codes=torch.randint(0, 16, (rows, depth), generator=generator, dtype=torch.uint8),
        scales=scales,
        group_size=group_size,
        zero_points=zeros if form == "zero points" else None,
        minimums=minimums if form == "minimums" else None,
        input_order=torch.randperm(depth, generator=generator).int() if ordered else None,
    )


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("form", ["symmetric", "zero points", "minimums"])
@pytest.mark.parametrize(("depth", "group_size"), [(64, 32), (96, 64), (70, 32), (50, 50), (64, 128)])
def test_dequantize_is_the_documented_formula(depth: int, group_size: int, form: str, ordered: bool) -> None:
    weight = make(3, depth, group_size, form, ordered)
    weight.check("w")
    result = weight.dequantize()
    for n in range(3):
        for k in range(depth):
            scale, code = float(weight.scales[n, k // group_size]), int(weight.codes[n, k])
            if weight.minimums is not None:
                value = torch.tensor(scale) * code + float(weight.minimums[n, k // group_size])
            else:
                zero = 8 if weight.zero_points is None else int(weight.zero_points[n, k // group_size])
                value = torch.tensor(scale) * (code - zero)
            column = k if weight.input_order is None else int(weight.input_order[k])
            assert result[n, column] == value


def test_stacked_rows_dequantize_like_the_parts() -> None:
    parts = [make(2, 64, 32, "minimums", seed=1), make(3, 64, 32, "minimums", seed=2)]
    whole = QuantizedWeight.stack(parts, "qkv")
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 24}, "group size 24 is not supported; multiples of 32"),
        ({"group_size": 64}, r"scales are torch.float16 \[3, 2\]; expected torch.float16 \[3, 1\]"),
        ({"scales": torch.full((3, 2), float("nan")).half()}, "scales hold NaN or infinity"),
        ({"scales": torch.ones(3, 2)}, r"scales are torch.float32 \[3, 2\]; expected torch.float16"),
        ({"codes": torch.full((3, 64), 16, dtype=torch.uint8)}, "code 16 does not fit in 4 bits"),
        ({"zero_points": torch.full((3, 2), 17).short()}, "zero points from 17 to 17; allowed are 0 to 16"),
        ({"input_order": torch.zeros(64, dtype=torch.int32)}, "not a permutation of 0 to 63"),
        (
            {"zero_points": torch.ones(3, 2).short(), "minimums": torch.ones(3, 2).half()},
            "has both zero points and minimums",
        ),
    ],
)
def test_inconsistent_parts_are_named(change: dict[str, object], message: str) -> None:
    weight = dataclasses.replace(make(3, 64, 32, "symmetric"), **change)  # type: ignore[arg-type]
    with pytest.raises(ModelLoadError, match=f"layers.0.q_proj: .*{message}"):
        weight.check("layers.0.q_proj")


def test_projections_of_different_forms_are_not_stacked() -> None:
    with pytest.raises(ModelLoadError, match="different forms"):
        QuantizedWeight.stack([make(2, 64, 32, "minimums"), make(2, 64, 32, "symmetric")], "qkv")
    with pytest.raises(ModelLoadError, match="order their inputs differently"):
        QuantizedWeight.stack(
            [make(2, 64, 32, "symmetric", True, seed=1), make(2, 64, 32, "symmetric", True, seed=2)], "qkv"
        )
