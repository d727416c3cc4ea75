# SPDX-License-Identifier: Apache-2.0
"""A server under load from many clients of which some leave at random, and under random mixes of every option.

    python tests/soak.py load MODEL --clients 200 --seconds 60
    python tests/soak.py fuzz MODEL --requests 2000

The test suite runs both for a moment, on a tiny model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from fastserve.bench.client import events, open_client, piece_of
from serving import RunningServer, ServerProcess

WORDS = "the river of time runs over stones and birds sing in old trees while people talk about rain"

# --- load: clients that come, read and sometimes leave ---


@dataclass
class Question:
    """A request and its whole answer, which was given when nobody else asked."""

    body: dict[str, Any]
    answer: str = ""


@dataclass
class Report:
    """What a load did. Times in seconds."""

    finished: int = 0
    left: int = 0  # requests whose client went away
    wrong: list[str] = field(default_factory=list)  # answers that were not those given alone
    failed: list[str] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    itls: list[float] = field(default_factory=list)
    rss: list[tuple[float, int]] = field(default_factory=list)  # (seconds since the start, bytes)

    def rss_slope(self) -> float:
        """Bytes per second over the second half, a least-squares line."""
        half = self.rss[len(self.rss) // 2 :]
        return float(np.polyfit([at for at, _ in half], [size for _, size in half], 1)[0]) if len(half) > 2 else 0.0

    def __str__(self) -> str:
        def line(name: str, values: list[float]) -> str:
            shown = ", ".join(f"p{p} {1000 * np.percentile(values, p):.0f}" for p in (50, 90, 99)) if values else "-"
            return f"{name} ms: {shown}"

        sizes = [size / 2**20 for _, size in self.rss]
        memory = f"{sizes[0]:.0f} to {sizes[-1]:.0f} MiB" if sizes else "-"
        return "\n".join(
            [
                f"{self.finished} finished, {self.left} left, {len(self.failed)} failed, {len(self.wrong)} wrong",
                line("TTFT", self.ttfts),
                line("ITL", self.itls),
                *self.failed[:5],
                f"RSS {memory}, slope of the second half {self.rss_slope() / 1024:.1f} KiB/s",
            ]
        )


def questions(num: int, seed: int, max_tokens: int) -> list[Question]:
    """Greedy and seeded requests; half of the prompts share their beginning."""
    draw = random.Random(seed)
    words = WORDS.split()
    shared = " ".join(draw.choices(words, k=60))
    made = []
    for i in range(num):
        prompt = (shared + " " if i % 2 else "") + " ".join(draw.choices(words, k=draw.randint(1, 40)))
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": draw.randint(1, max_tokens), "stream": True}
        body |= {"temperature": 0} if i % 3 == 0 else {"temperature": 0.9, "seed": i, "top_p": 0.95}
        made.append(Question(body))
    return made


async def ask(
    client: httpx.AsyncClient, url: str, question: Question, leave_after: float, report: Report
) -> str | None:
    """One streamed request; the client leaves after `leave_after` seconds. None unless the answer was complete."""
    text, is_done, begin, last = "", False, time.perf_counter(), None

    async def read() -> None:
        nonlocal text, is_done, last
        async with client.stream("POST", url, json=question.body) as response:
            if response.status_code != 200:
                report.failed.append(f"{response.status_code} {(await response.aread())[:200]!r}")
                return
            async for data in events(response):
                if data == "[DONE]":
                    is_done = True
                    continue
                event = json.loads(data)
                if event.get("error"):
                    report.failed.append(data[:200])
                    return
                if piece := piece_of(event):
                    now = time.perf_counter()
                    (report.ttfts if last is None else report.itls).append(now - (begin if last is None else last))
                    text, last = text + piece, now

    try:
        await asyncio.wait_for(read(), leave_after)
    except asyncio.TimeoutError:
        report.left += 1
        return None
    except httpx.HTTPError as error:
        report.failed.append(repr(error)[:200])
        return None
    return text if is_done else None


async def load(
    url: str,
    pid: int,
    *,
    clients: int,
    max_tokens: int,
    leaving: float,
    patience: float,
    seconds: float = float("inf"),
    each: float = float("inf"),
    seed: int = 0,
) -> Report:
    """`clients` clients ask one question after another for `seconds`, or `each` questions. A share of `leaving` of all
    requests is given up after a random time below `patience`."""
    url += "/v1/completions"
    asked = questions(48, seed, max_tokens)
    report, alone = Report(), Report()
    async with open_client() as client:
        for question in asked:
            answer = await ask(client, url, question, 600, alone)
            assert answer is not None, alone.failed
            question.answer = answer
        begin = time.perf_counter()

        async def one(number: int) -> None:
            draw, asks = random.Random(f"{seed}/{number}"), 0
            while time.perf_counter() < begin + seconds and asks < each:
                asks += 1
                question = draw.choice(asked)
                leave_after = draw.random() * patience if draw.random() < leaving else 600
                answer = await ask(client, url, question, leave_after, report)
                if answer is not None:
                    report.finished += 1
                    if answer != question.answer:
                        report.wrong.append(f"{question.body}: {answer!r} is not {question.answer!r}")

        async def watch() -> None:
            while True:
                report.rss.append((time.perf_counter() - begin, resident_bytes(pid)))
                await asyncio.sleep(min(1.0, seconds / 10))

        watching = asyncio.ensure_future(watch())
        await asyncio.gather(*(one(number) for number in range(clients)))
        watching.cancel()
    return report


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


# In the server's process: its last act is to check that everything was given back.
CHECK_AT_THE_END = """
import sys
from fastserve.async_llm import AsyncLLM
real = AsyncLLM.close
def close(self):
    scheduler = self.loaded.engine.scheduler
    scheduler.check()
    print("at the end", scheduler.stats.num_used_blocks, "blocks used", file=sys.stderr, flush=True)
    real(self)
