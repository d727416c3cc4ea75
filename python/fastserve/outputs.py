# SPDX-License-Identifier: Apache-2.0
"""What a request gives back. Names are vLLM's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithm of a token's probability, before temperature and filters."""

    logprob: float
    rank: int | None = None  # 1 = the most likely token
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]  # by token id: the chosen one first, then the most likely


# A stream makes these three for every token. They are for reading; frozen ones would take three times as long to make.


@dataclass(slots=True)
class RequestMetrics:
    """When things happened, in seconds of the engine's clock; None = not yet."""

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0  # of all its sequences


@dataclass(slots=True)
class CompletionOutput:
    """One of the `n` completions of a prompt; text, token_ids and logprobs are all or new, as output_kind
    says."""

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None  # of all tokens so far; None unless logprobs were asked for
    logprobs: list[PositionLogprobs] | None = None  # one entry per token of token_ids
    finish_reason: str | None = None  # stop, length, abort, error; None while unfinished
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it; None for EOS

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request: its prompt and its completions in index order."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None  # the first entry is None: nothing precedes it
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None  # prompt tokens served from the prefix cache
    error: BaseException | None = None  # the cause when a completion's finish_reason is "error"


NOT_A_NUMBER = -1  # the token_id of a row whose logits hold NaN or +infinity
NOTHING_ALLOWED = -2  # the token_id of a row in which every token is masked


class SampledToken(NamedTuple):  # one for each item of each step: a tuple is made faster than a frozen dataclass
    """What the runner returns for one item of a step.

    `top` holds (token id, logprob, rank), most likely first, as many as were asked for. `prompt` is filled
    only for requests with prompt_logprobs: for each computed row whose next token is in the prompt, that next
    token.
    """

    token_id: int | None  # None: nothing was sampled, only `prompt` counts; below 0: see above
    logprob: float | None = None
    rank: int | None = None
    top: Sequence[tuple[int, float, int]] = ()
    prompt: Sequence["SampledToken"] = ()
