# SPDX-License-Identifier: Apache-2.0
"""Turns sampled tokens into what users get: text, logprobs, and one output per request with its n
completions."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

from fastserve.config import RequestOutputKind, SamplingParams
from fastserve.engine.scheduler import StepItem
from fastserve.engine.stop_strings import StopMatcher
from fastserve.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
    SampledToken,
)
from fastserve.request import Request


class Detokenizer(Protocol):
    def push(self, token_id: int, /) -> str:
        """The text that is certain once this token has come."""

    def flush(self, token_ids: Sequence[int] = (), /) -> str:
        """The rest of the text, with the last tokens `token_ids`, when none comes any more."""


class Tokenizer(Protocol):
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


MakeDetokenizer = Callable[[bool, Sequence[int]], Detokenizer]  # (skip_special_tokens, prompt_token_ids)


class OutputProcessor:
    """Keeps the text of every live request. `tokenizer` None: outputs carry token ids only."""

    def __init__(self, tokenizer: Tokenizer | None, make_detokenizer: MakeDetokenizer | None = None) -> None:
        if tokenizer is not None and make_detokenizer is None:
            from fastserve.tokenizer import IncrementalDetokenizer

            def make_detokenizer(skip_special: bool, prompt: Sequence[int]) -> Detokenizer:
                return IncrementalDetokenizer(tokenizer, skip_special, prompt)  # type: ignore[arg-type]

        self._make_detokenizer = make_detokenizer
        self._decode_one: Callable[[int], str] | None = None
        if tokenizer is not None:
            self._decode_one = lru_cache(maxsize=65536)(lambda token_id: tokenizer.decode([token_id], False))
        self._groups: dict[str, _Group] = {}
        self._completions: dict[str, _Completion] = {}  # by the id of the sequence
        self._touched: dict[str, _Group] = {}  # what collect() has to look at, in order

    def add(self, request_id: str, prompt: str | None, params: SamplingParams, requests: Sequence[Request]) -> None:
        """Registers a request and its n sequences, in index order."""
        group = _Group(request_id, prompt, params)
        for request in requests:
            detokenizer, decode_one = None, None
            if params.detokenize and self._make_detokenizer is not None:
                detokenizer = self._make_detokenizer(params.skip_special_tokens, request.prompt_token_ids)
                decode_one = self._decode_one
            completion = _Completion(group, len(group.completions), request, detokenizer, decode_one)
            group.completions.append(completion)
        self._groups[request_id] = group
        for completion in group.completions:
            self._completions[completion.request.request_id] = completion

    def forget(self, request_id: str) -> None:
        """Undoes `add`: nothing more is told about the request."""
        self._touched.pop(request_id, None)
        for completion in self._groups.pop(request_id).completions:
            del self._completions[completion.request.request_id]

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._groups

    @property
    def has_outputs(self) -> bool:
        """Whether the next collect() may return something."""
        return bool(self._touched)

    def requests(self, request_id: str) -> list[Request]:
        """The sequences of a live request; none if the id is unknown."""
        group = self._groups.get(request_id)
        return [] if group is None else [completion.request for completion in group.completions]

    def push(self, item: StepItem, sampled: SampledToken) -> str | None:
        """Takes what the device gave one sequence; returns the stop string that now ends it, if one does.

        Need not be called for a request with `has_late_text` before its last token.
        """
        completion = self._completions[item.request.request_id]
        if sampled.prompt:
            completion.push_prompt(item.start + 1, sampled.prompt)
        if sampled.token_id is None:
            return None
        stop = completion.push(sampled, sampled.token_id)
        group = completion.group
        if not group.is_final_only or stop is not None or completion.request.finish_reason is not None:
            self._touched[group.request_id] = group
        return stop

    def end(self, request: Request, error: BaseException | None = None) -> None:
        """Takes notice that a sequence was ended from outside: aborted, or failed with `error`."""
        completion = self._completions[request.request_id]
        group = completion.group
        self._touched[group.request_id] = group
        if error is None:
            try:
                completion.finish_text()
            except Exception as failure:  # aborted all the same, with the text that there is
                group.error = failure
        else:
            group.error = error

    def collect(self, now: float) -> list[RequestOutput]:
        """The outputs of all requests that got something since the last call; forgets those that have
        finished."""
        touched, self._touched = self._touched, {}
        outputs = []
        for group in touched.values():
            finished = group.finished
            if finished or not group.is_final_only:
                outputs.append(group.output(now, finished))
            if finished:
                self.forget(group.request_id)
        return outputs


class _Group:
    """One request of a user: a prompt with n completions."""

    __slots__ = ("completions", "error", "is_final_only", "params", "prompt", "prompt_logprobs", "request_id")

    def __init__(self, request_id: str, prompt: str | None, params: SamplingParams) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.is_final_only = params.output_kind is RequestOutputKind.FINAL_ONLY
        self.completions: list[_Completion] = []
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        self.error: BaseException | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def finished(self) -> bool:
        # A generator for all() takes five times as long.
        for completion in self.completions:  # noqa: SIM110
            if completion.request.finish_reason is None:
                return False
        return True

    def output(self, now: float, finished: bool) -> RequestOutput:
        """What is to be told now, as output_kind says."""
        completions, delta = self.completions, self.params.output_kind is RequestOutputKind.DELTA
        first = completions[0].request
        prompt_logprobs = self.prompt_logprobs
        if delta:
            self.prompt_logprobs = None  # told once
            if len(completions) > 1:
                completions = [completion for completion in completions if completion.has_news]
        return RequestOutput(
            self.request_id,
            self.prompt,
            first.prompt_token_ids,
            prompt_logprobs,
            [completion.output(delta=delta) for completion in completions],
            finished,
            self._metrics(now if finished else None),
            first.num_cached_tokens,
            self.error,
        )

    def _metrics(self, finished_s: float | None) -> RequestMetrics:
        first = self.completions[0].request
        if len(self.completions) == 1:
            begun, token, last, num_preemptions = (
                first.first_scheduled_s,
                first.first_token_s,
                first.last_token_s,
                first.num_preemptions,
            )
        else:
            requests = [completion.request for completion in self.completions]
            begun = _known(min, [r.first_scheduled_s for r in requests])
            token = _known(min, [r.first_token_s for r in requests])
            last = _known(max, [r.last_token_s for r in requests])
            num_preemptions = sum(r.num_preemptions for r in requests)
        return RequestMetrics(first.arrival_s, begun, token, last, finished_s, num_preemptions)


def _known(choose: Callable[[list[float]], float], times: list[float | None]) -> float | None:
    known = [time for time in times if time is not None]
    return choose(known) if known else None


class _Completion:
    """One sequence: its text so far, and how much of everything has been told already."""

    __slots__ = (
        "_cumulative_logprob",
        "_decode_one",
        "_detokenizer",
        "_logprobs",
        "_num_told_chars",
        "_num_told_tokens",
        "_stop",
        "_text",
        "_told_end",
        "_wants_logprobs",
        "group",
        "index",
        "request",
    )

    def __init__(
        self,
        group: _Group,
        index: int,
        request: Request,
        detokenizer: Detokenizer | None,
        decode_one: Callable[[int], str] | None,
    ) -> None:
        self.group = group
        self.index = index
        self.request = request
        self._detokenizer = detokenizer
        self._decode_one = decode_one
        params = request.params
        self._stop = StopMatcher(tuple(params.stop or ()), params.include_stop_str_in_output)
        self._text = ""
        self._wants_logprobs = params.logprobs is not None
        self._logprobs: list[PositionLogprobs] = []
        self._cumulative_logprob = 0.0
        self._num_told_tokens = self._num_told_chars = 0
        self._told_end = False

    def push(self, sampled: SampledToken, token_id: int) -> str | None:
        """Takes one token, which the request has already; returns the stop string that it completes."""
        request = self.request
        if self._wants_logprobs:
            self._logprobs.append(self._position_logprobs(sampled, token_id))
            self._cumulative_logprob += sampled.logprob or 0.0
        if self._detokenizer is None:
            return None
        stop = None
        if not request.has_late_text and not self._ends_with_token:
            stop = self._add_text(self._detokenizer.push(token_id))
        if stop is None and request.finish_reason is not None:
            stop = self.finish_text()
        return stop

    @property
    def _ends_with_token(self) -> bool:
        """Whether the last token is EOS or a stop token, which are not text."""
        return self.request.finish_reason == "stop" and not self.request.params.include_stop_str_in_output

    def push_prompt(self, position: int, tokens: Sequence[SampledToken]) -> None:
        """Takes the logprobs of prompt tokens from `position` on; those known already (recomputed) are passed
        over."""
        known = self.group.prompt_logprobs
        if known is None or self.index != 0:
            return
        for i, token in enumerate(tokens, position):
            if i == len(known) and token.token_id is not None:
                known.append(self._position_logprobs(token, token.token_id))

    def finish_text(self) -> str | None:
        """Brings out what was held back; returns the stop string that the very last characters complete."""
        if self._detokenizer is None:
            return None
        last: Sequence[int] = ()
        if self.request.has_late_text:
            last = self.request.output_token_ids
            last = last[:-1] if self._ends_with_token else last
        stop = self._add_text(self._detokenizer.flush(last))
        self._text += self._stop.flush()
        return stop

    def _add_text(self, text: str) -> str | None:
        armed = self._stop.is_empty or self.request.num_output_tokens > self.request.params.min_tokens
        shown, stop = self._stop.push(text, armed)
        self._text += shown
        return stop

    def _position_logprobs(self, token: SampledToken, token_id: int) -> PositionLogprobs:
        decode: Callable[[int], str | None] = self._decode_one or (lambda _: None)
        entries = {token_id: Logprob(token.logprob or 0.0, token.rank, decode(token_id))}
        for other_id, logprob, rank in token.top:
            entries.setdefault(other_id, Logprob(logprob, rank, decode(other_id)))
        return entries

    @property
    def has_news(self) -> bool:
        ended = self.request.finish_reason is not None and not self._told_end
        return ended or self.request.num_output_tokens > self._num_told_tokens

    def output(self, *, delta: bool) -> CompletionOutput:
        """Everything so far, or what is new since the last delta."""
        request = self.request
        tokens_from, chars_from = (self._num_told_tokens, self._num_told_chars) if delta else (0, 0)
        self._num_told_tokens, self._num_told_chars = request.num_output_tokens, len(self._text)
        self._told_end = request.finish_reason is not None
        return CompletionOutput(
            self.index,
            self._text[chars_from:],
            request.token_ids[request.num_prompt_tokens + tokens_from :],
            self._cumulative_logprob if self._wants_logprobs else None,
            self._logprobs[tokens_from:] if self._wants_logprobs else None,
            request.finish_reason,
            request.stop_reason,
        )
