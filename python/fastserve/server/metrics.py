# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics, with vLLM's names and labels under `fastserve:`.

All intervals are taken from one monotonic clock. Times to first token count from the arrival of the body, before
tokenising; a preemption during decoding counts into the gap between tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fastserve.async_llm import AsyncLLM
from fastserve.config import SamplingParams
from fastserve.engine.scheduler import StepPlan
from fastserve.outputs import RequestMetrics

PREFIX = "fastserve:"
# From a step of a tiny model on a good machine to a request that takes minutes on a laptop.
SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 1000,
)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics:
    """The counters of one server. `vllm_aliases`: every metric also appears under vLLM's own prefix. `seconds`: bounds
    of the histograms of times."""

    def __init__(
        self,
        llm: AsyncLLM,
        model_name: str,
        num_open: Callable[[], int],
        vllm_aliases: bool = False,
        seconds: Sequence[float] = (),
    ) -> None:
        times = tuple(sorted(set(seconds))) or SECONDS
        self.registry = CollectorRegistry()
        self._vllm_aliases = vllm_aliases
        self._labels = {"model_name": model_name, "engine": "0"}
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token", times)
        self.inter_token_latency = self._histogram("inter_token_latency_seconds", "Gap between outputs", times)
        self._time_per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean gap between a request's tokens", times
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token", times)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival at the engine to first step", times)
        self._prefill = self._histogram("request_prefill_time_seconds", "First step to first token", times)
        self._decode = self._histogram("request_decode_time_seconds", "First token to last token", times)
        self._inference = self._histogram("request_inference_time_seconds", "First step to last token", times)
        self._request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request", TOKENS)
        self._request_generation = self._histogram("request_generation_tokens", "Output tokens of a request", TOKENS)
        self._request_max_generation = self._histogram(
            "request_max_num_generation_tokens", "Output tokens of the longest of a request's completions", TOKENS
        )
        self._request_computed = self._histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens of a request that were not in the prefix cache", TOKENS
        )
        self._request_preemptions = self._histogram(
            "request_num_preemptions", "How often a request lost its blocks", (0, 1, 2, 5, 10, 20, 50)
        )
        self._request_n = self._histogram("request_params_n", "The parameter n", (1, 2, 5, 10, 20))
        self._request_max_tokens = self._histogram("request_params_max_tokens", "The parameter max_tokens", TOKENS)
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens of a step", STEP_TOKENS)
        self._step_seconds = self._histogram("iteration_seconds", "Duration of a step", times)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Of these, tokens served from the prefix cache")
        self._generation_tokens = self._counter("generation_tokens", "Output tokens")
        self._kinds = Counter(
            PREFIX + "iteration_tokens_by_kind",
            "Tokens of steps: decode (one per running answer) and prefill (prompts, and what is computed again)",
            (*self._labels, "kind"),
            registry=self.registry,
        )
        self._success = Counter(
            PREFIX + "request_success",
            "Requests by how they ended",
            (*self._labels, "finished_reason"),
            registry=self.registry,
        )
        self._reasons = {
            reason: self._success.labels(**self._labels, finished_reason=reason)
            for reason in ("stop", "length", "abort", "error")
        }
        self._decode_kind = self._kinds.labels(**self._labels, kind="decode")
        self._prefill_kind = self._kinds.labels(**self._labels, kind="prefill")
        self.refused = self._counter("requests_refused", "Requests refused because the queue was full")
        self._http_requests = Counter(
            "http_requests", "HTTP requests", ("handler", "method", "status"), registry=self.registry
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "Seconds of HTTP requests, to the end of their answers",
            ("handler", "method"),
            buckets=times,
            registry=self.registry,
        )
        self.num_prefill_tokens = self.num_generated_tokens = 0
        self.registry.register(_EngineState(llm, self._labels, num_open, lambda: self.num_prefill_tokens))
        llm.loaded.engine.on_step = self._step

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(PREFIX + name, text, tuple(self._labels), buckets=buckets, registry=self.registry)
        return metric.labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, tuple(self._labels), registry=self.registry).labels(**self._labels)

    def _step(self, plan: StepPlan, seconds: float) -> None:
        """Called by the engine thread after each step that computed something."""
        decode = sum(item.num_new_tokens for item in plan.items if item.start >= item.request.num_prompt_tokens)
        self._step_tokens.observe(plan.num_tokens)
        self._step_seconds.observe(seconds)
        self._decode_kind.inc(decode)
        self._prefill_kind.inc(plan.num_tokens - decode)
        self.num_prefill_tokens += plan.num_tokens - decode
        num_generated = sum(item.sample for item in plan.items)
        self.num_generated_tokens += num_generated
        self._generation_tokens.inc(num_generated)

    def http_request(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Takes one HTTP request; `handler` is the declared path of its endpoint."""
        self._http_requests.labels(handler, method, f"{status // 100}xx").inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    def request_finished(
        self,
        reason: str,
        params: SamplingParams,
        num_prompt: int,
        num_cached: int,
        num_outputs: Sequence[int],
        total_s: float,
        first_token_s: float | None,
        times: RequestMetrics | None,
        now: float,
    ) -> None:
        """Takes one prompt's account; `num_outputs` are the tokens of its completions, times are monotonic seconds,
        None where it did not get that far."""
        num_output = sum(num_outputs)
        self._reasons.get(reason, self._reasons["error"]).inc()
        self._prompt_tokens.inc(num_prompt)
        self._cached_tokens.inc(num_cached)
        self._request_prompt.observe(num_prompt)
        self._request_generation.observe(num_output)
        self._request_max_generation.observe(max(num_outputs, default=0))
        self._request_n.observe(params.n)
        if params.max_tokens is not None:
            self._request_max_tokens.observe(params.max_tokens)
        if times is not None:
            self._request_preemptions.observe(times.num_preemptions)
            if times.first_scheduled_s is not None:
                self._request_computed.observe(num_prompt - num_cached)
        if reason in ("abort", "error"):
            return  # their times say when somebody gave up
        self._e2e.observe(total_s)
        if times is None or times.first_scheduled_s is None or first_token_s is None:
            return
        last_s = times.last_token_s or now
        self._queue.observe(max(0.0, times.first_scheduled_s - times.arrival_s))
        self._prefill.observe(max(0.0, first_token_s - times.first_scheduled_s))
        self._decode.observe(max(0.0, last_s - first_token_s))
        self._inference.observe(max(0.0, last_s - times.first_scheduled_s))
        if num_output > params.n:
            self._time_per_token.observe(max(0.0, last_s - first_token_s) / (num_output / params.n - 1))

    def exposition(self) -> bytes:
        """The text that /metrics answers."""
        text = generate_latest(self.registry)
        if self._vllm_aliases:
            text += text.replace(PREFIX.encode(), b"vllm:")
        return text


Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)


class _EngineState(Collector):
    """What the engine knows itself, read when it is asked for."""

    def __init__(
        self, llm: AsyncLLM, labels: dict[str, str], num_open: Callable[[], int], num_prefill: Callable[[], int]
    ) -> None:
        self._llm = llm
        self._labels = labels
        self._num_open = num_open
        self._num_prefill = num_prefill

    def describe(self) -> list[GaugeMetricFamily]:
        return []  # asks nothing of the engine when it is registered

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        loaded = self._llm.loaded
        stats = loaded.engine.stats
        deferred = max(0, self._num_open() - stats.num_running - stats.num_waiting)
        gauges = {
            "num_requests_running": ("Sequences in steps", stats.num_running),
            "num_requests_waiting": ("Sequences that wait", stats.num_waiting + deferred),
            "kv_cache_usage_perc": ("Share of KV blocks in use, 0 to 1", stats.num_used_blocks / stats.num_blocks),
            "kv_cache_used_blocks": ("KV blocks in use", stats.num_used_blocks),
            "kv_cache_blocks": ("KV blocks", stats.num_blocks),
        }
        for name, (text, value) in gauges.items():
            yield self._add(GaugeMetricFamily(PREFIX + name, text, labels=list(self._labels)), value)
        waiting = GaugeMetricFamily(
            PREFIX + "num_requests_waiting_by_reason",
            "capacity: no place in a step or no memory; deferred: being tokenised or handed over",
            labels=[*self._labels, "reason"],
        )
        waiting.add_metric([*self._labels.values(), "capacity"], stats.num_waiting)
        waiting.add_metric([*self._labels.values(), "deferred"], deferred)
        yield waiting
        num_looked_up = self._num_prefill() + stats.num_cached_tokens
        counters = {
            "prefix_cache_queries": ("Tokens of prompts, found or computed", num_looked_up),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache", stats.num_cached_tokens),
            "num_preemptions": ("Sequences that lost their blocks and were computed again", stats.num_preemptions),
            "num_steps": ("Steps", stats.num_steps),
        }
        for name, (text, value) in counters.items():
            yield self._add(CounterMetricFamily(PREFIX + name, text, labels=list(self._labels)), value)
        config = loaded.config
        info = GaugeMetricFamily(
            PREFIX + "cache_config_info",
            "1; the cache's configuration is in the labels",
            labels=["engine", "block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype"],
        )
        caching = str(config.enable_prefix_caching)
        info.add_metric(["0", str(config.block_size), str(stats.num_blocks), caching, config.kv_cache_dtype], 1)
        yield info

    def _add(self, family: Family, value: float) -> Family:
        family.add_metric(list(self._labels.values()), value)
        return family
