# SPDX-License-Identifier: Apache-2.0
"""The engine loop: schedule a step, run it, hand out the tokens."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from fastserve.config import EngineConfig, SamplingParams
from fastserve.engine.output_processor import MakeDetokenizer, OutputProcessor, Tokenizer
from fastserve.engine.scheduler import Scheduler, SchedulerStats, StepItem, StepPlan
from fastserve.errors import FastserveError, InvalidRequest
from fastserve.outputs import NOT_A_NUMBER, NOTHING_ALLOWED, RequestOutput, SampledToken
from fastserve.policies import get_policy
from fastserve.request import Request, SharedPrefix

MAX_CACHE_SALT_CHARS = 256
_SAMPLING_FAILURES = {
    NOT_A_NUMBER: "the model's logits hold NaN or infinity",
    NOTHING_ALLOWED: "the parameters of the request allow no token",
}


class Runner(Protocol):
    """Whatever computes steps: a model on a device, or a cost model with a virtual clock."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    def run(self, plan: StepPlan) -> Sequence[SampledToken | None]:
        """Computes all items of `plan`; the sampled token of each, in item order, None where it has none."""


class Engine:
    """Runs requests to their end, one step at a time. Not thread-safe: one thread calls its methods.

    `clock` gives seconds. A request can be added or aborted between any two steps.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        clock: Callable[[], float],
        tokenizer: Tokenizer | None = None,
        *,
        scheduler: Scheduler | None = None,
        make_detokenizer: MakeDetokenizer | None = None,
    ) -> None:
        self.config = config
        self._runner = runner
        self.clock = clock
        self.scheduler = scheduler or Scheduler(
            config, runner.num_blocks, runner.max_model_len, runner.eos_token_ids, get_policy(config.policy)
        )
        self._outputs = OutputProcessor(tokenizer, make_detokenizer)
        self._has_text = tokenizer is not None
        self._vocab_size = runner.vocab_size
        self._num_added = 0
        self.on_step: Callable[[StepPlan, float], None] | None = None  # told of every step and its seconds

    def step(self) -> list[RequestOutput]:
        """Computes one step and returns the outputs of the requests it advanced, and of those aborted before
        it.

        If the runner fails, the requests of this step end with finish_reason "error"; the others go on. What
        is no `Exception` (Ctrl-C) is raised again after that, and the engine can be used further.
        """
        begin = self.clock()
        plan = self.scheduler.schedule(begin)
        if plan.items:
            try:
                results = self._runner.run(plan)
                sampled = [None if result is None else result.token_id for result in results]
                self.scheduler.update(plan, sampled, self.clock())
            except BaseException as error:
                for request in self.scheduler.fail(plan):
                    self._outputs.end(request, error)
                if not isinstance(error, Exception):
                    raise
            else:
                for item, result in zip(plan.items, results, strict=True):
                    if result is not None:
                        self._deliver(item, result)
            if self.on_step is not None:
                self.on_step(plan, self.clock() - begin)
        return self._outputs.collect(self.clock())

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        index: int | str | None = None,
        shared_prefix: SharedPrefix | None = None,
    ) -> None:
        """Queues a request. InvalidRequest: it can never run, and gives up its place in its batch. QueueFull: try
        again later. Either leaves no other trace.

        Its n completions are sequences of their own, which meet in the prefix tree. `index` takes the place of the
        request's number in the order of arrival, of which its seed is made if it brings none. `shared_prefix` is the
        innermost of the prefixes that it shares in its batch; `end_batch` must follow.
        """
        try:
            self.check_request(prompt_token_ids, params, priority=priority, cache_salt=cache_salt)
        except InvalidRequest:
            if shared_prefix is not None:
                self.scheduler.give_up_prefix(shared_prefix, params.n)
            raise
        ids = [request_id] if params.n == 1 else [f"{request_id}#{i}" for i in range(params.n)]
        if request_id in self._outputs:
            raise InvalidRequest(f"{request_id!r}: a request of this id exists; ids must be unique")
        now, tokens = self.clock(), list(prompt_token_ids)
        index = self._num_added if index is None else index
        seed = _mixed_seed(self.config.seed, index) if params.seed is None else params.seed % 2**64
        requests = [
            Request(
                request_id=sequence_id,
                prompt_token_ids=tokens,
                params=params if i == 0 else replace(params, prompt_logprobs=None),
                arrival_s=now,
                priority=priority,
                cache_salt=cache_salt,
                seed=seed if i == 0 else _mixed_seed(seed, i),
                shared_prefix=shared_prefix,
            )
            for i, sequence_id in enumerate(ids)
        ]
        self._outputs.add(request_id, prompt, params, requests)
        try:
            for request in requests:
                self.scheduler.add(request)
        except BaseException:
            for request in requests:
                request.shared_prefix = None  # its place in the batch stays open
                self.scheduler.abort(request.request_id)
            self._outputs.forget(request_id)
            raise
        self._num_added += 1

    def end_batch(self, prefixes: Iterable[SharedPrefix]) -> None:
        """When the last request of a batch has ended, or no more of them come: its prefixes are no longer held."""
        self.scheduler.drop_prefixes(prefixes)

    @property
    def num_added(self) -> int:
        """Requests so far: the index of the next."""
        return self._num_added

    def check_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        """Raises InvalidRequest if such a request could never run here."""
        self.scheduler.check_prompt(len(prompt_token_ids))
        vocab_size = self._vocab_size
        for i, token_id in enumerate(prompt_token_ids):
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                given = str(token_id)[:40]
                raise InvalidRequest(f"prompt token {i} is {given}; this model's ids are 0 to {vocab_size - 1}")
        params.check_for_model(vocab_size, self.config.max_logprobs)
        if params.stop and not self._has_text:
            raise InvalidRequest("stop strings need text, and this engine has no tokenizer; use stop_token_ids")
        if params.bad_words and not self._has_text:
            raise InvalidRequest("bad_words need text, and this engine has no tokenizer; use logit_bias")
        if params.n > self.config.max_num_queued_requests:
            limit = self.config.max_num_queued_requests
            raise InvalidRequest(f"n={params.n} is not allowed: max_num_queued_requests is {limit}")
        if type(priority) is not int or not -(2**63) <= priority < 2**63:
            raise InvalidRequest(f"priority={str(priority)[:40]} is not allowed: it must be a 64-bit integer")
        if not isinstance(cache_salt, str) or len(cache_salt) > MAX_CACHE_SALT_CHARS:
            raise InvalidRequest(f"cache_salt must be a string of at most {MAX_CACHE_SALT_CHARS} characters")

    def abort(self, request_id: str) -> bool:
        """Ends a request: the next step() returns its last output, with finish_reason "abort". False: unknown
        id."""
        requests = [r for r in self._outputs.requests(request_id) if self.scheduler.abort(r.request_id)]
        for request in requests:
            self._outputs.end(request)
        return bool(requests)

    def discard(self, request_id: str) -> None:
        """Ends a request of which nobody wants to hear any more: like abort, without a last output."""
        if request_id in self._outputs:
            self.abort(request_id)
            self._outputs.forget(request_id)

    @property
    def has_work(self) -> bool:
        """Whether step() has something to compute or to return."""
        return self.scheduler.has_work() or self._outputs.has_outputs

    @property
    def num_waiting(self) -> int:
        return self.scheduler.num_waiting

    @property
    def num_running(self) -> int:
        return self.scheduler.num_running

    @property
    def stats(self) -> SchedulerStats:
        return self.scheduler.stats

    def _deliver(self, item: StepItem, result: SampledToken) -> None:
        """Hands a token to its request. What goes wrong here is the matter of this request alone."""
        request, token_id = item.request, result.token_id
        try:
            if token_id is not None and not 0 <= token_id < self._vocab_size:
                cause = _SAMPLING_FAILURES.get(token_id, "it is outside the vocabulary")
                raise FastserveError(f"no token could be sampled (id {token_id}): {cause}")
            if request.has_late_text and request.finish_reason is None:
                return  # nearly always in offline work
            stop = self._outputs.push(item, result)
        except Exception as error:
            self.scheduler.finish(request, "error")
            self._outputs.end(request, error)
        else:
            if stop is not None:
                self.scheduler.finish(request, "stop", stop)


def _mixed_seed(seed: int, index: int | str) -> int:
    """A seed in [0, 2**64) for the index-th of a family; neighbours have nothing in common."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little")
