# SPDX-License-Identifier: Apache-2.0
"""`fastserve bench serve`: load on any server with OpenAI's API, measured at the client.

Flags, JSON keys and definitions are those of `vllm bench serve`, so that one client measures all servers alike. Imports
nothing heavy at the top: the command line reads this file for its flags.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.errors import FastserveError

if TYPE_CHECKING:
    import httpx

    from fastserve.bench.client import Outcome, Target
    from fastserve.bench.workload import Ask, Codec

DATASETS = ("random", "sharegpt", "custom", "prefix_repetition")


def _rate(text: str) -> float:
    rate = float(text)
    if not rate > 0:
        raise ValueError
    return rate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    backends = ("openai", "openai-chat", "vllm")
    server.add_argument("--backend", choices=backends, default="openai", help="the API to use (default: openai)")
    server.add_argument("--base-url", help="such as http://127.0.0.1:8000, instead of --host and --port")
    server.add_argument("--host", default="127.0.0.1")
    server.add_argument("--port", type=int, default=8000)
    server.add_argument("--endpoint", help="path (default: /v1/completions, or /v1/chat/completions)")
    server.add_argument("--model", help="name in requests (default: the first of the server's /v1/models)")
    server.add_argument("--tokenizer", help="folder of a tokenizer (default: the server's own, at /tokenize)")
    server.add_argument("--header", action="append", default=[], help="KEY=VALUE, sent with each request; may repeat")
    server.add_argument(
        "--ready-check-timeout-sec", type=float, default=600, help="wait this long for the server (default: 600)"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--num-prompts", type=int, default=1000, help="requests (default: 1000)")
    load.add_argument("--request-rate", type=_rate, default=float("inf"), help="per second (default: inf, all at once)")
    load.add_argument(
        "--burstiness", type=_rate, default=1.0, help="shape of the gamma-distributed gaps; 1 = Poisson (default: 1)"
    )
    load.add_argument("--max-concurrency", type=int, help="most requests that are open at a time")
    load.add_argument("--ramp-up-strategy", choices=("linear", "exponential"), help="let the rate change")
    load.add_argument("--ramp-up-start-rps", type=_rate, help="the first rate")
    load.add_argument("--ramp-up-end-rps", type=_rate, help="the last rate")
    load.add_argument("--num-warmups", type=int, default=0, help="requests before that are not measured (default: 0)")
    load.add_argument("--seed", type=int, default=0)
    load.add_argument("--ignore-eos", action="store_true", help="answers have their full length (not all servers can)")
    load.add_argument("--temperature", type=float, help="0 = greedy (default: the server's)")
    load.add_argument("--top-p", type=float)
    load.add_argument("--top-k", type=int)
    load.add_argument("--extra-body", type=json.loads, default={}, help="JSON object of more fields of each request")
    data = parser.add_argument_group("prompts")
    data.add_argument("--dataset-name", choices=DATASETS, default="random", help="(default: random)")
    data.add_argument("--dataset-path", help="file of sharegpt (JSON) or custom (JSON lines with a prompt)")
    data.add_argument("--random-input-len", type=int, default=1024, help="(default: 1024)")
    data.add_argument("--random-output-len", type=int, default=128, help="(default: 128)")
    data.add_argument("--random-range-ratio", type=float, default=0.0, help="lengths vary by this share (default: 0)")
    data.add_argument("--random-prefix-len", type=int, default=0, help="tokens shared by all prompts (default: 0)")
    data.add_argument("--sharegpt-output-len", type=int, help="(default: the length of the answer in the data)")
    data.add_argument("--custom-output-len", type=int, default=256, help="(default: 256)")
    data.add_argument("--prefix-repetition-num-prefixes", type=int, default=10, help="(default: 10)")
    data.add_argument("--prefix-repetition-prefix-len", type=int, default=256, help="(default: 256)")
    data.add_argument("--prefix-repetition-suffix-len", type=int, default=256, help="(default: 256)")
    data.add_argument("--prefix-repetition-output-len", type=int, default=128, help="(default: 128)")
    report = parser.add_argument_group("report")
    report.add_argument("--goodput", nargs="+", default=[], help="objectives in ms: ttft:200 tpot:50 e2el:2000")
    report.add_argument("--percentile-metrics", default="ttft,tpot,itl", help="(default: ttft,tpot,itl; also e2el)")
    report.add_argument("--metric-percentiles", default="99", help="such as 50,90,99 (default: 99)")
    report.add_argument("--save-result", action="store_true", help="write a JSON file")
    report.add_argument("--save-detailed", action="store_true", help="with every request in it")
    report.add_argument("--result-dir", help="folder of the file (default: here)")
    report.add_argument("--result-filename", help="(default: made of backend, rate, model and time)")
    report.add_argument("--metadata", nargs="*", default=[], help="KEY=VALUE, put into the file")
    report.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Returns 0, or 1 if a request failed."""
    try:
        from fastserve.bench.report import GOODPUT_METRICS, METRICS, console, detail, result
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        raise FastserveError("fastserve bench serve needs httpx: pip install 'fastserve[bench]'") from None

    slos = _slos(arguments.goodput, GOODPUT_METRICS)
    metrics = [name for name in arguments.percentile_metrics.split(",") if name]
    for name in metrics:
        if name not in METRICS:
            raise FastserveError(f"--percentile-metrics has {name!r}; metrics are {', '.join(METRICS)}")
    percentiles = _percentiles(arguments.metric_percentiles)
    for name in ("num_prompts", "max_concurrency"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise FastserveError(f"--{name.replace('_', '-')} must be at least 1")
    metadata = {**_pairs(arguments.metadata, "--metadata")}
    model, outcomes, duration = asyncio.run(_measure(arguments))
    figures = result(outcomes, duration, slos, percentiles)
    print(console(figures, metrics, percentiles))
    for problem in sorted({one.error for one in outcomes if one.error})[:5]:
        print(f"failed: {problem}", file=sys.stderr)
    if arguments.save_result:
        when = time.strftime("%Y%m%d-%H%M%S")
        about = {
            "date": when,
            "backend": arguments.backend,
            "endpoint_type": arguments.backend,
            "model_id": model,
            "tokenizer_id": arguments.tokenizer or model,
            "num_prompts": len(outcomes),
            "request_rate": "inf" if arguments.request_rate == float("inf") else arguments.request_rate,
            "burstiness": arguments.burstiness,
            "max_concurrency": arguments.max_concurrency,
        }
        whole = {**about, **metadata, **figures, **(detail(outcomes) if arguments.save_detailed else {})}
        name = f"{arguments.backend}-{about['request_rate']}qps-{model.replace('/', '-')}-{when}.json"
        path = Path(arguments.result_dir or ".") / (arguments.result_filename or name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole) + "\n", encoding="utf-8")
        print(path)
    return int(any(one.error for one in outcomes))


