# SPDX-License-Identifier: Apache-2.0
"""Keys and values lie in the cache as if each token had been written alone, whatever is written with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastserve import _native
from op_checks import bits

BLOCK, DIM, HEADS, KV_HEADS = 32, 48, 4, 2
# Where 40 tokens go: blocks in any order, lines that begin and end in the middle of a pair, padding, single tokens.
SLOTS = [*range(101, 128), *range(5), -1, -1, 6, 8, 9, *range(66, 69)]


@pytest.fixture(autouse=True)
def restore_isa() -> Iterator[None]:
    isa = _native.isa()
    yield
    _native.set_isa(isa)


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_written_together_are_those_written_alone(isa: str, dtype: torch.dtype) -> None:
    _native.set_isa(isa)
    generator = torch.Generator().manual_seed(5)
    tokens = len(SLOTS)
    q = torch.randn(tokens, HEADS, DIM, generator=generator)
    k, v = (torch.randn(tokens, KV_HEADS, DIM, generator=generator) for _ in range(2))
    v[0, 0, 0], v[1, 1, 3], v[9, 0, 5] = float("nan"), 1e-40, float("-inf")
    positions = torch.randint(16, (tokens,), generator=generator, dtype=torch.int32)
    slots = torch.tensor(SLOTS, dtype=torch.int32)
    cos_sin = torch.randn(16, DIM, generator=generator)

    def written(*pieces: slice) -> tuple[torch.Tensor, torch.Tensor]:
        cache = torch.full((4, 2, KV_HEADS, BLOCK, DIM), float("nan"), dtype=dtype)
        rotated = q.clone()
        for piece in pieces:
            arguments = [rotated[piece], k[piece], v[piece], positions[piece], slots[piece], cos_sin, cache]
            _native.ops.rope_kv_write(*arguments, None, None, 1e-6)
        return bits(rotated), bits(cache)

    alone = written(*(slice(i, i + 1) for i in range(tokens)))
    for cut in (0, 1, 3, 30):
        together = written(slice(0, cut), slice(cut, tokens)) if cut else written(slice(0, tokens))
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
