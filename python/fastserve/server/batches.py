# SPDX-License-Identifier: Apache-2.0
"""Batches: files of requests that are answered beside the requests of clients, one batch after another.

Each is a `BatchJob`, as `fastserve run-batch` runs it: planned for shared prefixes, its answers appended to a file of
its own as soon as they are there. Whatever ends the process, the next one that uses the same folder goes on where this
one stopped: answers that were written are not computed again, none is lost.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fastserve.batch_file import (
    MAX_LINE_BYTES,
    BadLine,
    ResultsFile,
    id_hash,
    parse_line,
    read_lines,
    results_in_order,
)
from fastserve.batch_job import BatchCounts, BatchJob
from fastserve.errors import EngineDead, FastserveError
from fastserve.server.batch_run import run_batch
from fastserve.server.errors import ApiError
from fastserve.server.files import FileStore, write_whole
from fastserve.server.protocol import REQUESTS
from fastserve.server.service import Service

log = logging.getLogger("fastserve.server")

MAX_REQUESTS = 50_000  # of one batch
MAX_OPEN = 256  # batches that have not ended
MAX_ERRORS = 100  # that are told of a file which cannot be used
WINDOW_S = 24 * 3600
WINDOW_TOKENS = 2**20  # prompts that are read and planned together; nothing of them runs before
_ID = re.compile(r"batch_[0-9a-f]{32}")
ENDED = ("completed", "failed", "cancelled", "expired")


@dataclass
class Batch:
    """The API's description of a batch. Times are seconds since 1970, None = not yet."""

    id: str
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    completion_window: str = "24h"
    status: str = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: dict[str, Any] | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: dict[str, int] = field(default_factory=lambda: {"total": 0, "completed": 0, "failed": 0})
    metadata: dict[str, str] | None = None

    def body(self) -> dict[str, Any]:
        return {"object": "batch", **asdict(self)}


