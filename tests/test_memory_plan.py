# SPDX-License-Identifier: Apache-2.0
"""The memory plan: what is chosen when nothing is asked for, and what is refused when too much is."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve import EngineConfig, FastserveError
from fastserve.engine.memory import DEFAULT_KV_BYTES, KV_SHARE_OF_FREE, MemoryPlan, free_memory_bytes, plan_memory

GiB = 2**30


def plan(config: EngineConfig | None = None, **given: Any) -> MemoryPlan:
    sizes = {
        "block_bytes": 2**20,
        "weight_bytes": GiB,
        "buffer_bytes": 2**20,
        "model_max_len": 4096,
        "free_bytes": 64 * GiB,
    }
    return plan_memory(config or EngineConfig(), **{**sizes, **given})


def test_default_is_bounded_on_a_large_machine() -> None:
    chosen = plan()
    assert chosen.kv_bytes == DEFAULT_KV_BYTES
    assert chosen.max_model_len == 4096


def test_default_takes_a_share_of_a_small_machine_and_shortens_the_context() -> None:
    chosen = plan(free_bytes=100 * 2**20, model_max_len=8192)
    assert chosen.kv_bytes <= KV_SHARE_OF_FREE * 100 * 2**20
    assert chosen.max_model_len == chosen.num_blocks * 32 < 8192


def test_no_more_than_all_sequences_can_use() -> None:
    chosen = plan(EngineConfig(max_num_seqs=2, max_model_len=64))
    assert chosen.num_blocks == 4


def test_explicit_wishes_come_first() -> None:
    assert plan(EngineConfig(num_blocks=7)).num_blocks == 7
    assert plan(EngineConfig(kv_cache_memory_bytes=5 * 2**20 + 1)).num_blocks == 5


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (EngineConfig(num_blocks=2**20), {}, "1048576 blocks needs 1024"),
        (EngineConfig(kv_cache_memory_bytes=10), {}, "num_blocks or kv_cache_memory_bytes"),
        (EngineConfig(max_model_len=5000), {}, "max_position_embeddings=4096"),
        (EngineConfig(max_model_len=4096, num_blocks=100), {}, "needs 128 KV blocks"),
        (EngineConfig(), {"free_bytes": 0}, "0.000 GiB are free"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    config: EngineConfig, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(FastserveError, match=message):
        plan(config, **sizes)


def test_the_table_adds_up() -> None:
    text = plan().table()
    assert "weights" in text
    assert "4.000 GiB" in text
    assert "60.000 GiB" in text


def test_this_machine_has_free_memory() -> None:
    assert free_memory_bytes() > 2**20
