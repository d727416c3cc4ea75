# SPDX-License-Identifier: Apache-2.0
"""Decides what each step computes: so many tokens of this request, so many of that one.

A step has no phases. Every request has tokens that are not computed yet: one after a decode, many in a new
prompt, all of them after a preemption. The order in which they get a place in the token budget is the whole
policy:

1. running requests that lack one token: all of them, in every step: no decode waits for a prompt;
2. running requests that lack more, a chunk each;
3. waiting requests, as long as there is budget, a place and memory.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from fastserve.admission import Admission, Memory, get_admission
from fastserve.config import EngineConfig
from fastserve.engine.block_tables import NOTHING_INSERTED, BlockPool, BlockTables, Insertion, PrefixTree
from fastserve.engine.output_lengths import OutputLengths
from fastserve.engine.prefix_holds import PrefixHolds
from fastserve.engine.waiting import WaitingQueue
from fastserve.errors import InvalidRequest, QueueFull
from fastserve.policies import Policy
from fastserve.request import Request, RequestStatus, SharedPrefix

_queue_key = attrgetter("queue_key")


class StepItem(NamedTuple):  # a tuple is made in a third of the time of a frozen dataclass
    """Compute `request.token_ids[start : start + num_new_tokens]`."""

    request: Request
    start: int
    num_new_tokens: int
    sample: bool  # the last of them is the request's last token: its row gives the next one


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. Items write their KV before any of them reads it, layer by layer."""

    items: tuple[StepItem, ...]
    preempted: tuple[str, ...]  # ids of requests that lost their blocks for this step and wait again
    num_tokens: int
    step_id: int
    finished: tuple[str, ...] = ()  # ids of requests that ran and have ended since the last step: forget their state


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counters since the start, and the present."""

    num_waiting: int
    num_running: int
    num_blocks: int
    num_used_blocks: int
    peak_used_blocks: int
    num_steps: int
    num_computed_tokens: int
    num_cached_tokens: int  # prompt tokens that were not computed because the prefix cache had them
    num_preemptions: int


def new_kv_cache(num_blocks: int, block_size: int, prefix_caching: bool) -> tuple[BlockPool, PrefixTree | None]:
    """The native block pool, and its prefix tree if wanted."""
    from fastserve import _native  # type: ignore[attr-defined]

    pool = _native.BlockPool(num_blocks)
    return pool, _native.PrefixTree(pool, block_size) if prefix_caching else None


class Scheduler:
    """Waiting and running requests, the token budget and the KV blocks. Steps alternate: schedule, then
    update or fail.

    `pool` and `tree` replace the native ones, `admission` the one that `config` names. A request may grow to
    `max_len` tokens, prompt and output together: `max_model_len`, or what the whole cache holds if that is less.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        policy: Policy,
        *,
        pool: BlockPool | None = None,
        tree: PrefixTree | None = None,
        admission: Admission | None = None,
    ) -> None:
        if pool is None:
            pool, tree = new_kv_cache(num_blocks, config.block_size, config.enable_prefix_caching)
        self.max_len = min(max_model_len, num_blocks * config.block_size)
        self._config = config
        self._eos_token_ids = eos_token_ids
        self._policy = policy
        self._admission = admission or get_admission(config.admission)
        self._output_lengths = OutputLengths()
        self._max_chunk = config.max_chunk_tokens or config.max_num_batched_tokens
        self._blocks = BlockTables(pool, tree, config.block_size)
        self._holds = PrefixHolds(self._blocks)
        self._requests: dict[str, Request] = {}
        self._waiting = WaitingQueue()
        self._running: list[Request] = []  # sorted by queue_key: the last one is the first to be preempted
        self._in_flight: tuple[StepPlan, list[Insertion]] | None = None
        self._ended: list[str] = []
        self._num_added = self._num_steps = self._num_preemptions = 0
        self._num_computed_tokens = self._num_cached_tokens = self._peak_used_blocks = 0

    # -- requests come and go, between two steps -------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues `request`. `InvalidRequest`: it can never run. `QueueFull`: try again later."""
        self.check_prompt(request.num_prompt_tokens)
        if request.request_id in self._requests:
            raise InvalidRequest(f"{request.request_id!r}: a request of this id exists; ids must be unique")
        if len(self._waiting) >= self._config.max_num_queued_requests:
            raise QueueFull(f"{len(self._waiting)} requests are waiting, as max_num_queued_requests allows; try later")
        request.queue_key = (*self._policy.order(request), self._num_added)
        self._num_added += 1
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def check_prompt(self, length: int) -> None:
        """Raises `InvalidRequest` if a prompt of `length` tokens can never run."""
        if length == 0:
            raise InvalidRequest("the prompt is empty; one token is the least")
        if length + 1 > self.max_len:
            capacity = self._blocks.pool.num_blocks * self._blocks.block_size
            raise InvalidRequest(
                f"a prompt of {length} tokens and one output token need {length + 1} places; "
                f"{self.max_len} are allowed (the KV cache holds {capacity} tokens)"
            )

    def abort(self, request_id: str) -> bool:
        """Ends a request of this id, if there is one, with reason "abort"."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request is not None

    def finish(self, request: Request, reason: str, stop_reason: str | int | None = None) -> None:
        """Ends `request` and returns its blocks; if it has ended already, only the reason changes."""
        if self._in_flight is not None:
            raise RuntimeError(f"request {request.request_id!r} cannot end while a step is running")
        self._finish(request, reason, stop_reason)

    def give_up_prefix(self, prefix: SharedPrefix, num_requests: int) -> None:
        """So many requests that were to share `prefix` will never come."""
        self._holds.give_up(prefix, num_requests)

    def drop_prefixes(self, prefixes: Iterable[SharedPrefix]) -> None:
        """The batch of these prefixes is over: they are held no longer, though requests of it may never have come."""
        self._holds.drop(prefixes)

    def has_work(self) -> bool:
        return bool(self._requests)

    # -- a step ----------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan:
        """The next step, complete: every block it writes is taken, every block it fills is in the prefix
        tree.

        Not empty while there is work: the first request in the policy's order always advances.
        """
        if self._in_flight is not None:
            raise RuntimeError("the step before was neither updated nor failed")
        step = _Draft(budget=self._config.max_num_batched_tokens)
        self._fill(step)
        return self._launch(step, now)

    def update(self, plan: StepPlan, sampled: Sequence[int | None], now: float) -> list[Request]:
        """Takes the token of each item of `plan` (None where it samples none); returns the requests that got
        one.

        A request that its token ends is finished and has returned its blocks. ValueError: `sampled` does not
        fit the plan; nothing has changed then and the step can still be failed.
        """
        if [token is not None for token in sampled] != [item.sample for item in plan.items]:
            raise ValueError(f"step {plan.step_id}: the sampled tokens {list(sampled)} do not fit its items")
        advanced = []
        for item, insertion, token_id in zip(plan.items, self._land(plan), sampled, strict=True):
            request = item.request
            if insertion is not NOTHING_INSERTED:
                self._blocks.settle(request, insertion)
            request.num_computed_tokens += item.num_new_tokens
            if request.shared_prefix is not None:
                self._holds.keep(request)
            if token_id is not None:
                self._append(request, token_id, now)
                advanced.append(request)
        self._num_computed_tokens += plan.num_tokens
        return advanced

    def fail(self, plan: StepPlan) -> list[Request]:
        """Ends all requests of a step that did not happen with reason "error"; nothing it was to compute
        stays cached."""
        insertions = self._land(plan)
        for item, insertion in zip(reversed(plan.items), reversed(insertions), strict=True):
            self._blocks.undo(item.request, insertion)
            self._finish(item.request, "error")
        return [item.request for item in plan.items]

    # -- for those who watch ---------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        return self._waiting.num_tokens

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            num_blocks=self._blocks.pool.num_blocks,
            num_used_blocks=self._blocks.pool.num_used,
            peak_used_blocks=self._peak_used_blocks,
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_preemptions=self._num_preemptions,
        )

    def check(self) -> None:
        """Proves the invariants that hold between two steps; raises AssertionError with the values. For
        tests."""
        assert self._in_flight is None
        keys = [_queue_key(request) for request in self._running]
        assert keys == sorted(keys), f"running requests out of order: {keys}"
        assert len(self._running) <= min(self._config.max_num_seqs, self._config.max_num_batched_tokens)
        assert len(self._running) + len(self._waiting) == len(self._requests)
        for request in self._requests.values():
            assert request.num_uncomputed_tokens >= 1, request
            assert request.status is RequestStatus.RUNNING or not request.block_ids, request
        self._blocks.check(self._running, self._holds.block_ids())

    # -- the parts of a step ---------------------------------------------------------------------------------

    def _fill(self, step: "_Draft") -> None:
        """Puts into the step what this class promises: all decodes, then chunks, up to the budget."""
        size = self._blocks.block_size
        lack_more = []
        for request in tuple(self._running):
            start = request.num_computed_tokens
            if len(request.token_ids) - start != 1:
                lack_more.append(request)
            elif request.status is RequestStatus.RUNNING:
                if 0 < start % size < size - 1:  # nearly always: the block is there, and does not get full
                    step.add(StepItem(request, start, 1, True), NOTHING_INSERTED)
                else:
                    self._carry(step, request)
        for request in lack_more:
            if request.status is RequestStatus.RUNNING and step.budget:
                self._count_cached(request, self._blocks.adopt_prefix(request))
                self._carry(step, request)
        # After a preemption nobody starts: memory is short, and the newest would be the next to lose it.
        while step.budget and not step.preempted and (admitted := self._admit()):
            self._carry(step, admitted)

    def _carry(self, step: "_Draft", request: Request) -> None:
        """Gives `request` its share of the step.

        Where no block is left for even one token, the last running request loses its blocks; if that one is
        part of the step already, or is `request` itself, `request` goes back to waiting. Prefixes are held through
        this, unless `request` is the only one that runs: it has to go on.
        """
        wanted = min(request.num_uncomputed_tokens, step.budget, self._max_chunk)
        while (num_tokens := self._blocks.reserve(request, wanted)) == 0:
            if len(self._running) == 1 and self._holds.drop():
                continue
            last = self._running[-1]
            victim = request if last.request_id in step.carried else last
            self._preempt(victim)
            step.preempted.append(victim.request_id)
            if victim is request:
                return
        insertion = self._blocks.share(request, num_tokens)
        start, is_last = request.num_computed_tokens, num_tokens == request.num_uncomputed_tokens
        step.add(StepItem(request, start, num_tokens, sample=is_last), insertion)

    def _preempt(self, request: Request) -> None:
        """Takes all blocks from a running request. It keeps its tokens; when it returns they are computed
        again, or found in the prefix cache."""
        self._blocks.release(request)
        self._remove_running(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._waiting.push(request)

    def _admit(self) -> Request | None:
        """Starts the first waiting request, if there is one, a place for it, and admission agrees.

        The budget is not empty then although every running request has got a token, so that the running requests can
        never outnumber the tokens of a step.
        """
        crowded = bool(self._running) and self._blocks.num_available == 0
        if not self._waiting or len(self._running) >= self._config.max_num_seqs or crowded:
            return None
        request = self._waiting.first()
        spared = self._blocks.adopt_prefix(request)
        if self._running and not self._admission.admit(request, self._running, self._memory(request)):
            self._blocks.release(request)
            return None
        self._count_cached(request, spared)
        self._waiting.pop()
        request.status = RequestStatus.RUNNING
        insort(self._running, request, key=_queue_key)
        return request

    def _memory(self, candidate: Request) -> Memory:
        blocks = self._blocks
        return Memory(
            num_needed=blocks.num_missing(candidate),
            num_available=blocks.num_available,
            num_blocks=blocks.pool.num_blocks,
            block_size=blocks.block_size,
            max_len=self.max_len,
            output_lengths=self._output_lengths.ascending,
            num_shared=blocks.num_shared,
            num_held=self._holds.num_blocks,
        )

    def _launch(self, step: "_Draft", now: float) -> StepPlan:
        for item in step.items:
            if item.request.first_scheduled_s is None:
                item.request.first_scheduled_s = now
        num_tokens = self._config.max_num_batched_tokens - step.budget
        plan = StepPlan(
            tuple(step.items), tuple(step.preempted), num_tokens, self._num_steps, finished=tuple(self._ended)
        )
        self._num_steps += 1
        self._peak_used_blocks = max(self._peak_used_blocks, self._blocks.pool.num_used)
        if plan.items:
            self._in_flight = plan, step.insertions
            self._ended.clear()
        return plan

    def _land(self, plan: StepPlan) -> list[Insertion]:
        if self._in_flight is None or self._in_flight[0] is not plan:
            raise RuntimeError(f"step {plan.step_id} is not the one that is running")
        insertions = self._in_flight[1]
        self._in_flight = None
        return insertions

    def _append(self, request: Request, token_id: int, now: float) -> None:
        request.token_ids.append(token_id)
        request.last_token_s = now
        if request.first_token_s is None:
            request.first_token_s = now
        params = request.params
        if token_id in self._eos_token_ids and not params.ignore_eos and not request.must_go_on:
            self._finish(request, "stop")
        elif params.stop_token_ids and token_id in params.stop_token_ids and not request.must_go_on:
            self._finish(request, "stop", token_id)
        elif request.num_output_tokens == params.max_tokens or len(request.token_ids) >= self.max_len:
            self._finish(request, "length")

    def _finish(self, request: Request, reason: str, stop_reason: str | int | None = None) -> None:
        if request.status is RequestStatus.RUNNING:
            self._blocks.release(request)
            self._remove_running(request)
        elif request.status is RequestStatus.WAITING:
            self._waiting.remove(request)
        if request.status is not RequestStatus.FINISHED:
            if request.first_scheduled_s is not None:
                self._ended.append(request.request_id)
            if reason in ("stop", "length"):  # an aborted output says nothing about the others
                self._output_lengths.add(request.num_output_tokens)
            request.status = RequestStatus.FINISHED
            self._holds.leave(request)
            del self._requests[request.request_id]
        request.finish_reason, request.stop_reason = reason, stop_reason

    def _remove_running(self, request: Request) -> None:
        del self._running[bisect_left(self._running, request.queue_key, key=_queue_key)]

    def _count_cached(self, request: Request, spared: int) -> None:
        if request.num_preemptions == 0:  # what it finds again after a preemption was its own work
            request.num_cached_tokens += spared
            self._num_cached_tokens += spared


class _Draft:
    """A step that is being put together."""

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens left
        self.items: list[StepItem] = []
        self.insertions: list[Insertion] = []  # one for each item
        self.carried: set[str] = set()
        self.preempted: list[str] = []

    def add(self, item: StepItem, insertion: Insertion) -> None:
        self.items.append(item)
        self.insertions.append(insertion)
        self.carried.add(item.request.request_id)
        self.budget -= item.num_new_tokens
