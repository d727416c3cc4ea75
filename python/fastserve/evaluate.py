# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a text: how well a model predicts it, measured with the engine that serves it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastserve.config import SamplingParams
from fastserve.errors import FastserveError, InvalidRequest
from fastserve.json_file import read_bytes
from fastserve.llm import LLM

MAX_TEXT_BYTES = 256 * 2**20
DEFAULT_CONTEXT = 1024
Progress = Callable[[int, int], None]  # (tokens scored, tokens in all)


@dataclass(frozen=True)
class Perplexity:
    """num_tokens scored, their negative log-likelihood in nats, and the seconds it took."""

    num_tokens: int
    nats: float
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token; infinite where a token had no probability."""
        mean = self.nats / self.num_tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def __str__(self) -> str:
        return f"tokens {self.num_tokens}  perplexity {self.perplexity:.4f}  {self.tokens_per_second:.0f} tok/s"


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) of the text are one prompt, of which [first_scored, end) count."""

    begin: int
    end: int
    first_scored: int


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of `context` tokens, each `stride` further than the last, that score every token once.

    With stride = context they do not overlap, and the first token of each, which nothing precedes, is not scored.
    A smaller stride gives every token at least context - stride tokens before it, and costs that much more.
    """
    scored_to = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + context, num_tokens)
        first = max(scored_to, begin + 1)
        if first < end:
            yield Window(begin, end, first)
        scored_to = end
        if end == num_tokens:
            return


def measure_perplexity(
    llm: LLM,
    token_ids: Sequence[int],
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """The perplexity of `token_ids`, window by window, so that memory does not grow with the text.

    context: tokens of a window; None = 1024, or what the engine holds. stride: see `windows`; None = context.
    Raises InvalidRequest for sizes that cannot be, FastserveError if the engine fails on a window.
    """
    longest = llm.loaded.runner.max_model_len - 1  # a request also makes one token
    context = min(DEFAULT_CONTEXT, longest) if context is None else context
    stride = context if stride is None else stride
    if not 2 <= context <= longest:
        raise InvalidRequest(f"context={context} is not allowed; this engine takes 2 to {longest} tokens")
    if not 1 <= stride <= context:
        raise InvalidRequest(f"stride={stride} is not allowed; it is 1 to context={context}")
    if len(token_ids) < 2:
        raise InvalidRequest(f"a text of {len(token_ids)} tokens has no perplexity; at least 2 are needed")
    plan = list(windows(len(token_ids), context, stride))
    total = sum(window.end - window.first_scored for window in plan)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False, ignore_eos=True)
    nats: list[float] = []
    done, start = 0, time.perf_counter()
    for window in plan:
        prompt = list(token_ids[window.begin : window.end])
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        if output.prompt_logprobs is None or len(output.prompt_logprobs) != len(prompt):
            raise FastserveError(f"the engine failed on tokens {window.begin} to {window.end}: {output.error!r}")
        logprobs: list[float] = []
        for index in range(window.first_scored - window.begin, len(prompt)):
            entry = output.prompt_logprobs[index]
            assert entry is not None  # only the first token of a prompt has none, and it is never scored
            logprobs.append(entry[prompt[index]].logprob)
        nats.append(-math.fsum(logprobs))
        done += len(logprobs)
        if progress is not None:
            progress(done, total)
    return Perplexity(total, math.fsum(nats), time.perf_counter() - start)


def read_text(path: str | Path) -> str:
    """A UTF-8 text file. Raises FastserveError for a file that is no text or too large."""
    data = read_bytes(Path(path), MAX_TEXT_BYTES)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FastserveError(f"{path}: not a text in UTF-8 (byte {error.start})") from None


def read_text_tokens(llm: LLM, path: str | Path, max_tokens: int | None = None) -> list[int]:
    """The first `max_tokens` (None: all) tokens of a text file, with the tokens that the model's tokenizer puts in
    front of a text. Raises FastserveError as `read_text` does."""
    if max_tokens is not None and max_tokens < 2:
        raise InvalidRequest(f"max_tokens={max_tokens} is not allowed; at least 2 are needed")
    tokenizer = llm.loaded.tokenizer
    if tokenizer is None:
        raise FastserveError("this LLM was opened without a tokenizer, so it cannot read text")
    return tokenizer.encode(read_text(path))[:max_tokens]