class Batches:
    """The batches of one folder, which belongs to one process at a time. Methods are for the event loop's thread.

    At most half of the engine's places are taken by batches: clients that wait for an answer find the others free.
    Raises FastserveError when another server uses the folder.
    """

    def __init__(self, service: Service, folder: Path) -> None:
        self.files = FileStore(folder / "files")
        self._folder = folder / "batches"
        self._folder.mkdir(exist_ok=True, mode=0o700)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise FastserveError(f"another server uses the folder {folder}; give each its own --batch-dir") from None
        self._service = service
        self._batches = {one.id: one for one in self._stored()}
        self._wake = asyncio.Event()
        self._wake.set()
        self._at_work: asyncio.Task[None] | None = None
        self._current: tuple[str, asyncio.Task[Any]] | None = None  # the batch that is being answered
        self._stopping = False

    def start(self) -> None:
        """Begins to work, with what an earlier process left."""
        self._at_work = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Ends the work; what is not answered yet is left to a later process."""
        self._stopping = True
        if self._at_work is not None:
            self._at_work.cancel()
            await asyncio.gather(self._at_work, return_exceptions=True)
        self._lock.close()

    def create(self, input_file_id: str, endpoint: str, metadata: dict[str, str] | None) -> Batch:
        """Raises ApiError when there is no such file or endpoint, or too much to do already."""
        if endpoint not in REQUESTS:
            raise ApiError(400, f"endpoint must be one of {', '.join(REQUESTS)}", param="endpoint")
        if self.files.about(input_file_id)["purpose"] != "batch":
            raise ApiError(400, "the file's purpose must be batch", param="input_file_id")
        if sum(one.status not in ENDED for one in self._batches.values()) >= MAX_OPEN:
            raise ApiError(429, f"{MAX_OPEN} batches are open, the most that are allowed", code="too_many_batches")
        now = int(time.time())
        batch = Batch(f"batch_{uuid.uuid4().hex}", endpoint, input_file_id, now, now + WINDOW_S, metadata=metadata)
        self._batches[batch.id] = batch
        self._save(batch)
        self._wake.set()
        return batch

    def get(self, batch_id: str) -> Batch:
        """Raises ApiError 404."""
        if batch_id not in self._batches:
            raise ApiError(404, f"there is no batch {batch_id[:100]!r}", param="batch_id", code="batch_not_found")
        return self._batches[batch_id]

    def all(self) -> list[Batch]:
        """Every batch, the newest first."""
        return sorted(self._batches.values(), key=lambda one: (-one.created_at, one.id))

    def cancel(self, batch_id: str) -> Batch:
        """Lets a batch end with the answers it has. Raises ApiError 404, and 400 when it has ended already."""
        batch = self.get(batch_id)
        if batch.status in ENDED:
            raise ApiError(400, f"the batch has ended already: it is {batch.status}", param="batch_id")
        if batch.status != "cancelling":
            batch.status, batch.cancelling_at = "cancelling", int(time.time())
            self._save(batch)
            if self._current is not None and self._current[0] == batch_id:
                self._current[1].cancel()
            self._wake.set()
        return batch

    # -- storage ----------------------------------------------------------------------------------------------------

    def _stored(self) -> Iterator[Batch]:
        for path in self._folder.glob("batch_*.json"):
            if _ID.fullmatch(path.stem):
                fields = json.loads(path.read_bytes())
                fields.pop("object")
                yield Batch(**fields)

    def _save(self, batch: Batch) -> None:
        write_whole(self._folder / f"{batch.id}.json", json.dumps(batch.body()).encode("ascii"))

    def _answers_path(self, batch: Batch) -> Path:
        return self._folder / f"{batch.id}.answers"

    # -- work -------------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            waiting = [one for one in reversed(self.all()) if one.status not in ENDED]
            if not waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            batch = waiting[0]
            try:
                await self._answer_all(batch)
            except EngineDead:
                return  # a later process goes on
            except Exception as error:
                log.exception("batch %s failed", batch.id)
                self._fail(batch, [_problem("internal_error", str(error)[:200], None)])
            log.info("batch %s %s: %s", batch.id, batch.status, batch.request_counts)

    async def _answer_all(self, batch: Batch) -> None:
        """From whatever state a batch is in to its end."""
        try:
            source = await asyncio.to_thread(self._input, batch)
        except ApiError as error:  # the file was deleted
            self._fail(batch, [_problem("file_not_found", error.message, None)])
            return
        with source:
            if batch.status == "validating":
                num_requests, problems = await asyncio.to_thread(check_requests, source, batch.endpoint)
                if problems:
                    self._fail(batch, problems)
                    return
                batch.request_counts["total"] = num_requests
                batch.status, batch.in_progress_at = "in_progress", int(time.time())
                self._save(batch)
            end = "cancelled" if batch.status == "cancelling" else "completed"
            if batch.status == "in_progress":
                end = await self._run(batch, source)
        await self._finish(batch, end)

    def _input(self, batch: Batch) -> BinaryIO:
        return self.files.path(batch.input_file_id).open("rb")

    async def _run(self, batch: Batch, source: BinaryIO) -> str:
        """Answers what has no answer yet; how that ended."""

        def progress(counts: BatchCounts) -> None:
            batch.request_counts |= {"completed": counts.completed, "failed": counts.failed}

        job = await asyncio.to_thread(self._job, batch, source)
        work = asyncio.ensure_future(run_batch(self._service, job, progress))
        self._current = batch.id, work
        try:
            await asyncio.wait_for(work, max(0.0, batch.expires_at - time.time()))
        except asyncio.TimeoutError:
            return "expired"
        except asyncio.CancelledError:
            if self._stopping:
                raise
            return "cancelled"
        finally:
            self._current = None
        return "completed"

    def _job(self, batch: Batch, source: BinaryIO) -> BatchJob:
        service = self._service
        return BatchJob(
            service.llm.loaded,
            source,
            ResultsFile(self._answers_path(batch), resume=True),
            service.model_names,
            tool_format=service.tool_format,
            id_prefix=f"batch_req_{batch.id.removeprefix('batch_')}_",
            window_tokens=WINDOW_TOKENS,
        )

    def _count(self, batch: Batch) -> None:
        results = ResultsFile(self._answers_path(batch), resume=True)
        results.close()
        num_failed = results.done.num_failed
        batch.request_counts |= {"completed": results.done.num_done - num_failed, "failed": num_failed}

    async def _finish(self, batch: Batch, end: str) -> None:
        """Makes files of the answers, in the order of the requests."""
        if end == "completed":
            batch.status, batch.finalizing_at = "finalizing", int(time.time())
        answers = self._answers_path(batch)
        await asyncio.to_thread(self._count, batch)
        for name in ("output", "error"):
            if batch.request_counts["completed" if name == "output" else "failed"] == 0:
                continue
            if getattr(batch, f"{name}_file_id") is None:
                lines = results_in_order(answers, failed=name == "error")
                about = await asyncio.to_thread(self.files.add_lines, lines, f"{batch.id}_{name}.jsonl", "batch_output")
                setattr(batch, f"{name}_file_id", about["id"])
                self._save(batch)
        batch.status = end
        setattr(batch, f"{end}_at", int(time.time()))
        self._save(batch)
        answers.unlink(missing_ok=True)

    def _fail(self, batch: Batch, problems: list[dict[str, Any]]) -> None:
        batch.status, batch.failed_at = "failed", int(time.time())
        batch.errors = {"object": "list", "data": problems[:MAX_ERRORS]}
        self._save(batch)


def _problem(code: str, message: str, line: int | None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": None, "line": line}


def check_requests(source: BinaryIO, endpoint: str) -> tuple[int, list[dict[str, Any]]]:
    """The number of requests in a file, and the API's errors of all that makes it no batch. Leaves it at its beginning.

    What the bodies say is not looked at: a request that cannot be answered is an answer of its own.
    """
    problems: list[dict[str, Any]] = []
    seen: set[int] = set()
    for raw in read_lines(source, MAX_LINE_BYTES):
        try:
            if len(problems) >= MAX_ERRORS:
                break
            if raw.index >= MAX_REQUESTS:
                problems.append(_problem("too_many_requests", f"more than {MAX_REQUESTS} requests", raw.number))
                break
            line = parse_line(raw.text, MAX_LINE_BYTES)
            if line.url != endpoint:
                raise BadLine("mismatched_url", f"url must be {endpoint}, as the batch's endpoint is")
            if (digest := id_hash(line.custom_id)) in seen:
                raise BadLine("duplicate_custom_id", f"custom_id {line.custom_id!r:.100} came before")
            seen.add(digest)
        except BadLine as error:
            problems.append(_problem(error.code, str(error), raw.number))
    if not seen and not problems:
        problems.append(_problem("empty_file", "the file holds no request", None))
    source.seek(0)
    return len(seen), problems
