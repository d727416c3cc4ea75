# SPDX-License-Identifier: Apache-2.0
"""Runs a workload through an engine in virtual time."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from fastserve.admission import Admission, get_admission
from fastserve.config import EngineConfig, RequestOutputKind, SamplingParams
from fastserve.engine.engine import Engine
from fastserve.engine.prefix_plan import plan_prefixes
from fastserve.engine.scheduler import Scheduler, SchedulerStats, StepPlan, new_kv_cache
from fastserve.errors import InvalidRequest
from fastserve.outputs import RequestOutput
from fastserve.policies import get_policy
from fastserve.request import SharedPrefix
from fastserve.simulate.cost import CostModel
from fastserve.simulate.oracle import Oracle
from fastserve.simulate.runner import CostModelRunner, StepLog
from fastserve.simulate.separate import SeparateScheduler
from fastserve.simulate.workload import Arrival


@dataclass
class RequestLog:
    """One entry for each finished request, in columns; times in seconds of the virtual clock."""

    arrival_s: array[float] = field(default_factory=lambda: array("d"))
    first_scheduled_s: array[float] = field(default_factory=lambda: array("d"))
    first_token_s: array[float] = field(default_factory=lambda: array("d"))
    last_token_s: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: array[int] = field(default_factory=lambda: array("l"))
    cached_tokens: array[int] = field(default_factory=lambda: array("l"))
    output_tokens: array[int] = field(default_factory=lambda: array("l"))

    def __len__(self) -> int:
        return len(self.arrival_s)


@dataclass(frozen=True)
class Simulation:
    """What happened. Times are virtual, except `wall_s`."""

    config: EngineConfig
    cost: CostModel
    steps: StepLog
    requests: RequestLog
    stats: SchedulerStats
    wall_s: float
    num_refused: int = 0  # requests that can never run here: too long

    @property
    def makespan_s(self) -> float:
        return self.steps.begin_s[-1] + self.steps.seconds[-1] if len(self.steps) else 0.0


def simulate(
    arrivals: Iterable[Arrival],
    cost: CostModel,
    config: EngineConfig,
    *,
    batch: bool = False,
    separate: bool = False,
    oracle: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Simulation:
    """Serves `arrivals` (in order of arrival) to their end. `config.num_blocks` None: what fits on the GPU.

    `batch`: all arrive at 0, and the prefixes they share are planned before they start, as LLM.generate does.
    `separate`: prompts and decodes in steps of their own; `oracle`: admission knows all lengths. `progress` is told
    of each finished request, with the virtual time. A request that is too long is refused and counted.
    """
    wall = time.perf_counter()
    num_blocks = config.num_blocks or cost.model.blocks_on(cost.gpu, config.block_size)
    pool, tree = new_kv_cache(num_blocks, config.block_size, config.enable_prefix_caching)
    runner = CostModelRunner(cost, pool, config.block_size, config.max_model_len or cost.model.max_model_len)
    lengths: dict[str, int] = {}
    admission: Admission = Oracle(lengths) if oracle else get_admission(config.admission)
    scheduler = (SeparateScheduler if separate else Scheduler)(
        config,
        num_blocks,
        runner.max_model_len,
        runner.eos_token_ids,
        get_policy(config.policy),
        pool=pool,
        tree=tree,
        admission=admission,
    )
    engine = Engine(config, runner, lambda: runner.now, scheduler=scheduler)
    engine.on_step = _record(engine, runner.steps)
    requests, open_arrivals = RequestLog(), {}
    pending = _planned(arrivals, config) if batch else ((arrival, None) for arrival in arrivals)
    num_refused = 0
    (coming, prefix), number = next(pending, (None, None)), 0
    while coming is not None or engine.has_work:
        if coming is not None and not engine.has_work:
            runner.now = max(runner.now, coming.arrival_s)
        while coming is not None and coming.arrival_s <= runner.now:
            if engine.num_waiting >= config.max_num_queued_requests:
                break  # it waits outside
            request_id = str(number)
            try:
                engine.add_request(request_id, coming.token_ids(), _params(coming.max_tokens), shared_prefix=prefix)
            except InvalidRequest:
                num_refused += 1
                (coming, prefix), number = next(pending, (None, None)), number + 1
                continue
            own_text = coming.prompt[-1][0]
            runner.expect(request_id, coming.output_tokens, own_text)
            lengths[request_id] = coming.output_tokens
            open_arrivals[request_id] = coming.arrival_s
            (coming, prefix), number = next(pending, (None, None)), number + 1
        for output in engine.step():
            if output.error is not None:
                raise output.error
            _finish(requests, output, open_arrivals.pop(output.request_id))
            runner.forget(output.request_id)
            del lengths[output.request_id]
            if progress is not None:
                progress(runner.now)
    return Simulation(config, cost, runner.steps, requests, engine.stats, time.perf_counter() - wall, num_refused)


def _planned(arrivals: Iterable[Arrival], config: EngineConfig) -> Iterator[tuple[Arrival, SharedPrefix | None]]:
    requests = list(arrivals)
    if any(request.arrival_s > 0 for request in requests):
        raise InvalidRequest("a batch is known beforehand: all its requests must arrive at 0, without a rate")
    prompts = [array("i", request.token_ids()) for request in requests]
    plan = plan_prefixes(prompts, [_params(request.max_tokens) for request in requests], config.block_size)
    for place in plan.order:
        yield requests[place], plan.prefix_of[place]


def _record(engine: Engine, log: StepLog) -> Callable[[StepPlan, float], None]:
    def on_step(plan: StepPlan, seconds: float) -> None:
        stats = engine.stats
        log.num_running.append(stats.num_running)
        log.num_waiting.append(stats.num_waiting)
        log.num_used_blocks.append(stats.num_used_blocks)

    return on_step


def _finish(log: RequestLog, output: RequestOutput, arrival_s: float) -> None:
    metrics = output.metrics
    assert metrics is not None
    log.arrival_s.append(arrival_s)
    log.first_scheduled_s.append(metrics.first_scheduled_s or 0.0)
    log.first_token_s.append(metrics.first_token_s or 0.0)
    log.last_token_s.append(metrics.last_token_s or 0.0)
    log.prompt_tokens.append(len(output.prompt_token_ids))
    log.cached_tokens.append(output.num_cached_tokens or 0)
    log.output_tokens.append(len(output.outputs[0].token_ids))


@lru_cache(maxsize=65536)
def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, output_kind=RequestOutputKind.FINAL_ONLY, seed=0)
