# SPDX-License-Identifier: Apache-2.0
"""A scheduler on a fake device, with everything checked that must hold in every step."""

from collections import Counter
from collections.abc import Callable, Sequence

from fake_device import FakeDevice, generate_alone
from fastserve.config import EngineConfig, SamplingParams
from fastserve.engine.block_tables import BlockPool, PrefixTree
from fastserve.engine.scheduler import Scheduler, StepPlan, new_kv_cache
from fastserve.policies import get_policy
from fastserve.request import Request, RequestStatus
from naive_kv import NaiveBlockPool, NaivePrefixTree

KvFactory = Callable[[int, int, bool], tuple[BlockPool, PrefixTree | None]]


def naive_kv_cache(num_blocks: int, block_size: int, prefix_caching: bool) -> tuple[BlockPool, PrefixTree | None]:
    pool = NaiveBlockPool(num_blocks)
    return pool, NaivePrefixTree(pool, block_size) if prefix_caching else None


KV_FACTORIES: dict[str, KvFactory] = {"native": new_kv_cache, "naive": naive_kv_cache}


class Harness:
    def __init__(
        self,
        num_blocks: int = 16,
        *,
        kv: str = "native",
        max_model_len: int = 1000,
        vocab_size: int = 7,
        **config: object,
    ) -> None:
        self.config = EngineConfig(
            **{"block_size": 4, "max_num_batched_tokens": 16, "admission": "aggressive", **config}
        )  # type: ignore[arg-type]
        self.num_blocks = num_blocks
        self.pool, self.tree = KV_FACTORIES[kv](num_blocks, self.config.block_size, self.config.enable_prefix_caching)
        self.device = FakeDevice(num_blocks, self.config.block_size, vocab_size)
        self.policy = get_policy(self.config.policy)
        self.scheduler = Scheduler(
            self.config,
            num_blocks,
            max_model_len,
            self.device.eos_token_ids,
            self.policy,
            pool=self.pool,
            tree=self.tree,
        )
        self.max_running = min(self.config.max_num_seqs, self.config.max_num_batched_tokens)
        self.requests: dict[str, Request] = {}
        self.now = 0.0

    def add(
        self, prompt: Sequence[int], *, max_tokens: int = 4, request_id: str | None = None, **fields: object
    ) -> Request:
        params = SamplingParams(max_tokens=max_tokens)
        request_id = request_id or f"r{len(self.requests)}"
        request = Request(request_id, list(prompt), fields.pop("params", params), self.now, **fields)  # type: ignore[arg-type]
        self.scheduler.add(request)
        self.requests[request_id] = request
        return request

    @property
    def waiting(self) -> list[Request]:
        waiting = [r for r in self.requests.values() if r.status is RequestStatus.WAITING]
        return sorted(waiting, key=lambda r: r.queue_key)

    @property
    def running(self) -> list[Request]:
        running = [r for r in self.requests.values() if r.status is RequestStatus.RUNNING]
        return sorted(running, key=lambda r: r.queue_key)

    def step(self, error: Exception | None = None) -> StepPlan:
        """One step, checked; with `error` the device fails in it."""
        self.now += 1.0
        refs = self.ref_counts()
        running = self.running
        tables = {r.request_id: set(r.block_ids) for r in running}
        lacks_one = {r.request_id for r in running if r.num_uncomputed_tokens == 1}
        plan = self.scheduler.schedule(self.now)
        self.check_plan(plan, lacks_one)
        self.check_writes(plan, refs, tables)
        self.check_work_conserving(plan)
        if not plan.items:
            assert not self.scheduler.has_work(), "nothing scheduled though there is work"
            return plan
        self.device.fail_next = error
        try:
            sampled = [s and s.token_id for s in self.device.run(plan)]
        except RuntimeError:
            if error is None:
                raise
            failed = self.scheduler.fail(plan)
            assert [r.finish_reason for r in failed] == ["error"] * len(plan.items)
        else:
            before = {item.request.request_id: len(item.request.token_ids) for item in plan.items}
            advanced = self.scheduler.update(plan, sampled, self.now)
            assert advanced == [item.request for item in plan.items if item.sample]
            for request in advanced:
                assert len(request.token_ids) == before[request.request_id] + 1
        self.scheduler.check()
        return plan

    def drain_until(self, done: Callable[[], bool], max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            self.step()
            if done():
                return
        raise AssertionError(f"not done after {max_steps} steps")

    def drain(self, max_steps: int = 10_000) -> int:
        """Steps until nothing is left, and proves that all blocks came back; returns how many steps that
        took."""
        steps = 0
        while self.scheduler.has_work():
            assert steps < max_steps, f"not done after {max_steps} steps: starvation"
            self.step()
            steps += 1
        self.scheduler.check()
        assert self.pool.num_used == 0
        assert self.pool.num_free + self.pool.num_evictable == self.num_blocks
        if self.tree is not None:
            self.tree.evict(self.num_blocks)
        assert self.pool.num_free == self.num_blocks
        return steps

    def ref_counts(self) -> list[int]:
        return [self.pool.ref_count(i) for i in range(self.num_blocks)]

    def check_plan(self, plan: StepPlan, lacks_one: set[str]) -> None:
        ids = [item.request.request_id for item in plan.items]
        assert len(set(ids)) == len(ids), f"a request is twice in one step: {ids}"
        assert sum(item.num_new_tokens for item in plan.items) == plan.num_tokens
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        for item in plan.items:
            request = item.request
            assert request.status is RequestStatus.RUNNING
            assert item.start == request.num_computed_tokens
            assert 1 <= item.num_new_tokens <= (self.config.max_chunk_tokens or plan.num_tokens)
            assert item.sample == (item.start + item.num_new_tokens == len(request.token_ids))
            assert item.start + item.num_new_tokens <= len(request.token_ids)
            assert len(request.block_ids) == -(-(item.start + item.num_new_tokens) // self.config.block_size)
        left_out = lacks_one - set(ids) - set(plan.preempted)
        assert not left_out, f"decodes left out of the step: {left_out}"
        decodes = [i for i, request_id in enumerate(ids) if request_id in lacks_one]
        assert decodes == list(range(len(decodes))), f"decodes are not first: {ids}"
        for request_id in plan.preempted:
            assert request_id not in ids
            assert self.requests[request_id].status is RequestStatus.WAITING
        assert len(self.running) <= self.max_running

    def check_writes(self, plan: StepPlan, refs_before: list[int], tables_before: dict[str, set[int]]) -> None:
        """The rule: a block written in a step has one writer. If somebody else holds it as well, then it was
        in no table of theirs before the step, it is full after the step, and they only read it. A block that is
        new to its writer may have been shared before: by requests that were preempted and a prefix given up."""
        writers: Counter[int] = Counter()
        full = set()
        for item in plan.items:
            size = self.config.block_size
            end = item.start + item.num_new_tokens
            for index in range(item.start // size, -(-end // size)):
                block_id = item.request.block_ids[index]
                writers[block_id] += 1
                is_new = block_id not in tables_before.get(item.request.request_id, ())
                assert is_new or refs_before[block_id] == 1, f"block {block_id} was shared before it is written"
                if (index + 1) * size <= end:
                    full.add(block_id)
        tables = Counter(block_id for request in self.running for block_id in request.block_ids)
        for block_id, count in writers.items():
            assert count == 1, f"block {block_id} has {count} writers"
            assert tables[block_id] == 1 or block_id in full, f"block {block_id} is shared before it is full"
            held = self.pool.ref_count(block_id)  # by tables and prefixes
            assert held == 1 or block_id in full, f"block {block_id} is held {held} times before it is full"

    def check_work_conserving(self, plan: StepPlan) -> None:
        """Budget is left only if nobody can use it: all carried to their cap, no memory, no place, or a
        preemption."""
        if plan.num_tokens == self.config.max_num_batched_tokens or plan.preempted:
            return
        available = self.pool.num_free + self.pool.num_evictable
        given = {item.request.request_id: item.num_new_tokens for item in plan.items}
        for request in self.running:
            wanted = min(request.num_uncomputed_tokens, self.config.max_chunk_tokens or 10**9)
            assert given[request.request_id] == wanted or available == 0, f"{request.request_id} could do more"
        if not self.waiting or len(self.running) == self.max_running or self.config.admission != "aggressive":
            return
        first = self.waiting[0]
        cached: list[int] = []
        if self.tree is not None and first.params.prompt_logprobs is None:
            _, cached = self.tree.match(first.token_ids[:-1], first.cache_salt)
        needed = -(-len(first.token_ids) // self.config.block_size) - len(cached)
        available = self.pool.num_free + self.pool.num_evictable
        for block_id in reversed(cached):
            self.pool.unref(block_id)
        assert self.running, "nothing runs though somebody waits"
        assert needed > available, f"{first.request_id} waits though there is budget, a place and memory"

    def expected_output(self, request: Request) -> list[int]:
        params = request.params
        eos = frozenset() if params.ignore_eos else self.device.eos_token_ids
        return generate_alone(
            request.prompt_token_ids,
            request.cache_salt,
            request.seed,
            self.device.vocab_size,
            eos,
            params.max_tokens or 10**9,
            self.scheduler.max_len,
        )
