# SPDX-License-Identifier: Apache-2.0
"""A batch file on its way through an engine: what to run next, and what becomes of the results.

A BatchJob runs nothing itself. Whoever has an engine takes prompts from `next`, in an order in which each prefix that
lines share is computed once, and gives their finished outputs to `take`:

    with open("in.jsonl", "rb") as source, BatchJob(loaded, source, ResultsFile("out.jsonl"), ["my-model"]) as job:
        while (prompt := job.next(block=nothing_is_running)) is not None:
            engine.add_request(some_id, prompt.token_ids, prompt.params, priority=prompt.priority,
                               cache_salt=prompt.cache_salt, index=prompt.index, shared_prefix=prompt.shared_prefix)
            # ... and when its last output is there (prompt.params ask for one):
            job.take(prompt, output)
            job.sync()   # its line is on the disk

`fastserve.run_batch` does this on an LLM, `fastserve.server.batch_run` on an engine that answers clients too. Calls
must not overlap, but may come from different threads. A prompt that the engine refuses goes to `fail`. When the job
ends early, `prefixes()` go to `Engine.end_batch`.

Memory is bounded by a window of lines (WINDOW_TOKENS), not by the file: two windows are there at a time, the one that
runs and the one that is read ahead by a thread. Only token ids are kept; a line's text is read again for its answer.
About 80 bytes per line of the whole file remember its custom_id, to find duplicates.
"""

from __future__ import annotations

import os
import time
import uuid
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from fastserve.batch_file import (
    ID_PREFIX,
    MAX_LINE_BYTES,
    BadLine,
    RawLine,
    ResultsFile,
    id_hash,
    parse_line,
    read_lines,
    result_line,
)
from fastserve.config import RequestOutputKind, SamplingParams
from fastserve.engine.load import LoadedEngine
from fastserve.engine.prefix_plan import PrefixPlan, plan_prefixes, unplanned
from fastserve.errors import FastserveError, InvalidRequest
from fastserve.outputs import RequestOutput
from fastserve.request import SharedPrefix
from fastserve.server.answers import whole_answer
from fastserve.server.errors import ApiError, as_api_error
from fastserve.server.jobs import make_job
from fastserve.server.protocol import parse_request
from fastserve.server.tool_calls import format_of_template

WINDOW_TOKENS = 16 * 2**20
WINDOW_LINES = 2**17


@dataclass(eq=False, slots=True)
class _Line:
    """A line with its prompts on their way."""

    raw: RawLine  # without its text
    custom_id: str
    num_prompts: int
    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    over: bool = False  # its result is written


@dataclass(eq=False, slots=True)
class BatchPrompt:
    """One prompt of a line, ready to run. `params` ask for one output, the last."""

    token_ids: Sequence[int]
    params: SamplingParams
    priority: int
    cache_salt: str
    index: int | str  # of which the seed is made if the line brings none: the same in every run of the file
    shared_prefix: SharedPrefix | None
    line: _Line
    place: int  # among the prompts of its line


@dataclass(frozen=True)
class BatchCounts:
    """Lines that have a result, and tokens of this run."""

    total: int  # read so far, those of an earlier run included
    completed: int
    failed: int
    prompt_tokens: int
    cached_tokens: int  # of these, not computed but found in the cache
    output_tokens: int
    planned_tokens: int  # of the prompts whose shared prefixes were analysed so far
    shareable_tokens: int  # of these, what no order and no cache, however large, would have to compute


@dataclass(eq=False)
class _Window:
    """Lines that were read together."""

    prompts: list[BatchPrompt]
    failures: list[tuple[RawLine, str | None, FastserveError | ApiError]]
    num_lines: int
    plan: PrefixPlan


