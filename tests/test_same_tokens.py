# SPDX-License-Identifier: Apache-2.0
"""The promise: what a request gets depends on the model, its prompt, parameters and seed, and on nothing else.

A few requests run alone, one after another, and then in every hostile way the engine has: among 16 neighbours, with
small and large token budgets, chunks of 1, 7, 16, P - 1 and P tokens, a cold and a warm prefix cache, a pool so small
that requests are preempted, and one or two threads. Tokens and logprobs must be equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fastserve import LLM, RequestOutput, SamplingParams, _native
from fastserve.admission import admission_names
from fastserve.engine.engine import Engine
from fastserve.engine.scheduler import Scheduler
from fastserve.policies import get_policy

Result = tuple[list[int], list[list[tuple[int, float]]]]

NUM_OUTPUT_TOKENS = 12
PARAMS = (
    SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, logprobs=3, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=11, max_tokens=NUM_OUTPUT_TOKENS, logprobs=3, ignore_eos=True),
    SamplingParams(
        temperature=1.3, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.3, seed=12,
        max_tokens=NUM_OUTPUT_TOKENS, logprobs=3, ignore_eos=True,
    ),
)  # fmt: skip


@dataclass
class Subject:
    """The requests under test, and how each came out when it ran alone."""

    llm: LLM
    prompts: list[list[int]]
    alone: list[Result]

    def run(
        self, *, neighbours: int = 0, growing: int = 0, first: str = "subjects", warm: bool = False, **config: Any
    ) -> tuple[list[Result], Engine]:
        """The subjects in one batch under another engine configuration, with the same loaded model."""
        loaded = self.llm.loaded
        engine_config = replace(loaded.config, **config)
        num_blocks = engine_config.num_blocks or loaded.runner.num_blocks
        policy = get_policy(engine_config.policy)
        scheduler = Scheduler(
            engine_config, num_blocks, loaded.runner.max_model_len, loaded.runner.eos_token_ids, policy
        )
        engine = Engine(engine_config, loaded.runner, loaded.engine.clock, loaded.tokenizer, scheduler=scheduler)
        outputs: dict[str, RequestOutput] = {}

        def add_subjects() -> None:
            for i, (prompt, params) in enumerate(zip(self.prompts, PARAMS, strict=True)):
                engine.add_request(f"subject-{i}", prompt, params)

        def add_neighbours() -> None:
            for i in range(neighbours):
                # Some share a prefix with a subject, some are prefixes of one, some are strangers.
                source = self.prompts[i % len(self.prompts)]
                prompt = (source[: 5 + 13 * i], [*source[: 64 + i], i + 5], [7 + i] * (3 + 17 * i))[i % 3]
                params = SamplingParams(temperature=i % 2, seed=i, max_tokens=4 + 3 * i, ignore_eos=True)
                engine.add_request(f"neighbour-{i}", prompt, params, priority=i % 3 - 1)

        def drain() -> None:
            while engine.has_work:
                for output in engine.step():
                    outputs[output.request_id] = output

        if warm:
            for i, prompt in enumerate(self.prompts):
                engine.add_request(f"warm-{i}", prompt, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
            drain()
        for i in range(growing):  # came earlier, so when memory runs out it is the subjects that lose theirs
            params = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True)
            engine.add_request(f"growing-{i}", [40 + i] * 31, params)
        for add in (add_subjects, add_neighbours) if first == "subjects" else (add_neighbours, add_subjects):
            add()
        drain()
        engine.scheduler.check()
        return [result_of(outputs[f"subject-{i}"]) for i in range(len(self.prompts))], engine


def result_of(output: RequestOutput) -> Result:
    completion = output.outputs[0]
    assert completion.finish_reason == "length"
    assert completion.logprobs is not None
    logprobs = [[(token, entry.logprob) for token, entry in position.items()] for position in completion.logprobs]
    return list(completion.token_ids), logprobs


MODELS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32"},
    "int4 with float activations": {"activation_dtype": "float"},
    "int4 with int12 activations": {"activation_dtype": "int12"},
    "int4 with int8 activations": {"activation_dtype": "int8"},
}


@pytest.fixture(scope="module", params=MODELS)
def subject(request: pytest.FixtureRequest, demo_model_dir: Path, demo_int4_model_dir: Path) -> Iterator[Subject]:
    folder = demo_int4_model_dir if "int4" in request.param else demo_model_dir
    text = (Path(__file__).resolve().parent.parent / "tools" / "demo_document.txt").read_text()
    with LLM(folder, **MODELS[request.param], max_model_len=1024, num_blocks=128, num_threads=2) as llm:
        ids = llm.get_tokenizer().encode(text)
        prompts = [ids[:230], ids[:97] + ids[300:333], ids[500:533]]
        subject = Subject(llm, prompts, [])
        for i in range(len(prompts)):
            one = Subject(llm, prompts, [])
            loaded = llm.loaded
            engine = Engine(
                replace(loaded.config, enable_prefix_caching=False),
                loaded.runner,
                loaded.engine.clock,
                loaded.tokenizer,
            )
            engine.add_request("alone", one.prompts[i], PARAMS[i])
            last = None
            while engine.has_work:
                last = (engine.step() or [last])[-1]
            assert last is not None
            subject.alone.append(result_of(last))
        yield subject


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = _native.num_threads()
    _native.set_num_threads(1)
    yield
    _native.set_num_threads(before)


def test_among_sixteen_hostile_neighbours(subject: Subject) -> None:
    for first in ("subjects", "neighbours"):
        results, _ = subject.run(neighbours=16, first=first)
        assert results == subject.alone


@pytest.mark.parametrize("budget", [8, 64, 512])
def test_with_any_token_budget(subject: Subject, budget: int) -> None:
    results, _ = subject.run(neighbours=5, max_num_batched_tokens=budget)
    assert results == subject.alone


@pytest.mark.parametrize("chunk", [1, 7, 16, 229, 230])
def test_with_any_chunk_size(subject: Subject, chunk: int) -> None:
    results, _ = subject.run(max_chunk_tokens=chunk)
    assert results == subject.alone


@pytest.mark.parametrize("admission", admission_names())
def test_by_priority_under_any_admission(subject: Subject, admission: str) -> None:
    """In memory for a few of them, some of the neighbours more urgent."""
    results, _ = subject.run(neighbours=5, policy="priority", admission=admission, num_blocks=16)
    assert results == subject.alone


def test_with_prefixes_that_attention_reads_once(subject: Subject) -> None:
    """Readers of one document, half of them of one page more: two levels, shared by decodes and chunks."""
    loaded, span = subject.llm.loaded, subject.llm.loaded.runner.batches.span
    text = [token for prompt in subject.prompts for token in prompt] * 2
    prompts = [text[: span + 70] + text[40 : 40 + span] * (i % 2) + text[i : i + 3 + 5 * i] for i in range(8)]

    def run(numbers: range, **config: Any) -> dict[str, Result]:
        engine_config = replace(loaded.config, **config)
        engine = Engine(engine_config, loaded.runner, loaded.engine.clock, loaded.tokenizer)
        for i in numbers:
            params = replace(PARAMS[i % len(PARAMS)], max_tokens=NUM_OUTPUT_TOKENS - i % 5)
            engine.add_request(str(i), prompts[i], params)
        outputs: dict[str, Result] = {}
        while engine.has_work:
            outputs.update({output.request_id: result_of(output) for output in engine.step() if output.finished})
        engine.scheduler.check()
        return outputs

    before = loaded.runner.num_kv_tokens_spared
    alone = {key: result for i in (0, 3, 7) for key, result in run(range(i, i + 1)).items()}
    assert loaded.runner.num_kv_tokens_spared == before
    together = run(range(8), max_num_batched_tokens=64)
    # For six steps at least all eight read one span together, and four of them another.
    assert loaded.runner.num_kv_tokens_spared - before >= 6 * (7 + 3) * span
    assert {key: together[key] for key in alone} == alone


def test_with_a_warm_prefix_cache(subject: Subject) -> None:
    results, engine = subject.run(warm=True)
    assert engine.stats.num_cached_tokens >= 200
    assert results == subject.alone


def test_without_a_prefix_cache(subject: Subject) -> None:
    results, _ = subject.run(neighbours=4, enable_prefix_caching=False)
    assert results == subject.alone


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_when_preempted(subject: Subject, prefix_caching: bool) -> None:
    # Everybody starts at once: what admission looks ahead for is what this test needs.
    results, engine = subject.run(
        growing=6, num_blocks=20, enable_prefix_caching=prefix_caching, admission="aggressive"
    )
    assert engine.stats.num_preemptions > 0
    assert results == subject.alone


def test_with_one_thread(subject: Subject, one_thread: None) -> None:
    results, _ = subject.run(neighbours=3)
    assert results == subject.alone