async def _measure(arguments: argparse.Namespace) -> tuple[str, list[Outcome], float]:
    """The model's name, the outcomes in the order of arrival, and the seconds that they took."""
    from tqdm import tqdm

    from fastserve.bench.client import ENDPOINTS, Target, open_client, send
    from fastserve.bench.workload import arrivals

    base = (arguments.base_url or f"http://{arguments.host}:{arguments.port}").rstrip("/")
    fields = {name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k")}
    fields = {name: value for name, value in fields.items() if value is not None}
    if arguments.ignore_eos:
        fields["ignore_eos"] = True
    headers = _pairs(arguments.header, "--header")
    if not isinstance(arguments.extra_body, dict):
        raise FastserveError("--extra-body must be a JSON object")
    async with open_client() as client:
        model = await _ready(client, base, headers, arguments.ready_check_timeout_sec)
        model = arguments.model or model
        url = base + (arguments.endpoint or ENDPOINTS[arguments.backend])
        target = Target(url, arguments.backend, model, headers, {**fields, **arguments.extra_body})
        asks = await _asks(arguments, _codec(client, base, target, arguments.tokenizer))
        if not asks:
            raise FastserveError("the dataset has no prompt that can be used")
        for ask in asks[: max(1, arguments.num_warmups)]:  # at least one, to see that the server understands
            outcome = await send(client, target, ask.prompt, ask.num_input, ask.num_output)
            if outcome.error:
                raise FastserveError(f"a first request failed: {outcome.error}")
        ramp = None
        if arguments.ramp_up_strategy:
            if not (arguments.ramp_up_start_rps and arguments.ramp_up_end_rps):
                raise FastserveError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
            ramp = (arguments.ramp_up_strategy, arguments.ramp_up_start_rps, arguments.ramp_up_end_rps)
        times = arrivals(len(asks), arguments.request_rate, arguments.burstiness, arguments.seed, ramp)
        places = asyncio.Semaphore(arguments.max_concurrency or len(asks))
        begin = time.perf_counter()
        with tqdm(total=len(asks), unit="request", disable=True if arguments.disable_tqdm else None) as bar:

            async def one(ask: Ask, due: float) -> Outcome:
                await asyncio.sleep(begin + due - time.perf_counter())
                async with places:
                    queue_time = time.perf_counter() - begin - due
                    outcome = await send(client, target, ask.prompt, ask.num_input, ask.num_output)
                outcome.queue_time = queue_time
                bar.update()
                return outcome

            outcomes = await asyncio.gather(*(one(ask, due) for ask, due in zip(asks, times, strict=True)))
        return model, outcomes, time.perf_counter() - begin


async def _ready(client: httpx.AsyncClient, base: str, headers: dict[str, str], timeout_s: float) -> str:
    """Waits until the server lists its models; the name of the first."""
    import httpx

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            answer = await client.get(base + "/v1/models", headers=headers, timeout=10)
            if answer.status_code == 200:
                return str(answer.json()["data"][0]["id"])
            problem = f"/v1/models answers HTTP {answer.status_code}: {answer.text[:200]}"
            if answer.status_code in (401, 403, 404):
                raise FastserveError(f"{base}{problem}")
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
        if time.monotonic() >= deadline:
            raise FastserveError(f"the server at {base} is not ready after {timeout_s:g} s ({problem})")
        await asyncio.sleep(0.5)


def _codec(client: httpx.AsyncClient, base: str, target: Target, folder: str | None) -> Codec:
    from fastserve.bench.workload import Codec

    if folder is not None:
        from fastserve.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_dir(folder)

        async def encode_here(text: str) -> list[int]:
            return tokenizer.encode(text, False)

        async def decode_here(ids: list[int]) -> str:
            return tokenizer.decode(ids, False)

        return Codec(encode_here, decode_here)

    async def ask(path: str, field: str, body: dict[str, Any]) -> Any:
        answer = await client.post(base + path, json={"model": target.model, **body}, headers=target.headers)
        if answer.status_code != 200:
            raise FastserveError(f"the server has no {path} (HTTP {answer.status_code}); give a --tokenizer folder")
        return answer.json()[field]

    async def encode(text: str) -> list[int]:
        return list(await ask("/tokenize", "tokens", {"prompt": text, "add_special_tokens": False}))

    async def decode(ids: list[int]) -> str:
        return str(await ask("/detokenize", "prompt", {"tokens": ids}))

    return Codec(encode, decode)


async def _asks(arguments: argparse.Namespace, codec: Codec) -> list[Ask]:
    from fastserve.bench import workload

    num, seed = arguments.num_prompts, arguments.seed
    if arguments.dataset_name == "random":
        return await workload.random_asks(
            codec,
            num,
            num_input=arguments.random_input_len,
            num_output=arguments.random_output_len,
            range_ratio=arguments.random_range_ratio,
            num_prefix=arguments.random_prefix_len,
            seed=seed,
        )
    if arguments.dataset_name == "prefix_repetition":
        return await workload.prefix_repetition_asks(
            codec,
            num,
            num_prefixes=arguments.prefix_repetition_num_prefixes,
            prefix_len=arguments.prefix_repetition_prefix_len,
            suffix_len=arguments.prefix_repetition_suffix_len,
            num_output=arguments.prefix_repetition_output_len,
            seed=seed,
        )
    if not arguments.dataset_path:
        raise FastserveError(f"--dataset-name {arguments.dataset_name} needs --dataset-path")
    path = Path(arguments.dataset_path)
    if arguments.dataset_name == "sharegpt":
        return await workload.sharegpt_asks(codec, num, path, arguments.sharegpt_output_len, seed)
    return await workload.custom_asks(codec, num, path, arguments.custom_output_len)


def _slos(given: list[str], known: tuple[str, ...]) -> dict[str, float]:
    slos = {}
    for one in given:
        name, _, limit = one.partition(":")
        try:
            slos[name] = float(limit)
        except ValueError:
            raise FastserveError(f"--goodput has {one!r}; objectives look like ttft:200") from None
        if name not in known or slos[name] < 0:
            raise FastserveError(f"--goodput has {one!r}; objectives are of {', '.join(known)}, in ms")
    return slos


def _percentiles(text: str) -> list[float]:
    try:
        given = [float(one) for one in text.split(",") if one]
    except ValueError:
        given = [-1.0]
    if any(not 0 <= one <= 100 for one in given):
        raise FastserveError(f"--metric-percentiles={text!r}: must be numbers from 0 to 100, separated by commas")
    return given


def _pairs(given: list[str], flag: str) -> dict[str, str]:
    pairs = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            raise FastserveError(f"{flag} has {one!r}; it must be KEY=VALUE")
        pairs[name] = value
    return pairs