class BatchJob:
    """See the module. `source` is a regular file, opened to read bytes; `results` is closed with the job.

    `model_names` are what the field `model` of a body may be. `tool_format` is that of `fastserve serve`. `id_prefix`
    begins the ids of results and, unless it is the usual one, makes the seeds of lines without a seed those of this
    batch alone. Raises FastserveError, from `next`, for what is wrong with the file as a whole.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        source: BinaryIO,
        results: ResultsFile,
        model_names: Sequence[str],
        *,
        tool_format: str | None = None,
        id_prefix: str = ID_PREFIX,
        max_line_bytes: int = MAX_LINE_BYTES,
        window_tokens: int = WINDOW_TOKENS,
    ) -> None:
        if not source.seekable():
            raise FastserveError("a batch must be a file that can be read twice; save the pipe to a file first")
        template = None if loaded.tokenizer is None else loaded.tokenizer.chat_template
        self._loaded = loaded
        self._source = source
        self._results = results
        self._models = list(model_names)
        self._tool_format = tool_format or format_of_template(template)
        self._id_prefix = id_prefix
        self._max_line_bytes = max_line_bytes
        self._window_tokens = window_tokens
        self._lines = read_lines(source, max_line_bytes)
        self._seen: set[int] = set()  # custom_ids, only for the thread that reads
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fastserve-batch")
        self._coming: Future[_Window] | None = self._reader.submit(self._read_window)
        self._rest: deque[BatchPrompt] = deque()
        self._plans: deque[PrefixPlan] = deque(maxlen=3)  # of which prompts may still run
        done = results.done
        self._total, self._completed, self._failed = 0, done.num_done - done.num_failed, done.num_failed
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._planned_tokens = self._shareable_tokens = 0

    # -- what to run ----------------------------------------------------------------------------------------------

    def next(self, *, block: bool = True) -> BatchPrompt | None:
        """The next prompt. None: there are no more; or, unless `block`, none is ready yet."""
        while not self._rest:
            if self._coming is None or not (block or self._coming.done()):
                return None
            window = self._coming.result()
            self._total += window.num_lines
            self._coming = self._reader.submit(self._read_window) if window.num_lines else None
            for raw, custom_id, error in window.failures:
                self._write_failure(raw, custom_id, error)
            self._plans.append(window.plan)
            self._planned_tokens += window.plan.num_tokens
            self._shareable_tokens += window.plan.num_tokens - window.plan.min_computed
            self._rest.extend(window.prompts[place] for place in window.plan.order)
        return self._rest.popleft()

    @property
    def has_more(self) -> bool:
        """Whether `next` may still give something."""
        return bool(self._rest) or self._coming is not None

    # -- what became of it ----------------------------------------------------------------------------------------

    def take(self, prompt: BatchPrompt, output: RequestOutput) -> None:
        """The last output of a prompt. With the last prompt of its line the line's result is ready to be written."""
        line = prompt.line
        self._prompt_tokens += len(output.prompt_token_ids)
        self._cached_tokens += output.num_cached_tokens or 0
        self._output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        if line.over:
            return
        if output.error is not None or any(one.finish_reason in (None, "abort", "error") for one in output.outputs):
            cause = "it was aborted" if output.error is None else str(output.error)
            self.fail(prompt, FastserveError(f"the request failed: {cause:.300}"))
            return
        line.outputs[prompt.place] = output
        if len(line.outputs) < line.num_prompts:
            return
        request = parse_request(*self._read_again(line.raw))
        outputs = [line.outputs[place] for place in range(line.num_prompts)]
        model = request.model or self._models[0]
        answer = whole_answer(request, outputs, model, self._loaded.tokenizer, self._tool_format)
        self._write(line.raw, line.custom_id, 200, answer.id, answer.model_dump(mode="json"), None)
        self._end(line)

    def fail(self, prompt: BatchPrompt, error: Exception) -> None:
        """A prompt that cannot run: its line has failed."""
        if not prompt.line.over:
            self._write_failure(prompt.line.raw, prompt.line.custom_id, error)
            self._end(prompt.line)

    def sync(self) -> None:
        """All results so far are on the disk when this returns."""
        self._results.sync()

    @property
    def counts(self) -> BatchCounts:
        return BatchCounts(
            self._total,
            self._completed,
            self._failed,
            self._prompt_tokens,
            self._cached_tokens,
            self._output_tokens,
            self._planned_tokens,
            self._shareable_tokens,
        )

    def prefixes(self) -> Iterator[SharedPrefix]:
        """The prefixes of all prompts that may still run: for `Engine.end_batch` when the job ends early."""
        return (prefix for plan in self._plans for prefix in plan.prefixes)

    def close(self) -> None:
        """Syncs and closes the results. Prompts that run come to nothing; a job that resumes runs them again."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        try:
            self._results.sync()
        finally:
            self._results.close()

    def __enter__(self) -> BatchJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading, in a thread of its own --------------------------------------------------------------------------

    def _read_window(self) -> _Window:
        """The next lines up to the size of a window; none: the file has ended."""
        window = _Window([], [], 0, unplanned(0))
        num_tokens = 0
        for raw in self._lines:
            window.num_lines += 1
            custom_id: str | None = None
            try:
                try:
                    parsed = parse_line(raw.text, self._max_line_bytes)
                finally:
                    raw = replace(raw, text=None)
                custom_id = parsed.custom_id
                if (digest := id_hash(custom_id)) in self._seen:
                    raise BadLine(
                        "duplicate_custom_id", f"an earlier line has the custom_id {custom_id!r:.100}", custom_id
                    )
                self._seen.add(digest)
                if not self._results.done.has(raw.number, custom_id):
                    prompts = self._prompts_of(raw, custom_id, parsed.url, parsed.body)
                    window.prompts += prompts
                    num_tokens += sum(len(one.token_ids) for one in prompts)
            except (FastserveError, ApiError) as error:
                custom_id = error.custom_id if isinstance(error, BadLine) else custom_id
                if not self._results.done.has(raw.number, custom_id):
                    window.failures.append((raw, custom_id, error))
            if num_tokens >= self._window_tokens or window.num_lines >= WINDOW_LINES:
                break
        self._plan(window)
        return window

    def _prompts_of(self, raw: RawLine, custom_id: str, url: str, body: dict[str, Any]) -> list[BatchPrompt]:
        request = parse_request(url, body)
        if request.stream:
            raise InvalidRequest("stream is not supported in a batch; leave it out")
        if request.model is not None and request.model not in self._models:
            known = ", ".join(self._models)
            raise ApiError(
                404,
                f"the model {request.model[:200]!r} does not exist here; this batch runs {known}",
                param="model",
                code="model_not_found",
            )
        job = make_job(self._loaded, request, time.monotonic(), self._tool_format)
        self._loaded.check_structure(job.params)
        params = replace(job.params, output_kind=RequestOutputKind.FINAL_ONLY)
        line = _Line(raw, custom_id, len(job.prompts))
        index: int | str = raw.index if self._id_prefix == ID_PREFIX else f"{self._id_prefix}{raw.index}"
        return [
            BatchPrompt(
                array("i", prompt.token_ids),
                params,
                request.priority,
                request.cache_salt or "",
                index if place == 0 else f"{index}.{place}",
                None,
                line,
                place,
            )
            for place, prompt in enumerate(job.prompts)
        ]

    def _plan(self, window: _Window) -> None:
        prompts, config = window.prompts, self._loaded.config
        if len(prompts) < 2 or config.batch_order == "arrival" or not config.enable_prefix_caching:
            window.plan = unplanned(len(prompts))
            return
        window.plan = plan_prefixes(
            [one.token_ids for one in prompts],
            [one.params for one in prompts],
            config.block_size,
            [one.cache_salt for one in prompts],
            [one.priority for one in prompts] if config.policy == "priority" else None,
        )
        for prompt, prefix in zip(prompts, window.plan.prefix_of, strict=True):
            prompt.shared_prefix = prefix

    # -- writing --------------------------------------------------------------------------------------------------

    def _end(self, line: _Line) -> None:
        line.over = True
        line.outputs.clear()

    def _read_again(self, raw: RawLine) -> tuple[str, dict[str, Any]]:
        text = os.pread(self._source.fileno(), self._max_line_bytes + 1, raw.offset).split(b"\n", 1)[0]
        parsed = parse_line(text, self._max_line_bytes)
        return parsed.url, parsed.body

    def _write_failure(self, raw: RawLine, custom_id: str | None, error: Exception) -> None:
        if isinstance(error, BadLine):
            told: dict[str, Any] = {"code": error.code, "message": str(error), "param": None, "line": raw.number}
            self._write(raw, custom_id, None, "", None, told)
            return
        known = as_api_error(error)
        told = {"code": str(known.code), "message": known.message, "param": known.param, "line": raw.number}
        self._write(raw, custom_id, known.status, uuid.uuid4().hex, known.body(), told)

    def _write(
        self,
        raw: RawLine,
        custom_id: str | None,
        status: int | None,
        request_id: str,
        body: dict[str, Any] | None,
        error: dict[str, Any] | None,
    ) -> None:
        self._completed += error is None
        self._failed += error is not None
        self._results.add(
            result_line(
                raw.number,
                custom_id,
                status=status,
                request_id=request_id,
                body=body,
                error=error,
                id_prefix=self._id_prefix,
            )
        )
