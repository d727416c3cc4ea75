# SPDX-License-Identifier: Apache-2.0
"""A moment of what `python tests/soak.py` does for minutes on a real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from soak import Report, run_fuzz, run_load
from tiny_models import make_tiny_checkpoint


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_clients_that_come_and_leave_cost_no_block_and_spoil_no_answer(tiny_dir: Path) -> None:
    flags = ["--block-size", "16", "--max-num-batched-tokens", "64", "--max-num-seqs", "16"]
    report = run_load(tiny_dir, flags, clients=40, each=6, max_tokens=24, leaving=0.5, patience=0.3)
    assert report.finished + report.left == 40 * 6
    assert report.finished > 80  # half of them never leave
    assert report.left > 5


def test_all_options_with_each_other_stream_the_whole_answer(tiny_dir: Path) -> None:
    engine = {"max_model_len": 256, "block_size": 16, "num_blocks": 48, "max_num_batched_tokens": 64}
    assert run_fuzz(tiny_dir, engine, 300, at_once=8) == {200: 300}


def test_the_slope_of_memory_is_that_of_the_second_half() -> None:
    report = Report(rss=[(float(i), 1000 * i if i < 10 else 10_000 + 3 * i) for i in range(20)])
    assert report.rss_slope() == pytest.approx(3)
