# SPDX-License-Identifier: Apache-2.0
"""`fastserve run-batch`: a batch file through an engine of its own."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fastserve.batch_file import ResultsFile, count_lines
from fastserve.batch_job import BatchCounts, BatchJob, BatchPrompt
from fastserve.errors import FastserveError
from fastserve.llm import LLM


def run_batch(llm: LLM, job: BatchJob, progress: Callable[[BatchCounts], None] | None = None) -> BatchCounts:
    """Runs a job to its end; every result is on the disk before the next step of the engine.

    However it ends, nothing of it stays in the engine.
    """
    engine = llm.loaded.engine
    limit = min(llm.loaded.config.max_num_seqs, llm.loaded.config.max_num_queued_requests)
    running: dict[str, BatchPrompt] = {}
    num_added = 0
    waiting: BatchPrompt | None = None  # taken from the job, but there was no place for it
    try:
        while True:
            while waiting or (waiting := job.next(block=not running)):
                if running and engine.num_waiting + waiting.params.n > limit:
                    break
                request_id = f"batch-{num_added}"
                num_added += 1
                try:
                    engine.add_request(
                        request_id,
                        waiting.token_ids,
                        waiting.params,
                        priority=waiting.priority,
                        cache_salt=waiting.cache_salt,
                        index=waiting.index,
                        shared_prefix=waiting.shared_prefix,
                    )
                    running[request_id] = waiting
                except FastserveError as error:
                    job.fail(waiting, error)
                waiting = None
            if running:
                for output in engine.step():
                    if output.request_id in running:
                        job.take(running.pop(output.request_id), output)
            job.sync()
            if progress is not None:
                progress(job.counts)
            if not running and waiting is None and not job.has_more:
                return job.counts
    finally:
        for request_id in running:
            engine.discard(request_id)
        engine.end_batch(job.prefixes())


def run_batch_command(arguments: argparse.Namespace, open_llm: Callable[[], LLM]) -> int:
    """The exit status: 0 if every line was answered, 1 if one or more failed."""
    source_path, results_path = Path(arguments.input_file), Path(arguments.output_file)
    with open(source_path, "rb") as source:
        if not source.seekable():
            raise FastserveError(f"{source_path} is no regular file; save the requests to one first")
        if results_path.exists() and os.path.samefile(source_path, results_path):
            raise FastserveError(f"{source_path} cannot be both the batch and its results")
        results = ResultsFile(results_path, resume=arguments.resume, overwrite=arguments.overwrite)
        total = count_lines(source)
        with open_llm() as llm:
            names = arguments.served_model_name or [arguments.model, Path(arguments.model).resolve().name]
            job = BatchJob(llm.loaded, source, results, names, tool_format=arguments.tool_call_parser)
            with job, _Progress(total, job.counts) as progress:
                try:
                    counts = run_batch(llm, job, progress.show)
                except KeyboardInterrupt:
                    progress.close()
                    print(f"interrupted; go on with --resume ({results_path})", file=sys.stderr)
                    raise
    print(progress.summary(counts), file=sys.stderr)
    return 1 if counts.failed else 0


class _Progress:
    """A bar over lines with token rates, the time left, and the part of the prompts that was shared."""

    def __init__(self, total: int, counts: BatchCounts) -> None:
        from tqdm import tqdm

        done = counts.completed + counts.failed
        self._bar = tqdm(total=max(total, done), initial=done, desc="Batch", unit="line", disable=None, smoothing=0.1)
        self._begin = time.monotonic()

    def show(self, counts: BatchCounts) -> None:
        self._bar.set_postfix_str(self._rates(counts), refresh=False)
        self._bar.update(counts.completed + counts.failed - self._bar.n)

    def summary(self, counts: BatchCounts) -> str:
        return f"{counts.completed} lines answered, {counts.failed} failed; {self._rates(counts)}"

    def _rates(self, counts: BatchCounts) -> str:
        elapsed = max(time.monotonic() - self._begin, 1e-9)
        shared = counts.cached_tokens / max(counts.prompt_tokens, 1)
        best = f" (at best {counts.shareable_tokens / counts.planned_tokens:.0%})" if counts.planned_tokens else ""
        return (
            f"in {counts.prompt_tokens / elapsed:.0f} tok/s, out {counts.output_tokens / elapsed:.0f} tok/s, "
            f"{shared:.0%} of the prompts shared{best}"
        )

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
