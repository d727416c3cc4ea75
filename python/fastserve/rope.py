# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: the table of cosines and sines, for every supported scaling of the frequencies.

Everything is computed in the precision and order that transformers uses (frequencies, angles and their
cosines in fp32), because an angle is a large number: at position 30,000 one rounding of the frequency moves
the angle by 1e-3, and greedy decoding of long prompts would drift from the reference.
"""

from __future__ import annotations

import math

import torch

from fastserve.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """The angle per position of each of the head_dim/2 rotated pairs: fp32 [head_dim / 2], fastest first."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    periods = rope.theta**exponents  # in units of 2 pi positions
    plain = 1.0 / periods
    if rope.type == "default":
        return plain
    if rope.type == "linear":
        return plain / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, plain)
    if rope.type == "yarn":
        return _yarn(rope, head_dim, periods, plain)
    raise ValueError(f"rope type must be one of default, linear, llama3, yarn, got {rope.type!r}")


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Wavelengths much shorter than the original context stay, much longer ones are stretched by `factor`;
    those between are blended linearly in the number of turns they make within the original context."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    context = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    is_long = wavelength > context / low
    is_short = wavelength < context / high
    scaled = torch.where(is_long, plain / rope.factor, plain)
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * scaled / rope.factor + blend * scaled
    return torch.where(~is_short & ~is_long, blended, scaled)


def _yarn(rope: RopeConfig, head_dim: int, periods: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """Pairs that turn more than beta_fast times within the original context stay, those below beta_slow are
    stretched by `factor`, and a linear ramp over the pair index blends the ones between."""

    def pair_index(turns: float) -> float:
        """The (fractional) pair that turns this many times within the original context."""
        context = rope.original_max_position_embeddings
        return (head_dim * math.log(context / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))

    first, last = pair_index(rope.beta_fast), pair_index(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    keep = 1 - ramp
    stretched = 1.0 / (rope.factor * periods)
    return stretched * (1 - keep) + plain * keep


def attention_scaling(rope: RopeConfig) -> float:
    """The factor on cosines and sines; only yarn has one other than 1. It scales queries and keys alike."""
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def cos_sin_table(rope: RopeConfig, head_dim: int, max_len: int) -> torch.Tensor:
    """fp32 [max_len, head_dim]: per position head_dim/2 cosines, then head_dim/2 sines, the attention factor
    folded in. Half rotation: element i of a head pairs with element i + head_dim/2."""
    positions = torch.arange(max_len, dtype=torch.int64).to(torch.float32)
    angles = positions[:, None] * inverse_frequencies(rope, head_dim)
    scale = attention_scaling(rope)
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=1)
