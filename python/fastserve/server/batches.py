# SPDX-License-Identifier: Apache-2.0
"""Batches: files of requests that are answered beside the requests of clients, one batch after another.

Each answer is appended to the batch's own file as soon as it is there. Whatever ends the process, the next one that
uses the same folder goes on where this one stopped: answers that were written are not computed again, none is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fastserve.errors import EngineDead, FastserveError, InvalidRequest, QueueFull
from fastserve.server.answers import whole_answer
from fastserve.server.errors import ApiError, as_api_error
from fastserve.server.files import FileStore, write_whole
from fastserve.server.protocol import REQUESTS, ChatCompletionRequest, parse_request
from fastserve.server.service import Service

log = logging.getLogger("fastserve.server")

MAX_REQUESTS = 50_000  # of one batch
MAX_LINE_BYTES = 8 * 2**20
MAX_OPEN = 256  # batches that have not ended
MAX_ERRORS = 100  # that are told of a file which cannot be used
WINDOW_S = 24 * 3600
SYNC_S = 1.0  # at most so much work is lost when the machine (not only the process) fails
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
            asked = await asyncio.to_thread(read_requests, self.files.path(batch.input_file_id), batch.endpoint)
        except ApiError as error:  # the file was deleted
            self._fail(batch, [_problem("file_not_found", error.message, None)])
            return
        except BadFile as error:
            self._fail(batch, error.problems)
            return
        path = self._answers_path(batch)
        done = await asyncio.to_thread(read_answers, path)
        batch.request_counts = {"total": len(asked), "completed": 0, "failed": 0}
        for line in done.values():
            self._count(batch, line)
        if batch.status == "validating":
            batch.status, batch.in_progress_at = "in_progress", int(time.time())
            self._save(batch)
        end = "cancelled" if batch.status == "cancelling" else "completed"
        if batch.status == "in_progress":
            left = [(custom_id, body) for custom_id, body in asked.items() if custom_id not in done]
            with path.open("a", encoding="utf-8") as out:
                work = asyncio.ensure_future(self._answer(batch, left, out, done))
                self._current = batch.id, work
                try:
                    await asyncio.wait_for(work, max(0.0, batch.expires_at - time.time()))
                except asyncio.TimeoutError:
                    end = "expired"
                except asyncio.CancelledError:
                    if self._stopping:
                        raise
                    end = "cancelled"
                finally:
                    self._current = None
                    out.flush()
                    os.fsync(out.fileno())
        await self._finish(batch, asked, done, end)

    async def _answer(
        self, batch: Batch, left: list[tuple[str, Any]], out: TextIO, done: dict[str, dict[str, Any]]
    ) -> None:
        """Answers what is left, some at a time, and appends each answer to `out`."""
        todo = iter(left)
        synced = time.monotonic()

        async def worker() -> None:
            nonlocal synced
            for custom_id, body in todo:
                line = await self._answer_one(batch.endpoint, custom_id, body)
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                out.flush()  # from here on it outlives this process
                done[custom_id] = line
                self._count(batch, line)
                if time.monotonic() - synced > SYNC_S:
                    synced = time.monotonic()
                    await asyncio.to_thread(os.fsync, out.fileno())

        num = max(1, self._service.llm.loaded.config.max_num_seqs // 2)
        workers = [asyncio.ensure_future(worker()) for _ in range(min(num, len(left)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for one in workers:
                one.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _answer_one(self, endpoint: str, custom_id: str, body: Any) -> dict[str, Any]:
        """A line of the answers' file. What is wrong with the request is part of it, never raised."""
        status, answer = 200, None
        try:
            answer = await self._generate(endpoint, body)
        except EngineDead:
            raise
        except Exception as error:
            told = as_api_error(error)
            status, answer = told.status, told.body()
        request_id = uuid.uuid4().hex
        response = {"status_code": status, "request_id": request_id, "body": answer}
        return {"id": f"batch_req_{request_id}", "custom_id": custom_id, "response": response, "error": None}

    async def _generate(self, endpoint: str, body: Any) -> dict[str, Any]:
        service = self._service
        request = parse_request(endpoint, body)
        if request.stream:
            raise InvalidRequest("stream is not allowed in a batch")
        service.check_model(request.model)
        while True:
            try:
                arrival_s = time.monotonic()
                if isinstance(request, ChatCompletionRequest):
                    job = await service.chat_job(request, arrival_s)
                else:
                    job = await service.completion_job(request, arrival_s)
                outputs = {}
                async with contextlib.aclosing(service.run(job)) as made:
                    async for index, output in made:
                        outputs[index] = output
                finished = [outputs[i] for i in range(len(outputs))]
                model = request.model or service.model_names[0]
                answer = whole_answer(request, finished, model, service.tokenizer, service.tool_format)
                return answer.model_dump(mode="json")
            except QueueFull:
                await asyncio.sleep(0.5)  # clients go first

    @staticmethod
    def _count(batch: Batch, line: dict[str, Any]) -> None:
        batch.request_counts["completed" if line["response"]["status_code"] == 200 else "failed"] += 1

    async def _finish(self, batch: Batch, asked: dict[str, Any], done: dict[str, dict[str, Any]], end: str) -> None:
        """Makes files of the answers, in the order of the requests."""
        if end == "completed":
            batch.status, batch.finalizing_at = "finalizing", int(time.time())
        lines = [done[custom_id] for custom_id in asked if custom_id in done]
        for name in ("output", "error"):
            chosen = [line for line in lines if (line["response"]["status_code"] == 200) == (name == "output")]
            if chosen and getattr(batch, f"{name}_file_id") is None:
                texts = (json.dumps(line, ensure_ascii=False) + "\n" for line in chosen)
                filename = f"{batch.id}_{name}.jsonl"
                about = await asyncio.to_thread(self.files.add_lines, texts, filename, "batch_output")
                setattr(batch, f"{name}_file_id", about["id"])
                self._save(batch)
        batch.status = end
        setattr(batch, f"{end}_at", int(time.time()))
        self._save(batch)
        self._answers_path(batch).unlink(missing_ok=True)

    def _fail(self, batch: Batch, problems: list[dict[str, Any]]) -> None:
        batch.status, batch.failed_at = "failed", int(time.time())
        batch.errors = {"object": "list", "data": problems[:MAX_ERRORS]}
        self._save(batch)


