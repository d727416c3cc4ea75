# SPDX-License-Identifier: Apache-2.0
"""The end-to-end figures of the README: single-stream decode, prefill, batched decode, start to first token.

    python bench/first_figures.py MODEL_FOLDER [--dtype bfloat16] [--num-threads 2] [--repeat 5]

Prompts are real text, end-of-text is ignored, the prefix cache is off (each run computes everything), and each
figure is the median of `--repeat` runs, printed with its range, beside the floor that the machine sets:
bytes / memory bandwidth for decoding, operations / the best matrix product for prefill, both measured in this run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from fastserve import LLM, SamplingParams, __version__, _native
from fastserve.doctor import cpu_name
from fastserve.layers import make_linear

TEXT = Path(__file__).resolve().parent.parent / "LICENSE"


def main() -> None:
    parser = argparse.ArgumentParser(description="End-to-end figures of one model on this machine.")
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    options = {"num_threads": arguments.num_threads} if arguments.num_threads else {}

    begin = time.perf_counter()
    llm = LLM(
        arguments.model, dtype=arguments.dtype, enable_prefix_caching=False, max_num_batched_tokens=512, **options
    )
    ids = llm.get_tokenizer().encode(TEXT.read_text())
    run(llm, [ids[:16]], 1)
    startup_s = time.perf_counter() - begin

    rows = []
    for name, prompts, num_output, unit in (
        ("decode, 1 stream (128 in, 128 out)", [ids[:128]], 128, "decode"),
        ("prefill, 512 tokens", [ids[:512]], 1, "prefill"),
        ("decode, batch 8 (128 in, 128 out)", [ids[i * 20 : i * 20 + 128] for i in range(8)], 128, "decode"),
        ("decode, batch 32 (128 in, 128 out)", [ids[i * 20 : i * 20 + 128] for i in range(32)], 128, "decode"),
    ):
        rates = sorted(rate(llm, prompts, num_output, unit) for _ in range(arguments.repeat))
        rows.append((name, statistics.median(rates), rates[0], rates[-1]))
    floors = machine_limits(llm)
    machine = f"{cpu_name()}, {_native.num_threads()} threads, {_native.isa()}, {platform.system()}"
    if arguments.json:
        print(json.dumps({"machine": machine, "startup_s": startup_s, "rows": rows, "limits": floors}))
        return
    print(
        f"fastserve {__version__}, {arguments.model}, dtype {arguments.dtype}; {machine}; load {os.getloadavg()[0]:.1f}"
    )
    for name, median, low, high in rows:
        print(f"  {name:<38}{median:8.1f} tok/s  ({low:.1f} to {high:.1f})")
    print(f"  {'start to first token':<38}{startup_s:8.2f} s")
    print(
        "  limits of this machine for this model, measured now: "
        + ", ".join(f"{k} {v:.0f} tok/s" for k, v in floors.items())
    )
    llm.close()


def run(llm: LLM, prompts: list[list[int]], num_output: int) -> tuple[float, float]:
    """(seconds until every request has its first token, seconds after that)"""
    params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    metrics = [output.metrics for output in outputs if output.metrics]
    begin = min(m.arrival_s for m in metrics)
    first = max(m.first_token_s or 0.0 for m in metrics)
    return first - begin, max(m.last_token_s or 0.0 for m in metrics) - first


def rate(llm: LLM, prompts: list[list[int]], num_output: int, unit: str) -> float:
    """Tokens per second: prompt tokens until the first output tokens, or output tokens after all have their first."""
    prefill_s, decode_s = run(llm, prompts, num_output)
    if unit == "prefill":
        return sum(map(len, prompts)) / prefill_s
    return len(prompts) * (num_output - 1) / decode_s


def machine_limits(llm: LLM) -> dict[str, float]:
    """Tokens per second if weights were read at memory bandwidth, and if all products ran at the best rate seen."""
    source = llm.loaded.runner.device.empty((2**27,), torch.float32).fill_(1)  # 512 MB, in pages as the weights' are
    seconds = min(timed(lambda: source.sum()) for _ in range(5))
    torch.set_num_threads(_native.num_threads())
    seconds = min(seconds, *(timed(lambda: source.sum()) for _ in range(5)))
    torch.set_num_threads(1)
    bandwidth = source.numel() * 4 / seconds
    dtype = llm.loaded.runner.model.lm_head.packed.dtype
    weight = torch.randn(2048, 2048).to(dtype if dtype.is_floating_point else torch.bfloat16)
    linear, x, out = make_linear(llm.loaded.runner.device, weight), torch.randn(512, 2048), torch.empty(512, 2048)
    workspace = torch.empty(linear.workspace_bytes(512), dtype=torch.uint8)
    flops = 2 * 512 * 2048 * 2048 / min(timed(lambda: linear(out, x, workspace)) for _ in range(9))
    linears = list(llm.loaded.runner.model.linears())
    weight_bytes = sum(linear.num_bytes for linear in linears)
    block_weights = sum(linear.in_features * linear.out_features for linear in linears[:-1])
    return {"single decode (bytes)": bandwidth / weight_bytes, "prefill (operations)": flops / (2 * block_weights)}


def timed(work: object) -> float:
    begin = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
