# SPDX-License-Identifier: Apache-2.0
"""Streaming: deltas, aborts in every phase, concurrency, and what happens when the engine ends."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fastserve import (
    LLM,
    AsyncLLM,
    EngineDead,
    InvalidRequest,
    QueueFull,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from tiny_models import make_tiny_checkpoint

LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
SHORT = replace(LONG, max_tokens=12)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(tiny_dir: Path) -> Iterator[AsyncLLM]:
    with AsyncLLM(tiny_dir, block_size=16, num_blocks=24, max_num_batched_tokens=16, max_num_queued_requests=8) as llm:
        yield llm


async def collect(engine: AsyncLLM, prompt: object, params: SamplingParams, **more: object) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, **more)]  # type: ignore[arg-type]


async def exhaust(stream: AsyncIterator[RequestOutput]) -> None:
    async for _ in stream:
        pass


async def all_blocks_back(engine: AsyncLLM) -> None:
    """Wait until the engine thread has carried out what was sent to it, then look."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        inner = engine._loaded.engine
        if not inner.has_work and not engine._commands and inner.stats.num_used_blocks == 0:
            inner.scheduler.check()
            return
        await asyncio.sleep(0.001)
    raise AssertionError("blocks are still in use")


def test_deltas_join_to_the_offline_text(engine: AsyncLLM, tiny_dir: Path) -> None:
    with LLM(tiny_dir, block_size=16, num_blocks=24) as llm:
        offline = llm.generate("The quick brown", SHORT, use_tqdm=False)[0].outputs[0]
    outputs = asyncio.run(collect(engine, "The quick brown", SHORT))
    assert "".join(output.outputs[0].text for output in outputs) == offline.text
    assert [t for output in outputs for t in output.outputs[0].token_ids] == list(offline.token_ids)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_no_delta_holds_text_at_or_after_a_stop_string(engine: AsyncLLM) -> None:
    async def run() -> None:
        text = "".join(o.outputs[0].text for o in await collect(engine, "The quick", replace(SHORT, max_tokens=40)))
        assert len(text) > 8
        stop = text[5:8]
        outputs = await collect(engine, "The quick", replace(SHORT, max_tokens=40, stop=[stop]))
        assert "".join(output.outputs[0].text for output in outputs) == text[: text.index(stop)]
        assert outputs[-1].outputs[0].stop_reason == stop

    asyncio.run(run())


def test_concurrent_requests_get_what_each_gets_alone(engine: AsyncLLM) -> None:
    prompts = [[5 + i] * (1 + 3 * i) for i in range(6)]

    async def tokens(prompt: list[int]) -> list[int]:
        return [t for output in await collect(engine, prompt, SHORT) for t in output.outputs[0].token_ids]

    async def run() -> None:
        alone = [await tokens(prompt) for prompt in prompts]
        assert await asyncio.gather(*map(tokens, prompts)) == alone
        await all_blocks_back(engine)

    asyncio.run(run())


@pytest.mark.parametrize("outputs_before", [0, 1, 5])
def test_leaving_the_stream_gives_the_blocks_back(engine: AsyncLLM, outputs_before: int) -> None:
    async def run() -> None:
        stream = engine.generate([5, 6, 7], LONG)
        task = asyncio.ensure_future(stream.__anext__())
        await asyncio.sleep(0)
        for _ in range(outputs_before):
            await task
            task = asyncio.ensure_future(stream.__anext__())
        task.cancel()
        with pytest.raises((asyncio.CancelledError, StopAsyncIteration)):
            await task
        await stream.aclose()
        await all_blocks_back(engine)

    asyncio.run(run())


