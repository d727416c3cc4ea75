# SPDX-License-Identifier: Apache-2.0
"""OpenAI's batch files: lines of requests, and lines of results that survive a kill.

A line of a batch is {"custom_id", "method": "POST", "url", "body"}; a line of results is

    {"id": "batch_req_17", "custom_id": "...", "response": {"status_code", "request_id", "body"}, "error": null}

where the number at the end of `id` is that of the batch's line. `error` is {"code", "message", "param", "line"} for a
line that failed; `response` then has the status and OpenAI's error body, or is null if no request could be made of the
line at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastserve.errors import FastserveError, InvalidRequest

MAX_LINE_BYTES = 8 * 2**20
MAX_CUSTOM_ID_CHARS = 512
ID_PREFIX = "batch_req_"  # of results
_FIELDS = ("custom_id", "method", "url", "body")
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line of a batch that is not blank. `text` is None for one that is too long."""

    number: int  # 1 is the first line of the file
    index: int  # among the lines that are not blank, from 0
    offset: int  # bytes
    text: bytes | None


@dataclass(frozen=True, slots=True)
class BatchLine:
    custom_id: str
    url: str
    body: dict[str, Any]


class BadLine(InvalidRequest):
    """No request can be made of a line. `code` is the machine-readable reason."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


def read_lines(source: BinaryIO, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[RawLine]:
    """The lines that are not blank, one at a time, of at most `max_line_bytes`; the rest of a longer one is skipped."""
    number, index, offset = 0, 0, 0
    while text := source.readline(max_line_bytes + 1):
        number += 1
        begin, too_long = offset, len(text) > max_line_bytes and not text.endswith(b"\n")
        offset += len(text)
        while too_long and text and not text.endswith(b"\n"):
            text = source.readline(_CHUNK)
            offset += len(text)
        if too_long or text.strip(b"\xef\xbb\xbf \t\r\n"):
            yield RawLine(number, index, begin, None if too_long else text)
            index += 1


def count_lines(source: BinaryIO) -> int:
    """Lines of a file, blank ones included; leaves it at its beginning."""
    count, last = 0, b"\n"
    source.seek(0)
    while chunk := source.read(_CHUNK):
        count += chunk.count(b"\n")
        last = chunk[-1:]
    source.seek(0)
    return count + (last != b"\n")


def parse_line(text: bytes | None, max_line_bytes: int = MAX_LINE_BYTES) -> BatchLine:
    """Raises BadLine, with the custom_id as far as there is one."""
    if text is None:
        raise BadLine("line_too_long", f"the line is longer than {max_line_bytes} bytes")
    try:
        line = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        shown = str(error) if isinstance(error, json.JSONDecodeError) else "not UTF-8, or nested too deeply"
        raise BadLine("invalid_json", f"the line is not valid JSON: {shown:.200}") from None
    if not isinstance(line, dict):
        raise BadLine("invalid_line", f"the line must be a JSON object with the fields {', '.join(_FIELDS)}")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise BadLine("invalid_custom_id", f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters")
    if unknown := sorted(line.keys() - set(_FIELDS)):
        raise BadLine(
            "unknown_field", f"unknown field {unknown[0]!r:.100}; the fields are {', '.join(_FIELDS)}", custom_id
        )
    if line.get("method") != "POST":
        raise BadLine("invalid_method", "method must be POST", custom_id)
    url, body = line.get("url"), line.get("body")
    if not isinstance(url, str):
        raise BadLine("invalid_url", "url must be a string, for example /v1/chat/completions", custom_id)
    if not isinstance(body, dict):
        raise BadLine("invalid_body", "body must be a JSON object, the request", custom_id)
    return BatchLine(custom_id, url, body)


def result_line(
    number: int,
    custom_id: str | None,
    *,
    status: int | None,
    request_id: str,
    body: dict[str, Any] | None,
    error: dict[str, Any] | None = None,
    id_prefix: str = ID_PREFIX,
) -> bytes:
    """A line of results with its line break. `status` None: there is no response."""
    response = None if status is None else {"status_code": status, "request_id": request_id, "body": body}
    line = {"id": f"{id_prefix}{number}", "custom_id": custom_id, "response": response, "error": error}
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def id_hash(custom_id: str | None) -> int:
    """64 bits, never 0, that stand for a custom_id."""
    text = b"" if custom_id is None else b"\1" + custom_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1


class DoneLines:
    """Which lines have a result already, and the custom_id of each: 8 bytes a line."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self.num_done = self.num_failed = 0

    def add(self, number: int, custom_id: str | None, failed: bool) -> None:
        if number >= len(self._hashes):
            self._hashes.extend(array("Q", bytes(8 * (number + 1 - len(self._hashes) + len(self._hashes) // 4))))
        self.num_done += self._hashes[number] == 0
        self.num_failed += failed
        self._hashes[number] = id_hash(custom_id)

    def has(self, number: int, custom_id: str | None) -> bool:
        """Raises FastserveError if the results are those of another batch."""
        known = self._hashes[number] if number < len(self._hashes) else 0
        if known and known != id_hash(custom_id):
            raise FastserveError(
                f"the results are not of this batch: line {number} has another custom_id there; use another file"
            )
        return known != 0


class ResultsFile:
    """A file of results, one a line, appended to. What `sync` has returned from survives a kill and a power cut.

    An unfinished last line of an earlier run is cut off with `resume`. Another process that writes to the same file
    is refused, and so is a file with content unless `resume` or `overwrite` says what to do with it.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.done = DoneLines()
        # Where the file ends, and what comes next. One value, and a write to a place: a sync that Ctrl-C interrupts
        # can be repeated.
        self._tail: tuple[int, list[bytes]] = (0, [])
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take(resume, overwrite)
        except BaseException:
            os.close(self._file)
            raise

    def add(self, line: bytes) -> None:
        """A whole line, to be written by the next `sync`."""
        self._tail[1].append(line)

    def sync(self) -> None:
        end, lines = self._tail
        if not lines:
            return
        data = memoryview(b"".join(lines))
        while data:
            written = os.pwrite(self._file, data, end)
            data, end = data[written:], end + written
        os.fsync(self._file)
        self._tail = (end, [])

    def close(self) -> None:
        """Gives up the file; what was not synced is not in it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _take(self, resume: bool, overwrite: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FastserveError(f"{self.path}: another process writes to this file") from None
        if os.fstat(self._file).st_size and not resume and not overwrite:
            raise FastserveError(f"{self.path} has content; --resume goes on with it, --overwrite replaces it")
        end = self._read_done() if resume else 0
        os.ftruncate(self._file, end)
        self._tail = (end, [])
        os.fsync(self._file)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _read_done(self) -> int:
        """Takes note of all whole lines; returns where they end."""
        end = 0
        with open(self._file, "rb", closefd=False) as lines:
            for number, text in enumerate(lines, 1):
                if not text.endswith(b"\n"):
                    break
                try:
                    line = json.loads(text)
                    batch_line = int(line["id"].rpartition("_")[2])
                    custom_id, failed = line["custom_id"], line["error"] is not None
                    if batch_line < 1 or not (custom_id is None or isinstance(custom_id, str)):
                        raise ValueError
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    if next(lines, None) is None:
                        break  # a write that was cut short
                    raise FastserveError(
                        f"{self.path}: line {number} is no result of a batch; nothing was changed"
                    ) from None
                self.done.add(batch_line, custom_id, failed)
                end += len(text)
        return end


def results_in_order(path: Path, *, failed: bool) -> Iterator[bytes]:
    """The results of lines that failed, or of the others, in the order of the batch. Not while the file is written."""
    places = []  # (number of the line, where its result begins)
    with path.open("rb") as results:
        offset = 0
        for text in results:
            line = json.loads(text)
            if (line["error"] is not None) == failed:
                places.append((int(line["id"].rpartition("_")[2]), offset))
            offset += len(text)
        for _, offset in sorted(places):
            results.seek(offset)
            yield results.readline()
