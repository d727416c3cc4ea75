# SPDX-License-Identifier: Apache-2.0
"""Op cases that only CUDA kernels have: shapes of real models in narrow formats, where every access is 16 bytes wide
("aligned": test_cuda_ops.py counts their bytes and sectors), and the plain layout of the KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from op_cases import Arguments, Expected, OpCase, empty, normal, widen_rows
from op_cases.embedding import int8_reference, make_int8

EPS = 1e-5
FORMATS = (torch.float32, torch.float16, torch.bfloat16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- embedding, rms_norm, silu_mul -----------------------------------------------------------------------------------


def embedding(tokens: int, hidden: int, dtype: torch.dtype) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        ids = torch.randint(0, 50, (tokens,), generator=generator, dtype=torch.int32)
        return {
            "out": empty(tokens, hidden, dtype=dtype),
            "token_ids": ids,
            "weight": normal(generator, 50, hidden).to(dtype),
        }

    return OpCase(
        op="embedding",
        id=f"aligned-T{tokens}-H{hidden}-{name_of(dtype)}",
        make=make,
        reference=lambda inputs: {"out": inputs["weight"][inputs["token_ids"].long()].double()},
        length=0,
        rows=("out", "token_ids"),
    )


def embedding_int8(tokens: int, hidden: int, dtype: torch.dtype) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        return make_int8(generator, tokens, hidden, 32) | {"out": empty(tokens, hidden, dtype=dtype)}

    return OpCase(
        op="embedding_int8",
        id=f"aligned-T{tokens}-H{hidden}-{name_of(dtype)}",
        make=make,
        reference=int8_reference,
        length=0,
        rows=("out", "token_ids"),
    )


def unknown_ids() -> OpCase:
    """Ids outside the vocabulary: rows of NaN, so that nothing but their request fails."""

    def make(generator: torch.Generator) -> Arguments:
        return {
            "out": empty(4, 16),
            "token_ids": torch.tensor([3, -1, 8, 2147483647], dtype=torch.int32),
            "weight": normal(generator, 8, 16),
        }

    def reference(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        out = torch.full((4, 16), float("nan"), dtype=torch.float64)
        out[0] = inputs["weight"][3].double()
        return {"out": out}

    return OpCase("embedding", "unknown-ids", make, reference, length=0, rows=("out", "token_ids"))


def rms_norm(tokens: int, hidden: int, dtype: torch.dtype, residual: bool, weight_dtype: torch.dtype) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        return {
            "out": empty(tokens, hidden, dtype=dtype),
            "x": normal(generator, tokens, hidden, scale=3.0).to(dtype),
            "residual": normal(generator, tokens, hidden, scale=10.0).to(dtype) if residual else None,
            "weight": normal(generator, hidden).to(weight_dtype),
            "eps": EPS,
        }

    def reference(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        row = inputs["x"].double()
        outputs = {}
        if inputs["residual"] is not None:
            row = (inputs["residual"].float() + inputs["x"].float()).to(dtype).double()
            outputs["residual"] = row
        scale = (row.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return {"out": row * scale * inputs["weight"].double(), **outputs}

    weights = "" if weight_dtype == dtype else f"-weight-{name_of(weight_dtype)}"
    return OpCase(
        op="rms_norm",
        id=f"aligned-T{tokens}-H{hidden}-{name_of(dtype)}{weights}" + "-residual" * residual,
        make=make,
        reference=reference,
        length=hidden + 6,
        rows=("out", "x", "residual"),
    )


def silu_mul(tokens: int, width: int, dtype: torch.dtype) -> OpCase:
    def make(generator: torch.Generator) -> Arguments:
        return {
            "out": empty(tokens, width, dtype=dtype),
            "gate_up": normal(generator, tokens, 2 * width, scale=2.0).to(dtype),
        }

    def reference(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        gate, up = inputs["gate_up"].double().chunk(2, dim=-1)
        return {"out": torch.nn.functional.silu(gate) * up}

    return OpCase(
        "silu_mul",
        f"aligned-T{tokens}-I{width}-{name_of(dtype)}",
        make,
        reference,
        length=24,
        rows=("out", "gate_up"),
    )


# --- rope_kv_write ---------------------------------------------------------------------------------------------------


def rope_kv_write(
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    norm: bool = False,
    strided: bool = False,
    padding: bool = False,
) -> OpCase:
    num_heads, num_kv_heads = heads
    block_size, num_blocks, max_position = 16, 6, 64
    cached = dtype if cache_dtype is None else cache_dtype

    def make(generator: torch.Generator) -> Arguments:
        def rows(num: int) -> torch.Tensor:
            x = normal(generator, tokens, num, dim, scale=3.0).to(dtype)
            return widen_rows(x, extra=3) if strided else x

        slots = torch.randperm(num_blocks * block_size, generator=generator)[:tokens].int()
        if padding:
            slots[::3] = -1
        angle = torch.rand(max_position, dim // 2, generator=generator) * 6.28
        return {
            "q": rows(num_heads),
            "k": rows(num_kv_heads),
            "v": rows(num_kv_heads),
            "positions": torch.randint(0, max_position, (tokens,), generator=generator, dtype=torch.int32),
            "slot_mapping": slots,
            "cos_sin": torch.cat([angle.cos(), angle.sin()], dim=-1),
            "kv_cache": normal(generator, num_blocks, 2, num_kv_heads, block_size, dim).to(cached),
            "q_norm": normal(generator, dim).to(dtype) if norm else None,
            "k_norm": normal(generator, dim).float() if norm else None,
            "eps": EPS,
        }

    def rotated(inputs: Mapping[str, Any], name: str) -> torch.Tensor:
        x = inputs[name].double()
        weight = inputs[f"{name}_norm"]
        if weight is not None:
            x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
        cos, sin = inputs["cos_sin"][inputs["positions"].long()].double()[:, None].chunk(2, dim=-1)
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def reference(inputs: Mapping[str, Any]) -> dict[str, Any]:
        cache = inputs["kv_cache"].double()
        k = rotated(inputs, "k")
        for t, slot in enumerate(inputs["slot_mapping"].tolist()):
            if slot >= 0:
                cache[slot // block_size, 0, :, slot % block_size] = k[t]
                cache[slot // block_size, 1, :, slot % block_size] = inputs["v"][t].double()
        q = rotated(inputs, "q")
        # A rotation mixes a pair: the error scales with the larger of the two.
        return {"q": with_pair_magnitude(q), "kv_cache": with_pair_magnitude(cache)}

    parts = [f"T{tokens}-{num_heads}x{num_kv_heads}x{dim}-{name_of(dtype)}"]
    parts += [f"cache-{name_of(cached)}"] * (cached != dtype)
    parts += ["norm"] * norm + ["strided"] * strided + ["padding"] * padding
    if not (strided or padding) and dim // 2 * dtype.itemsize % 32 == 0:
        parts.insert(0, "aligned")
    return OpCase("rope_kv_write", "-".join(parts), make, reference, length=dim + 12)


def with_pair_magnitude(x: torch.Tensor) -> Expected:
    low, high = x.abs().chunk(2, dim=-1)
    return Expected(x, torch.cat([low + high, low + high], dim=-1))


CUDA_CASES = [embedding(5, hidden, dtype) for dtype in FORMATS for hidden in (64, 2560)]
CUDA_CASES += [embedding_int8(5, hidden, dtype) for dtype in FORMATS for hidden in (64, 2560)]
CUDA_CASES += [unknown_ids()]
CUDA_CASES += [
    rms_norm(3, hidden, dtype, residual, dtype)
    for dtype in FORMATS
    for hidden in (576, 4096, 8192)
    for residual in (False, True)
]
CUDA_CASES += [rms_norm(2, 16384, torch.float32, True, dtype) for dtype in FORMATS]
CUDA_CASES += [silu_mul(3, width, dtype) for dtype in FORMATS for width in (1536, 2816)]
CUDA_CASES += [rope_kv_write(9, (4, 2), dim, dtype) for dtype in FORMATS for dim in (64, 128, 256)]
CUDA_CASES += [rope_kv_write(9, (5, 1), 128, dtype, norm=True) for dtype in FORMATS]
CUDA_CASES += [
    rope_kv_write(9, (3, 1), 80, torch.bfloat16, norm=True),
    rope_kv_write(9, (3, 3), 96, torch.float16),
    rope_kv_write(3, (2, 1), 512, torch.float32, norm=True),
    rope_kv_write(9, (4, 2), 20, torch.float32, norm=True),
    rope_kv_write(9, (4, 2), 64, torch.float32, cache_dtype=torch.bfloat16),
    rope_kv_write(9, (4, 2), 64, torch.bfloat16, norm=True, strided=True),
    rope_kv_write(9, (4, 2), 128, torch.float16, padding=True),
]
