# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes: every native op, and the engine's own Python around them.

    python bench/step_profile.py MODEL_FOLDER                      batch 1, 32 and 64, and a prefill of 512 tokens
    python bench/step_profile.py MODEL_FOLDER --batch 8 --context 1024
    python bench/step_profile.py MODEL_FOLDER --threads 1          CPU time: usable on a machine that others use too
    python bench/step_profile.py MODEL_FOLDER --stream             with an output for every token, as a server has
    python bench/step_profile.py MODEL_FOLDER --eager              every op called from Python: nothing is recorded

Decode steps, and prompts of as many tokens as a step may have, are recorded and replayed by one call, which then notes
the time after each op.
Ops and the engine's parts are wrapped with clocks (0.3 us a call), and each is charged what it spends outside the parts
it calls. With one thread the clock is that thread's CPU time; with more it is wall time, which means little unless the
machine is quiet. The prompts are real text. "linear" is split by shape, rows x depth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastserve import LLM, RequestOutputKind, SamplingParams, _native
from fastserve.doctor import cpu_name
from fastserve.engine.device import CpuDevice

TEXT = Path(__file__).resolve().parent.parent / "LICENSE"


class Clocks:
    """Exclusive time by part: what a part spends while none of the parts that it calls runs."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        now = self.now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def charge(self, part: str, seconds: float) -> None:
        """Of the time of the part that runs, `seconds` are another's."""
        self.seconds[part] += seconds
        self.seconds[self._open[-1]] -= seconds

    def wrap(self, name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._open.append(name(*args, **kwargs))
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()

        return clocked


def name_of_linear(op: str) -> Callable[..., str]:
    return lambda out, x, *rest, **more: f"op {op} {out.shape[1]}x{x.shape[1]}"


def timed_replay(clocks: Clocks, recording: _native.Recording) -> Callable[[], None]:
    """Runs it and moves what its ops took from the open part to parts of their own. Ops note wall time; what they get
    is their share of what the clock says."""
    names = [
        f"op {op} {shapes[0][1]}x{shapes[1][1]}" if op.startswith("linear") else f"op {op}"
        for op, shapes in recording.ops()
    ]

    def run() -> None:
        before = clocks.now()
        seconds = recording.run_timed()
        rate = (clocks.now() - before) / sum(seconds)
        for name, wall in zip(names, seconds, strict=True):
            clocks.charge(name, wall * rate)

    return run


def watch(clocks: Clocks, owner: Any, attribute: str, name: str) -> None:
    setattr(owner, attribute, clocks.wrap(lambda *_, **__: name, getattr(owner, attribute)))


def watch_engine(clocks: Clocks, llm: LLM) -> None:
    engine, runner = llm.loaded.engine, llm.loaded.runner
    for op in dir(_native.ops):
        if not op.startswith("_"):
            function = getattr(_native.ops, op)
            name = name_of_linear(op) if op.startswith("linear") else (lambda *_, _name=f"op {op}", **__: _name)
            setattr(_native.ops, op, clocks.wrap(name, function))
    capture = runner.device.capture
    runner.device.capture = lambda *args: clocks.wrap(
        lambda: "op (rest of a recording)", timed_replay(clocks, capture(*args).__self__)
    )
    watch(clocks, engine.scheduler, "schedule", "python schedule")
    watch(clocks, engine.scheduler, "update", "python update")
    watch(clocks, runner.batches, "build", "python batch")
    watch(clocks, runner.sampler, "sample", "python sampler")
    watch(clocks, runner.model, "forward", "python model")
    watch(clocks, runner.model, "logits", "python model")
    watch(clocks, runner, "run", "python runner")
    watch(clocks, engine._outputs, "push", "python outputs")
    watch(clocks, engine._outputs, "collect", "python outputs")
    watch(clocks, engine, "step", "python engine")


def steps(
    llm: LLM, clocks: Clocks, prompts: list[list[int]], num_steps: int, kind: RequestOutputKind
) -> list[dict[str, float]]:
    """Exclusive seconds by part, for each of `num_steps` steps: of decoding, or of the prefill if it is one."""
    engine = llm.loaded.engine
    params = SamplingParams(temperature=0, max_tokens=num_steps + 256, ignore_eos=True, output_kind=kind)
    computed = engine.stats.num_computed_tokens
    for index, prompt in enumerate(prompts):
        engine.add_request(f"profile-{index}", prompt, params)
    while num_steps > 1 and engine.stats.num_computed_tokens < computed + sum(map(len, prompts)):
        if not engine.has_work:
            raise SystemExit("the engine ended all requests before their prompts were computed: its log says why")
        engine.step()
    measured = []
    if num_steps > 1:
        for _ in range(4):
            engine.step()
    for _ in range(num_steps):
        clocks.seconds.clear()
        engine.step()
        measured.append(dict(clocks.seconds))
    for index in range(len(prompts)):
        engine.abort(f"profile-{index}")
    while engine.has_work:
        engine.step()
    return measured


def table(measured: list[dict[str, float]], tokens: int) -> tuple[list[tuple[str, float]], float]:
    parts = sorted({part for step in measured for part in step})
    medians = {part: statistics.median(step.get(part, 0.0) for step in measured) for part in parts}
    total = sum(medians.values())
    return sorted(medians.items(), key=lambda item: -item[1]), total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--activation-dtype", default="auto", help="of int4 and int8 weights: float, int8, int12")
    parser.add_argument("--batch", type=int, action="append", help="decoding requests; may be repeated")
    parser.add_argument("--context", type=int, default=128, help="tokens of a decoding request's prompt")
    parser.add_argument("--prefill", type=int, action="append", help="tokens of a prompt; may be repeated")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=_native.num_physical_cores())
    parser.add_argument("--isa", choices=_native.isas(), default=_native.isa())
    parser.add_argument("--stream", action="store_true", help="outputs as they come; else the last alone")
    parser.add_argument("--eager", action="store_true", help="without recordings")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.batch is None and arguments.prefill is None:
        arguments.batch, arguments.prefill = [1, 32, 64], [512]
    _native.set_isa(arguments.isa)
    CpuDevice.has_graphs = not arguments.eager

    llm = LLM(
        arguments.model,
        dtype=arguments.dtype,
        activation_dtype=arguments.activation_dtype,
        num_threads=arguments.threads,
        enable_prefix_caching=False,
        max_num_batched_tokens=max([512, *(arguments.prefill or [])]),
        kv_cache_memory_bytes=1 << 30,
    )
    kind = RequestOutputKind.DELTA if arguments.stream else RequestOutputKind.FINAL_ONLY
    clocks = Clocks(time.thread_time if arguments.threads == 1 else time.perf_counter)
    watch_engine(clocks, llm)
    ids = llm.get_tokenizer().encode(TEXT.read_text())
    ids *= 1 + 4096 // len(ids)
    report: dict[str, Any] = {}
    if not arguments.json:
        print(f"{cpu_name()}, {arguments.threads} threads, {arguments.isa}; medians of a step")
    for batch in arguments.batch or []:
        prompts = [ids[i * 20 : i * 20 + arguments.context] for i in range(batch)]
        measured = steps(llm, clocks, prompts, arguments.steps, kind)
        report[f"decode, batch {batch}, context {arguments.context}"] = (measured, batch)
    for length in arguments.prefill or []:
        measured = [steps(llm, clocks, [ids[:length]], 1, kind)[0] for _ in range(5)]
        report[f"prefill, {length} tokens"] = (measured, length)
    rows = {}
    for title, (measured, tokens) in report.items():
        parts, total = table(measured, tokens)
        python = sum(seconds for part, seconds in parts if part.startswith("python"))
        rows[title] = {"ms": total * 1e3, "python_ms": python * 1e3, **{part: s * 1e3 for part, s in parts}}
        if arguments.json:
            continue
        print(f"\n{title}: {total * 1e3:.2f} ms, {tokens / total:.0f} tok/s; outside ops {100 * python / total:.1f} %")
        for part, seconds in parts:
            print(f"  {part:32}{seconds * 1e3:9.3f} ms {100 * seconds / total:6.1f} %")
    if arguments.json:
        print(json.dumps(rows))
    llm.close()


if __name__ == "__main__":
    main()
