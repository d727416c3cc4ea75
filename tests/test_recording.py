# SPDX-License-Identifier: Apache-2.0
"""Ops written down and replayed: the bits of the calls, with the inputs of the moment, in bounded memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve import RequestOutput, SamplingParams, _native
from fastserve.config import EngineConfig
from fastserve.engine.device import CpuDevice
from fastserve.engine.engine import Engine
from fastserve.engine.runner import ModelRunner
from fastserve.engine.step_graphs import MAX_GRAPHS, StepGraphs
from test_step_arrays import decodes, step_arrays
from tiny_models import make_tiny_checkpoint

CONFIG = EngineConfig(
    block_size=16, num_blocks=256, max_model_len=400, max_num_batched_tokens=64, max_num_seqs=24, num_threads=2
)


class EagerDevice(CpuDevice):
    has_graphs = False


class CountingDevice(CpuDevice):
    """Keeps its recordings and counts their runs."""

    def __init__(self, num_threads: int) -> None:
        super().__init__(num_threads)
        self.num_replays = 0
        self.recordings: list[Any] = []

    @property
    def num_captures(self) -> int:
        return len(self.recordings)

    def capture(self, arrays: Any, work: Any) -> Any:
        run = super().capture(arrays, work)
        self.recordings.append(run.__self__)

        def replay() -> None:
            self.num_replays += 1
            run()

        return replay


@pytest.fixture(scope="module", params=["float32", "bfloat16", "windows"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    if request.param == "windows":
        return make_tiny_checkpoint(folder, "MistralForCausalLM", sliding_window=40)
    return make_tiny_checkpoint(folder, dtype=getattr(torch, request.param))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = _native.num_threads()
    yield
    _native.set_num_threads(before)


def logits_of_steps(runner: ModelRunner, num_requests: int) -> list[torch.Tensor]:
    """The logits of every step in which requests decode that began one after another, over several spans."""
    engine = Engine(runner.config, runner, time.monotonic)
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    logits = []
    for i in range(num_requests):
        engine.add_request(str(i), [(7 * i + 3 * j) % 90 + 5 for j in range(9 * i + 1)], params)
    while engine.has_work:
        num_running = engine.num_running
        engine.step()
        logits.append(runner.buffers.float_logits(num_running).clone())
    engine.scheduler.check()
    return logits


def test_replay_computes_the_bits_of_the_calls(model_dir: Path, two_threads: None) -> None:
    device = CountingDevice(2)
    replayed = logits_of_steps(ModelRunner(model_dir, CONFIG, device=device), 7)
    eager = logits_of_steps(ModelRunner(model_dir, CONFIG, device=EagerDevice(2)), 7)
    assert device.num_replays > 100
    assert device.num_captures < 20
    assert len(replayed) == len(eager)
    for a, b in zip(replayed, eager, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def outputs_of_long_prompts(runner: ModelRunner, params: SamplingParams) -> list[RequestOutput]:
    engine = Engine(runner.config, runner, time.monotonic)
    for i, length in enumerate((64, 200, 63, 1, 131)):
        engine.add_request(str(i), [(5 * i + 3 * j) % 90 + 5 for j in range(length)], params)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    engine.scheduler.check()
    return sorted((output for output in outputs if output.finished), key=lambda output: output.request_id)


@pytest.mark.parametrize("prompt_logprobs", [None, 1])
def test_full_steps_replay_one_forward_pass(model_dir: Path, two_threads: None, prompt_logprobs: int | None) -> None:
    """Steps of as many tokens as the budget has, in which some, one or none of the requests sample."""
    device = CountingDevice(2)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=prompt_logprobs)
    replayed = outputs_of_long_prompts(ModelRunner(model_dir, CONFIG, device=device), params)
    eager = outputs_of_long_prompts(ModelRunner(model_dir, CONFIG, device=EagerDevice(2)), params)
    assert device.num_replays >= 7 + 5 - 1  # 459 tokens of prompts are 7 full steps; then decodes
    assert device.num_captures <= 6  # the forward pass of a full step, and decodes of 1 to 5 rows
    for a, b in zip(replayed, eager, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        assert a.outputs[0].logprobs == b.outputs[0].logprobs
        assert a.prompt_logprobs == b.prompt_logprobs


def test_recordings_are_few_and_small(model_dir: Path, two_threads: None) -> None:
    """Whatever numbers of requests come and go, no more than MAX_GRAPHS recordings exist, and memory follows them."""
    device = CountingDevice(2)
    runner = ModelRunner(model_dir, CONFIG, device=device)
    runner.graphs = StepGraphs(device, runner.batches.arrays, max_graphs=3)
    engine = Engine(CONFIG, runner, time.monotonic)
    for i in range(12):  # one more ends in every step: the rows go from 12 to 1
        params = SamplingParams(temperature=0, max_tokens=2 + i, ignore_eos=True)
        engine.add_request(str(i), [5 + i], params)
    while engine.has_work:
        engine.step()
        assert len(runner.graphs) <= 3
    assert device.num_captures >= 12
    for recording in device.recordings:
        assert recording.num_ops > 0
        assert recording.num_bytes <= 1200 * recording.num_ops
    assert MAX_GRAPHS * 10 * 1200 < 0.6e6  # a layer has up to ten ops: 0.6 MB a layer for all recordings


def test_ops_are_written_down_and_not_run() -> None:
    arrays = step_arrays()
    arrays.build(decodes(1, 3), 1)
    recording = _native.Recording(arrays)
    x, out = torch.full((2, 8), 3.0), torch.full((2, 8), -1.0)
    weight = torch.ones(8)
    with recording:
        _native.ops.rms_norm(out, x, None, weight, 0.0)
        assert (out == -1).all()
    assert recording.num_ops == 1
    recording.run()
    assert torch.equal(out, torch.ones(2, 8))
    x[1] = -x[1]
    recording.run()  # reads what is there now
    assert torch.equal(out, torch.stack([torch.ones(8), -torch.ones(8)]))


def test_inputs_are_taken_as_they_are_at_each_run() -> None:
    arrays = step_arrays()
    table = torch.arange(40.0).view(10, 4)
    out = torch.zeros(3, 4)
    memory = torch.zeros(256, dtype=torch.int32)
    recording = _native.Recording(arrays)

    def stage(ids: list[int], memory: torch.Tensor) -> None:
        items = decodes(3, 3)
        for item, token in zip(items, ids, strict=True):
            item.request.token_ids[3] = token
        arrays.build(items, 1)
        arrays.write(memory)

    stage([1, 2, 3], memory)
    with recording:
        _native.ops.embedding(out, memory[:3], table)
    recording.run()
    assert torch.equal(out, table[[1, 2, 3]])
    elsewhere = torch.zeros(256, dtype=torch.int32)
    stage([9, 0, 4], elsewhere)
    recording.run()
    assert torch.equal(out, table[[9, 0, 4]])
    arrays.build(decodes(2, 3), 1)  # another number of rows: the op's own check refuses it
    arrays.write(elsewhere)
    with pytest.raises(ValueError, match="embedding: argument 'token_ids' disagrees in dimension 0"):
        recording.run()


def test_ops_of_a_recording_can_be_told_apart() -> None:
    recording = _native.Recording(step_arrays())
    out, x, weight, gated, gate_up = (torch.ones(shape) for shape in ((2, 8), (2, 8), (8,), (3, 4), (3, 8)))
    out.zero_()
    with recording:
        _native.ops.rms_norm(out, x, None, weight, 0.0)
        _native.ops.silu_mul(gated, gate_up)
    assert recording.ops() == [("rms_norm", [(2, 8), (2, 8), (), (8,)]), ("silu_mul", [(3, 4), (3, 8)])]
    seconds = recording.run_timed()
    assert torch.equal(out, torch.ones(2, 8))
    assert len(seconds) == 2
    assert all(0 <= s < 60 for s in seconds)


def test_bad_arguments_are_refused_while_recording() -> None:
    arrays = step_arrays()
    recording = _native.Recording(arrays)
    with pytest.raises(ValueError, match="rms_norm: argument 'x' disagrees"), recording:
        _native.ops.rms_norm(torch.zeros(2, 8), torch.zeros(2, 7), None, torch.ones(8), 0.0)
    assert recording.num_ops == 0
    out = torch.zeros(1, 8)
    _native.ops.rms_norm(out, torch.ones(1, 8), None, torch.ones(8), 0.0)  # ops run again
    assert torch.equal(out, torch.ones(1, 8))
    with recording:
        with pytest.raises(ValueError, match="records already"), _native.Recording(arrays):
            pass
        with pytest.raises(ValueError, match="cannot run one meanwhile"):
            recording.run()


def test_another_threads_ops_run_meanwhile() -> None:
    recording = _native.Recording(step_arrays())
    out = torch.zeros(1, 8)
    with recording:
        thread = threading.Thread(target=lambda: _native.ops.rms_norm(out, torch.ones(1, 8), None, torch.ones(8), 0.0))
        thread.start()
        thread.join()
    assert recording.num_ops == 0
    assert torch.equal(out, torch.ones(1, 8))


def test_a_failing_op_ends_the_requests_of_its_step_alone(model_dir: Path, two_threads: None) -> None:
    """What a replayed op refuses reaches the engine as it does from a call, and the next step replays again."""
    device = CountingDevice(2)
    runner = ModelRunner(model_dir, CONFIG, device=device)
    engine = Engine(CONFIG, runner, time.monotonic)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine.add_request("bad", [5, 6, 7], params)
    for _ in range(4):
        engine.step()
    replays = device.num_replays
    assert replays > 0
    (request,) = engine._outputs.requests("bad")
    request.token_ids[-1] = 10**6  # `embedding` finds it
    outputs = engine.step()
    assert outputs[0].outputs[0].finish_reason == "error"
    assert "embedding: token_ids" in str(outputs[0].error)
    engine.add_request("good", [5, 6, 7], replace(params, max_tokens=5))
    finished = []
    while engine.has_work:
        finished = engine.step()
    assert finished[0].outputs[0].finish_reason == "length"
    assert device.num_replays > replays + 1
