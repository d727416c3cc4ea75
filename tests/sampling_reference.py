# SPDX-License-Identifier: Apache-2.0
"""The sampling ops once more, as csrc/ops/ops.h states them: in numpy and float64, by sorting, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

MASK32 = np.uint64(0xFFFFFFFF)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters [N, 4], as uint64 holding 32 bits each."""
    c = counter.astype(np.uint64).T.copy()
    key0, key1 = (np.uint64(word) for word in key)
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * c[0]
        product1 = np.uint64(0xCD9E8D57) * c[2]
        high0, high1 = product0 >> np.uint64(32), product1 >> np.uint64(32)
        c = np.stack([high1 ^ c[1] ^ key0, product1 & MASK32, high0 ^ c[3] ^ key1, product0 & MASK32])
        key0 = (key0 + np.uint64(0x9E3779B9)) & MASK32
        key1 = (key1 + np.uint64(0xBB67AE85)) & MASK32
    return c.T


def exponential_noise(vocab: int, seed: int, position: int) -> np.ndarray:
    """E of every token, float64 [vocab]."""
    counter = np.zeros((-(-vocab // 4), 4), np.uint64)
    counter[:, 0] = np.arange(len(counter))
    counter[:, 1] = position
    seed %= 2**64
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1)[:vocab]
    return -np.log1p(-(words.astype(np.float64) + 0.5) / 2.0**32)


@dataclass(frozen=True)
class RowParams:
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seen: Mapping[int, int] = field(default_factory=dict)  # token id -> times in the output
    bias: tuple[tuple[int, float], ...] = ()
    allowed: frozenset[int] | None = None


def changed_logits(logits: np.ndarray, p: RowParams) -> np.ndarray:
    """After mask, bias and penalties: these define ties, so they are computed in float32, as stated."""
    z = logits.astype(np.float32).copy()
    if p.allowed is not None:
        z[[i for i in range(len(z)) if i not in p.allowed]] = -np.inf
    for token_id, value in p.bias:
        z[token_id] += np.float32(value)
    repetition = np.float32(p.repetition_penalty)
    for token_id, count in p.seen.items():
        with np.errstate(over="ignore"):
            z[token_id] = z[token_id] / repetition if z[token_id] > 0 else z[token_id] * repetition
        if count > 0:
            z[token_id] -= np.float32(p.frequency_penalty) * np.float32(count)
            z[token_id] -= np.float32(p.presence_penalty)
    return z


def in_order(z: np.ndarray) -> np.ndarray:
    """All ids by (logit descending, id ascending)."""
    return np.argsort(-z.astype(np.float64), kind="stable")


def kept(z: np.ndarray, p: RowParams) -> tuple[np.ndarray, np.ndarray, bool]:
    """The kept ids in order, their weights, and whether a filter's decision is too close to call in float32."""
    order = in_order(z)
    with np.errstate(over="ignore"):
        weights = np.exp((z[order].astype(np.float64) - float(z.max())) / float(np.float32(p.temperature)))
    keep = z[order] > -np.inf
    close = False
    if p.min_p > 0:
        least = float(np.float32(p.min_p))
        close |= bool(np.any((np.abs(weights - least) < 3e-6 * least) & (weights != least)))
        keep &= weights >= least
    order, weights = order[keep], weights[keep]
    if p.top_k > 0:
        order, weights = order[: p.top_k], weights[: p.top_k]
    if p.top_p < 1:
        reached = np.cumsum(weights) / weights.sum()
        count = int(np.searchsorted(reached, float(np.float32(p.top_p)))) + 1
        near = np.abs(reached - float(np.float32(p.top_p))) < 3e-6
        # Of tokens with weight 1 the sums are exact, on both sides.
        close |= bool(near.any()) and not np.array_equal(weights, np.ones_like(weights))
        order, weights = order[:count], weights[:count]
    return order, weights, close


def sample_row(logits: np.ndarray, p: RowParams) -> tuple[int, bool]:
    """The token, or -1 or -2, and whether float32 may rightly choose another one."""
    if not np.all(logits < np.inf):  # NaN too
        return -1, False
    z = changed_logits(logits, p)
    if not np.all(z < np.inf):
        return -1, False
    if z.max() == -np.inf:
        return -2, False
    if p.temperature < np.float32(1e-5):
        return int(np.argmax(z)), False
    ids, weights, close = kept(z, p)
    scores = weights / exponential_noise(len(z), p.seed, p.position)[ids]
    best = int(np.argmax(scores))
    runner_up = np.partition(scores, -2)[-2] if len(scores) > 1 else 0.0
    return int(ids[best]), close or runner_up > scores[best] * (1 - 1e-5)


def arguments_of(logits: torch.Tensor, rows: list[RowParams], num_threads: int = 2) -> dict[str, Any]:
    """The op's arguments, in the order of its declaration. What no row uses is None."""
    batch, vocab = logits.shape
    num_words = -(-vocab // 32)
    arguments: dict[str, Any] = {"token_ids": torch.zeros(batch, dtype=torch.int32), "logits": logits}

    def column(name: str, field_name: str, dtype: torch.dtype, needed: bool) -> None:
        values = [getattr(row, field_name) for row in rows]
        arguments[name] = torch.tensor(values, dtype=dtype) if needed else None

    draws = any(row.temperature > 0 for row in rows)
    column("temperature", "temperature", torch.float32, draws)
    column("top_k", "top_k", torch.int32, any(row.top_k for row in rows))
    column("top_p", "top_p", torch.float32, any(row.top_p < 1 for row in rows))
    column("min_p", "min_p", torch.float32, any(row.min_p > 0 for row in rows))
    column("seeds", "seed", torch.int64, draws)
    column("positions", "position", torch.int32, draws)
    seen = any(row.seen for row in rows)
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        column(name, name, torch.float32, seen)

    def ragged(lists: list[list[Any]], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        offsets = np.cumsum([0, *map(len, lists)]).astype(np.int32)
        return torch.from_numpy(offsets), torch.tensor([value for values in lists for value in values], dtype=dtype)

    arguments.update(seen_offsets=None, seen_ids=None, seen_counts=None)
    if seen:
        arguments["seen_offsets"], arguments["seen_ids"] = ragged([[*row.seen] for row in rows], torch.int32)
        arguments["seen_counts"] = ragged([[*row.seen.values()] for row in rows], torch.int32)[1]
    arguments.update(bias_offsets=None, bias_ids=None, bias=None)
    if any(row.bias for row in rows):
        bias_ids = [[token_id for token_id, _ in row.bias] for row in rows]
        arguments["bias_offsets"], arguments["bias_ids"] = ragged(bias_ids, torch.int32)
        arguments["bias"] = ragged([[v for _, v in row.bias] for row in rows], torch.float32)[1]
    arguments.update(allowed=None, allowed_rows=None)
    masks = [row.allowed for row in rows if row.allowed is not None]
    if masks:
        words = np.zeros((len(masks), num_words), np.uint32)
        for words_of_row, mask in zip(words, masks, strict=True):
            for token_id in mask:
                words_of_row[token_id // 32] |= np.uint32(1 << (token_id % 32))
        arguments["allowed"] = torch.from_numpy(words.view(np.int32))
        indices = np.cumsum([row.allowed is not None for row in rows]) - 1
        indices[[row.allowed is None for row in rows]] = -1
        arguments["allowed_rows"] = torch.from_numpy(indices.astype(np.int32))
    arguments["workspace"] = torch.empty(num_threads, 4 * vocab)
    return arguments


def rows_of(arguments: Mapping[str, Any]) -> list[RowParams]:
    """The inverse of `arguments_of`."""
    given = {name: value.tolist() for name, value in arguments.items() if torch.is_tensor(value) and value.ndim == 1}

    def entries(kind: str, values: str, b: int) -> list[tuple[int, Any]]:
        begin, end = given[f"{kind}_offsets"][b : b + 2]
        return list(zip(given[f"{kind}_ids"][begin:end], given[values][begin:end], strict=True))

    singular = {"seeds": "seed", "positions": "position"}
    names = ["temperature", "top_k", "top_p", "min_p", "seeds", "positions"]
    names += ["repetition_penalty", "frequency_penalty", "presence_penalty"]
    rows = []
    for b in range(len(given["token_ids"])):
        fields: dict[str, Any] = {singular.get(name, name): given[name][b] for name in names if name in given}
        if "seen_offsets" in given:
            fields["seen"] = dict(entries("seen", "seen_counts", b))
        if "bias_offsets" in given:
            fields["bias"] = tuple(entries("bias", "bias", b))
        if "allowed_rows" in given and given["allowed_rows"][b] >= 0:
            words = arguments["allowed"][given["allowed_rows"][b]].numpy()
            is_allowed = np.unpackbits(words.view(np.uint8), bitorder="little")
            fields["allowed"] = frozenset(np.flatnonzero(is_allowed).tolist())
        rows.append(RowParams(**fields))
    return rows


def sample(arguments: Mapping[str, Any]) -> tuple[torch.Tensor, list[bool]]:
    logits = arguments["logits"].numpy()
    found = [sample_row(logits[b], row) for b, row in enumerate(rows_of(arguments))]
    return torch.tensor([token for token, _ in found], dtype=torch.int32), [close for _, close in found]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - (float(x.max()) + math.log(np.exp(x - x.max()).sum()))
