# SPDX-License-Identifier: Apache-2.0
"""Pages of the KV cache are there before the steps that need them, a bounded way ahead, and asked for between steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from fastserve import LLM, SamplingParams
from fastserve.engine import pages_ahead
from fastserve.engine.huge_pages import HugePages
from fastserve.engine.pages_ahead import PagesAhead
from serving import wait_until
from test_huge_pages import resident_bytes
from tiny_models import make_tiny_checkpoint

BLOCK_BYTES = 1 << 18  # of one tensor
NUM_BLOCKS, AHEAD = 96, 32
Asked = list[tuple[int, int, int]]


def cache(num_tensors: int = 2) -> list[torch.Tensor]:
    memory = HugePages()
    return [memory.empty((NUM_BLOCKS, BLOCK_BYTES), torch.uint8) for _ in range(num_tensors)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What the system was asked for: address, first and last byte."""
    ranges: Asked = []

    def populate(address: int, begin: int, end: int) -> bool:
        ranges.append((address, begin, end))
        return True

    monkeypatch.setattr(pages_ahead, "_populate", populate)
    monkeypatch.setattr(pages_ahead, "AHEAD_BYTES", 2 * AHEAD * BLOCK_BYTES)
    return ranges


def blocks_asked(asked: Asked, tensor: torch.Tensor) -> set[int]:
    ranges = [(begin, end) for address, begin, end in asked if address == tensor.data_ptr()]
    assert all(begin % BLOCK_BYTES == end % BLOCK_BYTES == 0 for begin, end in ranges)
    return {block for begin, end in ranges for block in range(begin // BLOCK_BYTES, end // BLOCK_BYTES)}


def idle(pages: PagesAhead) -> bool:
    return pages._thread is None


def test_written_pages_keep_their_content_and_others_become_resident() -> None:
    tensors = cache()
    tensors[0][3:5] = 7
    before = resident_bytes()
    pages = PagesAhead(tensors)
    wait_until(lambda: idle(pages))
    pages.close()
    assert resident_bytes() > before + sum(tensor.nbytes for tensor in tensors) * 9 // 10
    assert bool((tensors[0][3:5] == 7).all())


def test_the_first_blocks_of_every_tensor_are_asked_for_and_no_more(asked: Asked) -> None:
    tensors = cache()
    pages = PagesAhead(tensors)
    wait_until(lambda: idle(pages))
    for tensor in tensors:
        assert blocks_asked(asked, tensor) == set(range(AHEAD))


def test_pages_stay_ahead_of_use_up_to_the_end_of_the_cache(asked: Asked) -> None:
    tensors = cache()
    pages = PagesAhead(tensors)
    wait_until(lambda: idle(pages))
    with pages.step(AHEAD // 8):
        pass
    assert idle(pages)  # not for every block
    with pages.step(AHEAD // 2):
        pass
    wait_until(lambda: idle(pages))
    reach = max(blocks_asked(asked, tensors[0]))
    assert AHEAD + AHEAD // 2 <= reach < NUM_BLOCKS - AHEAD // 2
    with pages.step(NUM_BLOCKS - 1):
        pass
    wait_until(lambda: idle(pages))
    assert max(blocks_asked(asked, tensors[1])) <= NUM_BLOCKS - 1
    with pages.step(3):  # a block that comes back
        pass
    assert idle(pages)


def test_nothing_is_asked_for_beside_steps_while_more_than_a_quarter_is_left(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    pages = PagesAhead(cache())
    wait_until(lambda: idle(pages))
    wait = pages._closed.wait

    def count(seconds: float) -> bool:
        waits.append(seconds)
        return wait(0.001)

    monkeypatch.setattr(pages._closed, "wait", count)
    before = len(asked)
    with pages.step(AHEAD // 2):
        wait_until(lambda: len(waits) > 20 or idle(pages))
        assert len(asked) <= before + 1  # one may be on its way before the step has begun
        assert not idle(pages)
    wait_until(lambda: idle(pages))
    assert len(asked) > before + 1


def test_an_engine_that_does_not_rest_has_a_quarter_all_the_same(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_ahead, "PACE_S", 0.001)
    pages = PagesAhead(cache())
    wait_until(lambda: idle(pages))
    used = AHEAD - 4
    with pages.step(used - 1):
        wait_until(lambda: pages._present >= used + AHEAD // 4)
        before = len(asked)
        time.sleep(0.02)
        assert len(asked) <= before + 1
        assert not idle(pages)
    wait_until(lambda: idle(pages))
    assert pages._present >= used + AHEAD


def test_a_system_that_refuses_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def refuse(*_: int) -> int:
        calls.append(1)
        return -1

    monkeypatch.setattr(pages_ahead, "_madvise", refuse)
    pages = PagesAhead(cache())
    thread = pages._thread
    assert thread is not None
    thread.join(120)
    with pages.step(NUM_BLOCKS - 1):
        pass
    pages.close()
    assert len(calls) == 1


def test_closing_ends_the_thread_before_the_memory_goes(asked: Asked) -> None:
    pages = PagesAhead(cache())
    with pages.step(0):  # it has not come far
        thread = pages._thread
        pages.close()
    assert thread is None or not thread.is_alive()


def test_a_closed_engine_leaves_no_thread(tmp_path: Path) -> None:
    llm = LLM(make_tiny_checkpoint(tmp_path), skip_tokenizer_init=True)
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0), use_tqdm=False)
    pages = llm._loaded.runner.pages
    llm.close()
    thread = pages._thread
    assert thread is None or not thread.is_alive()