def test_abort_ends_the_stream_with_reason_abort(engine: AsyncLLM) -> None:
    told, steps = threading.Event(), itertools.count()
    engine._loaded.engine.on_step = lambda *_: next(steps) < 20 or told.wait(60)  # it still runs when it is told

    async def run() -> None:
        outputs = []
        async for output in engine.generate([5, 6, 7], LONG, "mine"):
            outputs.append(output)
            if len(outputs) == 2:
                await engine.abort("mine")
                await engine.abort("unknown")
                told.set()
        assert outputs[-1].finished
        assert outputs[-1].outputs[0].finish_reason == "abort"
        assert len(outputs) < 150
        await all_blocks_back(engine)

    asyncio.run(run())


def test_one_bad_request_does_not_harm_another(engine: AsyncLLM) -> None:
    async def run() -> None:
        good = asyncio.ensure_future(collect(engine, [5, 6, 7], SHORT))
        for bad in ("", [], [5, 9999], [5] * 1000):
            with pytest.raises(InvalidRequest):
                await collect(engine, bad, SHORT)
        with pytest.raises(InvalidRequest):
            await collect(engine, [5], replace(SHORT, stop_token_ids=[9999]))
        assert sum(len(output.outputs[0].token_ids) for output in await good) == 12
        await all_blocks_back(engine)

    asyncio.run(run())


def test_a_full_queue_refuses_and_the_accepted_requests_finish(engine: AsyncLLM) -> None:
    async def run() -> None:
        all_came = threading.Event()
        engine._command(lambda: all_came.wait(60))
        asked = [asyncio.ensure_future(collect(engine, [5, i], replace(LONG, max_tokens=30))) for i in range(60)]
        while len(engine._commands) < 60:
            await asyncio.sleep(0.001)
        all_came.set()
        results = await asyncio.gather(*asked, return_exceptions=True)
        refused = [result for result in results if isinstance(result, QueueFull)]
        finished = [result for result in results if isinstance(result, list)]
        assert (len(refused), len(finished)) == (52, 8)
        assert all(result[-1].finished for result in finished)
        await all_blocks_back(engine)

    asyncio.run(run())


def test_closing_ends_running_streams(tiny_dir: Path) -> None:
    async def run() -> None:
        engine = AsyncLLM(tiny_dir, num_blocks=32)
        steps = itertools.count()

        def on_step(*_: object) -> None:
            while next(steps) > 0 and not engine._closing:  # it still runs when it is closed
                time.sleep(0.001)

        engine._loaded.engine.on_step = on_step
        stream = engine.generate([5, 6], LONG)
        await stream.__anext__()
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineDead):
            await exhaust(stream)
        with pytest.raises(EngineDead):
            await engine.check_health()
        with pytest.raises(EngineDead):
            await collect(engine, [5], SHORT)

    asyncio.run(run())


def test_a_dead_engine_tells_every_stream_and_its_health(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        stream = engine.generate([5, 6], LONG)
        await stream.__anext__()
        await engine.check_health()
        monkeypatch.setattr(engine._loaded.engine, "step", lambda: 1 / 0)
        with pytest.raises(EngineDead, match="ZeroDivisionError"):
            await exhaust(stream)
        with pytest.raises(EngineDead):
            await engine.check_health()

    asyncio.run(run())


def test_an_engine_that_was_long_idle_is_healthy_while_it_wakes(engine: AsyncLLM) -> None:
    while not engine._asleep:
        time.sleep(0.001)
    engine._beat -= 1000
    with engine._wake:  # it cannot wake yet
        engine._command(lambda: None)
        asyncio.run(engine.check_health(10))
        engine._beat -= 1000
        engine._command(lambda: None)  # more work does not make up for a thread that does not come
        with pytest.raises(EngineDead, match="in one step"):
            asyncio.run(engine.check_health(10))


def test_an_idle_engine_takes_no_steps(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        await collect(engine, [5, 6], SHORT)
        await all_blocks_back(engine)
        steps: list[int] = []
        real = engine._loaded.engine.step
        monkeypatch.setattr(engine._loaded.engine, "step", lambda: steps.append(1) or real())
        await asyncio.sleep(0.2)
        assert len(steps) <= 1  # the thread may still have been on its way to sleep

    asyncio.run(run())
