# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from . import Arguments, BadCase, Expected, OpCase, normal, widen_rows
from .paged_kv import cache_from, keys_and_values

EPS = 1e-6
MAX_POSITION = 50


def make(
    generator: torch.Generator,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    norm: torch.dtype | None,
    strided: bool,
) -> Arguments:
    blocks = 3 + tokens // block_size
    # Every third token is padding; the others go to distinct slots in any order.
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens].int()
    slots[2::3] = -1
    angles = normal(generator, MAX_POSITION, dim // 2, scale=10.0)
    arguments = {
        "q": normal(generator, tokens, heads, dim),
        "k": normal(generator, tokens, kv_heads, dim),
        "v": normal(generator, tokens, kv_heads, dim),
        "positions": torch.randint(MAX_POSITION, (tokens,), generator=generator, dtype=torch.int32),
        "slot_mapping": slots,
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=-1),
        "kv_cache": normal(generator, blocks, 2, kv_heads, block_size, dim).to(dtype),
        "q_norm": normal(generator, dim).to(norm) if norm else None,
        "k_norm": normal(generator, dim).to(norm) if norm else None,
        "eps": EPS,
    }
    # Slots that nobody writes keep what they hold, also if that is no number.
    arguments["kv_cache"][0] = float("nan")
    if strided:
        arguments.update({name: widen_rows(arguments[name]) for name in ("q", "k", "v")})
    return arguments


def rotated(x: torch.Tensor, weight: torch.Tensor | None, cos_sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact result, and the magnitude of the terms it is made of."""
    x = x.double()
    if weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos_sin.double()[:, None].chunk(2, dim=-1)
    exact = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    first, second, cos, sin = first.abs(), second.abs(), cos.abs(), sin.abs()
    return exact, torch.cat([first * cos + second * sin, second * cos + first * sin], dim=-1)


def reference(inputs: Mapping[str, Any]) -> dict[str, Expected]:
    cos_sin = inputs["cos_sin"][inputs["positions"].long()]
    q, q_magnitude = rotated(inputs["q"], inputs["q_norm"], cos_sin)
    k, k_magnitude = rotated(inputs["k"], inputs["k_norm"], cos_sin)
    cache = inputs["kv_cache"]
    keys, values = (part.double().clone() for part in keys_and_values(cache))
    key_magnitude, value_magnitude = keys.abs(), values.abs()
    for token, slot in enumerate(inputs["slot_mapping"].tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, cache.shape[3])
        keys[block, :, offset] = k[token]
        values[block, :, offset] = inputs["v"][token].double()
        key_magnitude[block, :, offset] = k_magnitude[token]
        value_magnitude[block, :, offset] = inputs["v"][token].double().abs()

    return {
        "q": Expected(q, q_magnitude),
        "kv_cache": Expected(
            cache_from(keys, values, cache.dtype), cache_from(key_magnitude, value_magnitude, cache.dtype)
        ),
    }


def case(
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    norm: torch.dtype | None = None,
    strided: bool = False,
) -> OpCase:
    parts = [f"T{tokens}-{heads}x{kv_heads}x{dim}-S{block_size}-{str(dtype).removeprefix('torch.')}"]
    parts += [f"norm_{str(norm).removeprefix('torch.')}"] * (norm is not None) + ["strided"] * strided
    return OpCase(
        op="rope_kv_write",
        id="-".join(parts),
        make=lambda generator: make(generator, tokens, heads, kv_heads, dim, block_size, dtype, norm, strided),
        reference=reference,
        length=dim + 8 if norm else 4,
        rows=("q", "k", "v", "positions", "slot_mapping"),
    )


CASES = [
    case(tokens, heads, kv_heads, dim, block_size, dtype, norm)
    for dtype in (torch.float32, torch.bfloat16)
    for tokens, heads, kv_heads, dim, block_size, norm in [
        (0, 2, 1, 8, 16, None),
        (1, 1, 1, 2, 16, None),
        (5, 4, 2, 18, 32, torch.float32),
        (17, 9, 3, 64, 32, None),
        (33, 6, 2, 64, 48, torch.bfloat16),
        (3, 2, 2, 256, 256, torch.float16),
    ]
]
CASES += [case(7, 4, 2, 24, dtype=torch.bfloat16, norm=torch.float32, strided=True), case(7, 4, 2, 24, strided=True)]


def bad(id: str, name: str, value: int, message: str) -> BadCase:
    def make_bad(generator: torch.Generator) -> Arguments:
        arguments = make(generator, 4, 2, 1, 8, 16, torch.float32, None, False)
        arguments[name][1] = value
        return arguments

    return BadCase("rope_kv_write", id, make_bad, message)


def bad_cache(id: str, block_size: int, dim: int, message: str) -> BadCase:
    return BadCase(
        "rope_kv_write",
        id,
        lambda generator: make(generator, 2, 2, 1, dim, block_size, torch.float32, None, False),
        message,
    )


BAD_CASES = [
    bad("position-too-large", "positions", MAX_POSITION, r"positions\[1\] is 50; cos_sin has 50 positions"),
    bad("position-negative", "positions", -1, r"positions\[1\] is -1"),
    bad("slot-too-large", "slot_mapping", 48, r"slot_mapping\[1\] is 48; the cache has 48 slots"),
    bad_cache("block-size-odd", 24, 8, "blocks of 24 tokens; the CPU takes multiples of 16 up to 256"),
    bad_cache("block-size-large", 272, 8, "blocks of 272 tokens"),
    bad_cache("head-dim-large", 16, 258, "head_dim is 258; the CPU takes even numbers up to 256"),
]
