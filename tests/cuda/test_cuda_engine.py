# SPDX-License-Identifier: Apache-2.0
"""A tiny model end to end on the engine's CUDA device, with the simulated GPU under it: chunks, decodes and shared
prefixes in the same steps, decode steps recorded and replayed. Its greedy tokens are the CPU's, and a request's do not
depend on its company."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cuda_device import ASYNC_MODES, load_simulated
from simulated_engine_device import SimulatedCudaDevice

from fastserve import SamplingParams
from fastserve.config import EngineConfig
from fastserve.engine.device import CpuDevice, Device
from fastserve.engine.engine import Engine
from fastserve.engine.runner import ModelRunner
from tiny_models import make_tiny_checkpoint

MODULE = load_simulated()
pytestmark = pytest.mark.skipif(MODULE is None, reason="there is no build/sim (see tests/cuda/CMakeLists.txt)")

SPAN = 128  # tokens: 8 blocks of 16
CONFIG = EngineConfig(
    dtype="float16", block_size=16, num_blocks=160, max_model_len=320, max_num_batched_tokens=96, max_num_seqs=16
)
# One after which no token is a near tie (on the CPU with a float32 cache the least margin is 0.22, for others 0.005):
# the CPU's cache is bfloat16, the device's float16, and a tie would fall as their rounding wants.
DOCUMENT = [(37 * i * i + 3 * i) % 500 + 5 for i in range(SPAN + 40)]
# Nine readers of one document, so that their rows fill more than a warp's tile, and two strangers.
PROMPTS = [DOCUMENT + [10 + 3 * i + j for j in range(4 + 5 * i)] for i in range(9)]
PROMPTS += [[50 + i for i in range(70)], [99]]
NUM_OUTPUT_TOKENS = 5


@dataclass
class Run:
    tokens: list[list[int]]
    num_steps: int
    num_mixed_steps: int  # with a chunk and a decode that read a prefix together


def generate(runner: ModelRunner, prompts: list[list[int]], **config: Any) -> Run:
    """Greedy tokens of each prompt; the first one is a step ahead, so that the others find its prefix cached."""
    engine = Engine(replace(runner.config, **config), runner, time.monotonic)
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    tokens: dict[str, list[int]] = {}
    num_steps = num_mixed_steps = 0
    spared = runner.num_kv_tokens_spared
    waiting = list(enumerate(prompts))
    engine.add_request(str(waiting[0][0]), waiting.pop(0)[1], params)
    while engine.has_work or waiting:
        outputs = engine.step()
        num_steps += 1
        is_mixed = any(len(output.outputs[0].token_ids) > 1 for output in outputs) and num_steps > 2
        num_mixed_steps += int(is_mixed and runner.num_kv_tokens_spared > spared)
        spared = runner.num_kv_tokens_spared
        for output in outputs:
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        while waiting and tokens:
            index, prompt = waiting.pop(0)
            engine.add_request(str(index), prompt, params)
    engine.scheduler.check()
    return Run([tokens[str(i)] for i in range(len(prompts))], num_steps, num_mixed_steps)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(
        tmp_path_factory.mktemp("model"), hidden_size=192, num_attention_heads=6, num_key_value_heads=3, head_dim=64
    )


def runner_on(device: Device, model_dir: Path) -> ModelRunner:
    return ModelRunner(model_dir, CONFIG, device=device)


@pytest.fixture(scope="module")
def simulated(model_dir: Path) -> Iterator[ModelRunner]:
    assert MODULE is not None
    MODULE.configure(ASYNC_MODES["late"], 0)
    runner = runner_on(SimulatedCudaDevice(MODULE), model_dir)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def together(simulated: ModelRunner) -> Run:
    return generate(simulated, PROMPTS)


def test_greedy_tokens_are_those_of_the_cpu(model_dir: Path, simulated: ModelRunner, together: Run) -> None:
    assert together.num_mixed_steps > 0
    assert simulated.num_kv_tokens_spared >= 8 * SPAN  # the nine have read the document together
    assert together.tokens == generate(runner_on(CpuDevice(2), model_dir), PROMPTS).tokens


def test_decode_steps_are_recorded_and_replayed(simulated: ModelRunner, together: Run) -> None:
    device = simulated.device
    assert isinstance(device, SimulatedCudaDevice)
    assert len(simulated.graphs) == device.num_captures > 0
    before = device.num_captures, device.num_replays
    assert generate(simulated, PROMPTS).tokens == together.tokens
    assert device.num_captures == before[0]  # the same shapes: nothing new is recorded
    assert device.num_replays > before[1]


@pytest.mark.parametrize("index", [0, 4, 10])
def test_a_request_alone_gets_the_same_tokens(simulated: ModelRunner, together: Run, index: int) -> None:
    assert generate(simulated, [PROMPTS[index]]).tokens == [together.tokens[index]]


@pytest.mark.parametrize(
    "config", [{"max_chunk_tokens": 7}, {"max_num_batched_tokens": 24}, {"enable_prefix_caching": False}], ids=str
)
def test_chunks_and_caching_change_no_token(simulated: ModelRunner, together: Run, config: dict[str, Any]) -> None:
    chosen = [0, 5, 8, 9]
    run = generate(simulated, [PROMPTS[i] for i in chosen], **config)
    assert run.tokens == [together.tokens[i] for i in chosen]


def test_without_graphs_the_same_tokens(model_dir: Path, together: Run) -> None:
    assert MODULE is not None
    MODULE.configure(ASYNC_MODES["early"], 3)  # blocks and warps in another order
    runner = runner_on(SimulatedCudaDevice(MODULE, graphs=False), model_dir)
    assert generate(runner, PROMPTS[:3]).tokens == together.tokens[:3]
    runner.close()
