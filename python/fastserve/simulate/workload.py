# SPDX-License-Identifier: Apache-2.0
"""What arrives: made of distributions, or read from a trace."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fastserve.errors import InvalidRequest

MAX_TOKENS = 2**24  # of a prompt or an output
MAX_LINE_CHARS = 2**20
TRACE_BLOCK = 512  # tokens that an entry of hash_ids stands for

Draw = Callable[[Random], int]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come. Its prompt consists of parts (text, tokens): equal beginnings are equal texts."""

    arrival_s: float
    prompt: tuple[tuple[int, int], ...]
    output_tokens: int  # what it will give; only the runner knows
    max_tokens: int  # what the request allows

    @property
    def prompt_tokens(self) -> int:
        return sum(count for _, count in self.prompt)

    def token_ids(self) -> list[int]:
        return [text for text, count in self.prompt for _ in range(count)]


def parse_lengths(text: str) -> Draw:
    """ "512", "32-4096" (uniform), "lognormal:MEDIAN:SIGMA" or "exponential:MEAN"; raises InvalidRequest."""
    kind, _, rest = text.partition(":")
    try:
        if kind == "lognormal":
            median, sigma = (float(part) for part in rest.split(":"))
            if 1 <= median <= MAX_TOKENS and 0 <= sigma <= 10:
                return lambda random: _whole(median * math.exp(random.gauss(0.0, sigma)))
        elif kind == "exponential":
            mean = float(rest)
            if 1 <= mean <= MAX_TOKENS:
                return lambda random: _whole(random.expovariate(1 / mean))
        else:
            low, high = (int(part) for part in (text.split("-") if "-" in text else (text, text)))
            if 1 <= low <= high <= MAX_TOKENS:
                return lambda random: random.randint(low, high)
    except ValueError:
        pass
    raise InvalidRequest(
        f"length {text!r} is not understood: give N, LOW-HIGH, lognormal:MEDIAN:SIGMA or exponential:MEAN, with "
        f"lengths of 1 to {MAX_TOKENS} tokens"
    )


def _whole(value: float) -> int:
    return min(max(1, round(value)), MAX_TOKENS)


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Requests of independent lengths, each with one of `num_prefixes` shared beginnings (0: none)."""

    num_requests: int
    prompt_tokens: str = "512"  # of each request's own; see parse_lengths
    output_tokens: str = "128"
    max_tokens: int | None = None  # None: exactly the output
    rate: float | None = None  # mean arrivals per second (Poisson); None: all at the start
    num_prefixes: int = 0
    prefix_tokens: int = 0
    order: str = "random"  # of the prefixes: random, or grouped: all requests of one after another
    seed: int = 0

    def arrivals(self) -> Iterator[Arrival]:
        random = Random(self.seed)
        prompt, output = parse_lengths(self.prompt_tokens), parse_lengths(self.output_tokens)
        prefixes = [number % self.num_prefixes for number in range(self.num_requests)] if self.num_prefixes else []
        if self.order == "grouped":
            prefixes.sort()
        else:
            random.shuffle(prefixes)
        now = 0.0
        for number in range(self.num_requests):
            if self.rate is not None:
                now += random.expovariate(self.rate)
            own = (number + 1, prompt(random))
            parts = ((2**30 + prefixes[number], self.prefix_tokens), own) if prefixes else (own,)
            length = output(random)
            limit = length if self.max_tokens is None else self.max_tokens
            yield Arrival(now, parts, min(length, limit), limit)


def read_trace(path: str | Path) -> Iterator[Arrival]:
    """Requests of a JSONL file, in order of arrival. InvalidRequest names the line that is wrong.

    A line has "arrival_s", "prompt_tokens" and "output_tokens", and may have "max_tokens", and "prefix" (a name)
    with "prefix_tokens": the first tokens of the prompt, the same in all lines with that name. Lines with
    "timestamp" (milliseconds), "input_length", "output_length" and "hash_ids" (one for each 512 tokens), as public
    traces have them, are read as well.
    """
    names: dict[Any, int] = {}
    last = 0.0
    with open(path, encoding="utf-8") as lines:
        number = 0
        while line := lines.readline(MAX_LINE_CHARS):
            number += 1
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
                arrival = _public(fields, number, names) if "hash_ids" in fields else _own(fields, number, names)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
                raise InvalidRequest(f"{path}, line {number}: {what}") from None
            if arrival.arrival_s < last:
                raise InvalidRequest(f"{path}, line {number}: arrives before the line above; sort the file by arrival")
            last = arrival.arrival_s
            yield arrival


def _own(fields: dict[str, Any], number: int, names: dict[Any, int]) -> Arrival:
    prompt, output = _count(fields, "prompt_tokens"), _count(fields, "output_tokens")
    parts: tuple[tuple[int, int], ...] = ((number, prompt),)
    if "prefix" in fields:
        shared = _count(fields, "prefix_tokens")
        if not isinstance(fields["prefix"], str) or shared > prompt:
            raise ValueError(f"prefix must be a name, and prefix_tokens at most prompt_tokens ({prompt})")
        text = names.setdefault(fields["prefix"], 2**30 + len(names))
        parts = ((text, shared), (number, prompt - shared))
    limit = max(output, _count(fields, "max_tokens")) if "max_tokens" in fields else output
    return Arrival(_seconds(fields, "arrival_s", 1.0), parts, output, limit)


def _public(fields: dict[str, Any], number: int, names: dict[Any, int]) -> Arrival:
    rest, parts = _count(fields, "input_length"), []
    for name in fields["hash_ids"]:
        count = min(rest, TRACE_BLOCK)
        parts.append((names.setdefault(name, 2**30 + len(names)), count))
        rest -= count
    output = _count(fields, "output_length")
    return Arrival(_seconds(fields, "timestamp", 1e-3), (*parts, (number, rest)), output, output)


def _count(fields: dict[str, Any], name: str) -> int:
    value = fields[name]
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        raise ValueError(f"{name}={str(value)[:40]} must be an integer from 1 to {MAX_TOKENS}")
    return value


def _seconds(fields: dict[str, Any], name: str, unit: float) -> float:
    value = fields[name]
    if type(value) not in (int, float) or not 0 <= value * unit < 1e9:
        raise ValueError(f"{name}={str(value)[:40]} must be a time that is not negative")
    return value * unit
