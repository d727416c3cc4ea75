# SPDX-License-Identifier: Apache-2.0
"""A batch job on the engine that answers clients at the same time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fastserve.batch_job import BatchCounts, BatchJob, BatchPrompt
from fastserve.errors import EngineDead, QueueFull
from fastserve.outputs import RequestOutput
from fastserve.server.service import Service

RETRY_S = 0.5  # when the queue is full: clients go first


async def run_batch(service: Service, job: BatchJob, progress: Callable[[BatchCounts], None]) -> None:
    """Runs a job to its end, in at most half of the engine's places; the others are for clients.

    Results are on the disk before `progress` hears of them. However it ends, an exception or a cancellation included,
    nothing of the job stays in the engine, and the job is closed. Raises EngineDead.
    """
    limit = max(1, service.llm.loaded.config.max_num_seqs // 2)
    running: dict[asyncio.Task[RequestOutput], BatchPrompt] = {}
    waiting: BatchPrompt | None = None  # taken from the job, but there was no place for it
    worker = ThreadPoolExecutor(1, thread_name_prefix="fastserve-batch-job")  # the job's calls must not overlap

    async def call(function: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(worker, function)

    def take_next() -> None:
        nonlocal waiting
        waiting = job.next(block=not running)

    def finished(done: list[tuple[BatchPrompt, asyncio.Task[RequestOutput]]]) -> None:
        for prompt, task in done:
            error = task.exception()
            if error is None:
                job.take(prompt, task.result())
            elif isinstance(error, Exception) and not isinstance(error, EngineDead):
                job.fail(prompt, error)
            else:
                raise error

    try:
        while True:
            while True:
                if waiting is None:
                    await call(take_next)
                taken = sum(prompt.params.n for prompt in running.values())
                if waiting is None or (running and taken + waiting.params.n > limit):
                    break
                running[asyncio.ensure_future(_answer(service, waiting))] = waiting
                waiting = None
            await call(job.sync)
            progress(job.counts)
            if not running and waiting is None and not job.has_more:
                return
            if running:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                ended = [(running.pop(task), task) for task in done]
                await call(lambda ended=ended: finished(ended))  # type: ignore[misc]
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        with contextlib.suppress(EngineDead):
            service.llm.end_batch(job.prefixes())
        await asyncio.shield(asyncio.to_thread(_close, worker, job))


def _close(worker: ThreadPoolExecutor, job: BatchJob) -> None:
    worker.shutdown(wait=True)
    job.close()


async def _answer(service: Service, prompt: BatchPrompt) -> RequestOutput:
    """The last output of a prompt."""
    while True:
        try:
            async for output in service.generate_for_batch(prompt):
                last = output
            return last
        except QueueFull:
            await asyncio.sleep(RETRY_S)
