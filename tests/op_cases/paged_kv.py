# SPDX-License-Identifier: Apache-2.0
"""The CPU's layout of a KV cache [blocks, 2, heads, block_size, head_dim], said once more and independently.

Inside a block and head: float32 K [D][S], V [S][D]; bfloat16 K [D/2][S][2], V [S/2][D][2].
"""

from __future__ import annotations

import torch


def cache_from(keys: torch.Tensor, values: torch.Tensor, layout: torch.dtype) -> torch.Tensor:
    """Keys and values, each [blocks, heads, block_size, head_dim], arranged as in a cache of dtype `layout`."""
    blocks, heads, size, dim = keys.shape
    if layout == torch.float32:
        inside = (keys.transpose(-1, -2), values)
    else:
        inside = (
            keys.view(blocks, heads, size, dim // 2, 2).transpose(2, 3),
            values.view(blocks, heads, size // 2, 2, dim).transpose(-1, -2),
        )
    return torch.stack([part.reshape(blocks, heads, size, dim) for part in inside], dim=1).contiguous()


def keys_and_values(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each [blocks, heads, block_size, head_dim]."""
    blocks, _, heads, size, dim = cache.shape
    keys, values = cache[:, 0], cache[:, 1]
    if cache.dtype == torch.float32:
        return keys.reshape(blocks, heads, dim, size).transpose(-1, -2), values
    keys = keys.reshape(blocks, heads, dim // 2, size, 2).transpose(2, 3).reshape(blocks, heads, size, dim)
    values = values.reshape(blocks, heads, size // 2, dim, 2).transpose(-1, -2).reshape(blocks, heads, size, dim)
    return keys, values