class BadFile(Exception):
    """A file that is no batch of requests; `problems` are the API's errors, with their lines."""

    def __init__(self, problems: list[dict[str, Any]]) -> None:
        super().__init__(problems[0]["message"])
        self.problems = problems


def _problem(code: str, message: str, line: int | None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": None, "line": line}


def read_requests(path: Path, endpoint: str) -> dict[str, Any]:
    """The bodies of a file of requests by their custom ids, in order. Raises BadFile with all that is wrong."""
    asked: dict[str, Any] = {}
    problems: list[dict[str, Any]] = []
    with path.open("rb") as lines:
        number = 0
        while (line := lines.readline(MAX_LINE_BYTES + 1)) and len(problems) < MAX_ERRORS:
            number += 1
            if len(line) > MAX_LINE_BYTES:
                problems.append(_problem("line_too_long", f"a line has more than {MAX_LINE_BYTES} bytes", number))
                break
            if not line.strip():
                continue
            try:
                given = json.loads(line)
                custom_id, method, url, body = (given[name] for name in ("custom_id", "method", "url", "body"))
            except (ValueError, LookupError, TypeError, RecursionError):
                message = "the line must be a JSON object with custom_id, method, url and body"
                problems.append(_problem("invalid_json_line", message, number))
                continue
            if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512:
                problems.append(
                    _problem("invalid_custom_id", "custom_id must be a text of 1 to 512 characters", number)
                )
            elif custom_id in asked:
                problems.append(_problem("duplicate_custom_id", f"custom_id {custom_id[:80]!r} came before", number))
            elif (method, url) != ("POST", endpoint):
                problems.append(_problem("mismatched_url", f"method and url must be POST and {endpoint}", number))
            elif len(asked) == MAX_REQUESTS:
                problems.append(_problem("too_many_requests", f"more than {MAX_REQUESTS} requests", number))
                break
            else:
                asked[custom_id] = body
    if not asked and not problems:
        problems.append(_problem("empty_file", "the file holds no request", None))
    if problems:
        raise BadFile(problems)
    return asked


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """The answers that were written so far, by custom id. A last line that is not whole is cut off."""
    done: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return done
    with path.open("r+b") as lines:
        whole = 0
        for line in lines:
            if not line.endswith(b"\n"):
                break
            answer = json.loads(line)
            done[answer["custom_id"]] = answer
            whole += len(line)
        lines.truncate(whole)
    return done
