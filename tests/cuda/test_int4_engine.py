# SPDX-License-Identifier: Apache-2.0
"""A tiny int4 model end to end on the engine's CUDA device, with the simulated GPU under it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cuda_device import ASYNC_MODES, load_simulated
from simulated_engine_device import SimulatedCudaDevice

from fastserve import SamplingParams
from fastserve.config import EngineConfig
from fastserve.engine.device import CpuDevice
from fastserve.engine.engine import Engine
from fastserve.engine.runner import ModelRunner
from int4_formats import quantize_folder, to_int8
from tiny_models import make_tiny_checkpoint

MODULE = load_simulated()
pytestmark = pytest.mark.skipif(MODULE is None, reason="there is no build/sim (see tests/cuda/CMakeLists.txt)")

CONFIG = EngineConfig(
    dtype="float16", activation_dtype="float", block_size=16, num_blocks=64, max_model_len=128, max_num_seqs=8
)
PROMPTS = [[(11 * i * j + 5 * j) % 500 + 5 for j in range(3 + 9 * i)] for i in range(6)]


def generate(runner: ModelRunner, prompts: list[list[int]]) -> list[list[int]]:
    engine = Engine(runner.config, runner, time.monotonic)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    return [tokens[str(i)] for i in range(len(prompts))]


@pytest.mark.parametrize("kind", ["awq", "gptq-act", "fastserve"])
def test_int4_model_gives_the_tokens_of_the_cpu_alone_and_together(tmp_path: Path, kind: str) -> None:
    assert MODULE is not None
    plain = make_tiny_checkpoint(
        tmp_path / "plain", hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64
    )
    quantize_folder(plain, tmp_path / "int4", kind, 32)
    if kind == "fastserve":
        to_int8(tmp_path / "int4", "embed_tokens", "lm_head")
    MODULE.configure(ASYNC_MODES["late"], 0)
    device = SimulatedCudaDevice(MODULE)
    runner = ModelRunner(tmp_path / "int4", CONFIG, device=device)
    together = generate(runner, PROMPTS)
    assert device.ops.num_launches["linear_int4"] > 0
    for op in ("embedding_int8", "linear_int8"):
        assert (device.ops.num_launches[op] > 0) == (kind == "fastserve"), op
    assert generate(runner, PROMPTS[2:3]) == together[2:3]
    runner.close()
    on_cpu = ModelRunner(tmp_path / "int4", CONFIG, device=CpuDevice(2))
    assert generate(on_cpu, PROMPTS) == together
    on_cpu.close()
