# SPDX-License-Identifier: Apache-2.0
"""What a benchmark asks of a server, and when: prompts with their lengths, and times of arrival."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.errors import FastserveError

# Common words, so that random prompts are made of tokens that every tokenizer has, and read back as they were written.
WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part over new sound "
    "take only little work know place year live me back give most very after thing our just name good sentence man "
    "think say great where help through much before line right too mean old any same tell boy follow came want show "
    "also around form three small set put end does another well large must big even such because turn here why ask "
    "went men read need land different home us move try kind hand picture again change off play spell air away animal "
    "house point page letter mother answer found study still learn should world high every near add food between own"
)


@dataclass(frozen=True)
class Ask:
    """One request: a prompt, its length in tokens (as planned; the server counts), and the most it may answer."""

    prompt: str
    num_input: int
    num_output: int


Encode = Callable[[str], Awaitable[list[int]]]
Decode = Callable[[list[int]], Awaitable[str]]


@dataclass(frozen=True)
class Codec:
    """Text to token ids without special tokens, and back: a tokenizer of this machine, or the server's endpoints."""

    encode: Encode
    decode: Decode


class RandomPrompts:
    """Prompts of tokens drawn evenly from those of common words."""

    def __init__(self, codec: Codec, pool: list[int], seed: int) -> None:
        self._codec = codec
        self._pool = pool
        self._random = random.Random(seed)

    @classmethod
    async def make(cls, codec: Codec, seed: int) -> RandomPrompts:
        return cls(codec, sorted(set(await codec.encode(" " + WORDS))), seed)

    def tokens(self, num: int) -> list[int]:
        return self._random.choices(self._pool, k=num)

    def length(self, mean: int, ratio: float) -> int:
        """Evenly from mean * (1 - ratio) to mean * (1 + ratio), at least 1."""
        spread = int(mean * ratio)
        return max(1, self._random.randint(mean - spread, mean + spread))

    async def text(self, tokens: list[int]) -> str:
        return await self._codec.decode(tokens)


async def random_asks(
    codec: Codec, num: int, *, num_input: int, num_output: int, range_ratio: float = 0.0, num_prefix: int = 0, seed: int
) -> list[Ask]:
    """`num` prompts of num_prefix shared and about `num_input` other tokens."""
    prompts = await RandomPrompts.make(codec, seed)
    prefix = prompts.tokens(num_prefix)
    asks = []
    for _ in range(num):
        tokens = prefix + prompts.tokens(prompts.length(num_input, range_ratio))
        asks.append(Ask(await prompts.text(tokens), len(tokens), prompts.length(num_output, range_ratio)))
    return asks


async def prefix_repetition_asks(
    codec: Codec, num: int, *, num_prefixes: int, prefix_len: int, suffix_len: int, num_output: int, seed: int
) -> list[Ask]:
    """`num` prompts that begin with one of `num_prefixes` prefixes, in random order."""
    prompts = await RandomPrompts.make(codec, seed)
    prefixes = [prompts.tokens(prefix_len) for _ in range(num_prefixes)]
    asks = []
    for i in range(num):
        tokens = prefixes[i % num_prefixes] + prompts.tokens(suffix_len)
        asks.append(Ask(await prompts.text(tokens), len(tokens), num_output))
    random.Random(seed).shuffle(asks)
    return asks


async def sharegpt_asks(codec: Codec, num: int, path: Path, num_output: int | None, seed: int) -> list[Ask]:
    """First questions of conversations in ShareGPT's JSON form, with the lengths of their answers. Conversations
    with less than 4 tokens in either or more than 1024 (2048 together) are left out."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        pairs = [
            (turns[0]["value"], turns[1]["value"])
            for turns in (one.get("conversations") or one.get("conversation") or [] for one in given)
            if len(turns) >= 2
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FastserveError(f"{path} is not in ShareGPT's form: a list of {{'conversations': [...]}}") from None
    random.Random(seed).shuffle(pairs)
    asks: list[Ask] = []
    for question, answer in pairs:
        if len(asks) == num:
            break
        num_input, num_answer = len(await codec.encode(question)), len(await codec.encode(answer))
        if min(num_input, num_answer) >= 4 and num_input <= 1024 and num_input + num_answer <= 2048:
            asks.append(Ask(question, num_input, num_output or num_answer))
    return asks


async def custom_asks(codec: Codec, num: int, path: Path, num_output: int) -> list[Ask]:
    """Lines of JSON with a "prompt", and "output_tokens" where a line has an own limit."""
    asks: list[Ask] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if len(asks) == num:
                break
            if not line.strip():
                continue
            try:
                one: Any = json.loads(line)
                prompt, limit = one["prompt"], int(one.get("output_tokens") or num_output)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise FastserveError(f"{path} line {number}: must be a JSON object with a prompt") from None
            if not isinstance(prompt, str) or not prompt:
                raise FastserveError(f"{path} line {number}: prompt must be a text that is not empty")
            asks.append(Ask(prompt, len(await codec.encode(prompt)), limit))
    return asks


def arrivals(
    num: int, rate: float, burstiness: float, seed: int, ramp: tuple[str, float, float] | None = None
) -> list[float]:
    """When each of `num` requests is sent, in seconds from the start.

    Gaps are gamma-distributed with shape `burstiness` (1: a Poisson process; below: bursts; above: more even) and mean
    1 / rate, then scaled so that the last request comes at num / rate exactly: runs with other seeds offer the same
    load. An infinite rate sends all at once. `ramp`: (linear or exponential, first rate, last rate) instead of one.
    """
    if ramp is not None:
        kind, first, last = ramp
        part = np.arange(num) / max(1, num - 1)
        rates = first + (last - first) * part if kind == "linear" else first * (last / first) ** part
    elif rate == float("inf"):
        return [0.0] * num
    else:
        rates = np.full(num, rate)
    gaps = np.random.default_rng(seed).gamma(burstiness, 1.0, num) / burstiness / rates
    times = np.cumsum(gaps)
    total = float(np.sum(1.0 / rates))
    return [float(time) for time in times * (total / times[-1])]