AsyncLLM.close = close
"""


def run_load(model: Path, flags: Sequence[str], **how: Any) -> Report:
    """A load on a server process of its own. Raises AssertionError if a block leaked or an answer was wrong."""
    import signal

    process = ServerProcess(model, *flags, code=CHECK_AT_THE_END)
    try:
        report = asyncio.run(load(process.url, process.popen.pid, **how))
        deadline = time.monotonic() + 30
        while used_blocks(process.url) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.popen.send_signal(signal.SIGTERM)
        status, log = process.end()
    finally:
        process.kill()
    assert status == 0, log[-2000:]
    assert "at the end 0 blocks used" in log, log[-2000:]
    assert not report.wrong, report.wrong[:3]
    assert not report.failed, report.failed[:3]
    return report


def used_blocks(url: str) -> float:
    text = httpx.get(url + "/metrics", timeout=30).text
    return sum(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith(("fastserve:kv_cache_used_blocks{", "fastserve:num_requests_running{"))
    )


# --- fuzz: every option with every other ---

OPTIONS: dict[str, list[Any]] = {
    "n": [1, 2, 3],
    "temperature": [0, 0.5, 2.0],
    "top_p": [0.1, 1.0],
    "top_k": [-1, 1, 20],
    "min_p": [0.0, 0.2],
    "presence_penalty": [-2.0, 1.0],
    "frequency_penalty": [-2.0, 1.0],
    "repetition_penalty": [0.5, 1.3],
    "seed": [-5, 0, 7],
    "stop": ["e", ["a", "th", "\n"]],
    "stop_token_ids": [[40]],
    "include_stop_str_in_output": [True, False],
    "ignore_eos": [True, False],
    "min_tokens": [0, 2],
    "skip_special_tokens": [True, False],
    "logit_bias": [{"40": 5, "41": -100}],
    "allowed_token_ids": [[40, 41, 42, 43]],
    "bad_words": [["the", "Z"], ["quick brown"]],
    "logprobs": [0, 1, 5],
    "prompt_logprobs": [0, 2],
    "echo": [True, False],
    "cache_salt": ["x", "y"],
    "return_token_ids": [True, False],
    "return_tokens_as_token_ids": [True, False],
    "structured_outputs": [
        {"regex": "[a-e]{2,6}"},
        {"choice": ["yes", "no", "perhaps"]},
        {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
        {"json_object": True},
        {"grammar": 'start: "a" | "b" start'},
    ],
}
NOT_WITH_STRUCTURE = ("ignore_eos", "min_tokens", "allowed_token_ids", "bad_words")
PROMPTS: list[Any] = ["The quick", [5, 6, 7], ["a", "b"], "word " * 30, [[9, 8], [7]]]


def option_mix(draw: random.Random) -> dict[str, Any]:
    """A valid completions request in which every option is present with probability one half."""
    body: dict[str, Any] = {"prompt": draw.choice(PROMPTS), "max_tokens": draw.randint(2, 12), "seed": 1}
    for name, values in OPTIONS.items():
        if draw.random() < (0.3 if name == "structured_outputs" else 0.5):
            body[name] = draw.choice(values)
    if "structured_outputs" in body:
        for name in NOT_WITH_STRUCTURE:
            body.pop(name, None)
    return body


def streamed_choices(text: str) -> list[tuple[str, Any, Any]]:
    """(text, finish_reason, stop_reason) of every choice of a stream."""
    texts: dict[int, str] = {}
    ends: dict[int, tuple[Any, Any]] = {}
    for event in text.split("\n\n")[:-2]:
        body = json.loads(event.removeprefix("data: "))
        if "error" in body:
            raise AssertionError(body)
        for choice in body["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + choice["text"]
            ends[index] = (choice["finish_reason"], choice["stop_reason"])
    return [(texts[index], *ends[index]) for index in sorted(texts)]


async def fuzz(url: str, num: int, *, at_once: int, seed: int = 0) -> Counter[int]:
    """`num` random mixes, each whole and streamed, `at_once` at a time; both answers must be the same. The statuses."""
    url += "/v1/completions"
    statuses: Counter[int] = Counter()
    draw, places = random.Random(seed), asyncio.Semaphore(at_once)
    async with open_client() as client:

        async def one(body: dict[str, Any]) -> None:
            async with places:
                whole, streamed = await asyncio.gather(
                    client.post(url, json=body), client.post(url, json={**body, "stream": True})
                )
            statuses[whole.status_code] += 1
            statuses[streamed.status_code] += 1
            assert whole.status_code == streamed.status_code == 200, (body, whole.text[:500], streamed.text[:500])
            expected = [(one["text"], one["finish_reason"], one["stop_reason"]) for one in whole.json()["choices"]]
            assert streamed_choices(streamed.text) == expected, body

        await asyncio.gather(*(one(option_mix(draw)) for _ in range((num + 1) // 2)))
    return statuses


def run_fuzz(model: Path, engine: dict[str, Any], num: int, at_once: int, seed: int = 0) -> Counter[int]:
    """Raises AssertionError if an answer is not a 200, differs when streamed, or a block leaked."""
    with RunningServer(model, engine) as server:
        statuses = asyncio.run(fuzz(server.url, num, at_once=at_once, seed=seed))
        server.wait_until_empty()
        assert server.get("/health").status_code == 200
    return statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("load", "fuzz"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.kind == "fuzz":
        engine = {"max_model_len": 256, "num_blocks": 64, "max_num_seqs": 16}
        print(dict(run_fuzz(given.model, engine, given.requests, at_once=8, seed=given.seed)))
        return
    how = {"clients": given.clients, "seconds": given.seconds, "max_tokens": given.max_tokens, "seed": given.seed}
    print(run_load(given.model, ["--num-blocks", "1024"], leaving=0.3, patience=given.seconds / 4, **how))


if __name__ == "__main__":
    sys.exit(main())
