# SPDX-License-Identifier: Apache-2.0
"""Files that clients upload and batches write: one folder of this machine, and nothing else.

A file is `ID` with its bytes and `ID.json` with what the API says of it. Both appear whole or not at all, and outlive
the process. Ids are made here, and looked at before a path is made of one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from fastserve.server.errors import ApiError

MAX_FILES = 10_000
_ID = re.compile(r"file-[0-9a-f]{32}")


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file so that a reader, or a restart, finds either the old or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes what was renamed or removed in a folder outlive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def no_file(file_id: str) -> ApiError:
    return ApiError(404, f"there is no file {file_id[:100]!r}", param="file_id", code="file_not_found")


class FileStore:
    """The files of one folder. Methods block on the disk: not for the event loop's thread."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        for part in folder.glob("*.part"):
            part.unlink()

    def add(self, source: BinaryIO, filename: str, purpose: str) -> dict[str, Any]:
        """Keeps the rest of `source`; returns the API's description. Raises ApiError when there are too many files."""
        if sum(1 for _ in self._folder.glob("*.json")) >= MAX_FILES:
            raise ApiError(400, f"{MAX_FILES} files are kept here, the most that are allowed; delete some")
        file_id = f"file-{uuid.uuid4().hex}"
        part = self._folder / f"{file_id}.part"
        with part.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        part.replace(self._folder / file_id)
        about = {
            "id": file_id,
            "object": "file",
            "bytes": size,
            "created_at": int(time.time()),
            "filename": filename[:255],
            "purpose": purpose,
            "status": "processed",
        }
        write_whole(self._folder / f"{file_id}.json", json.dumps(about).encode("ascii"))
        return about

    def add_lines(self, lines: Iterable[bytes], filename: str, purpose: str) -> dict[str, Any]:
        """Keeps lines, each with its line break, without holding them all in memory."""
        import tempfile

        with tempfile.TemporaryFile(dir=self._folder) as held:
            held.writelines(lines)
            held.seek(0)
            return self.add(held, filename, purpose)

    def about(self, file_id: str) -> dict[str, Any]:
        """What the API says of a file. Raises ApiError 404."""
        if not _ID.fullmatch(file_id):
            raise no_file(file_id)
        try:
            return dict(json.loads((self._folder / f"{file_id}.json").read_bytes()))
        except FileNotFoundError:
            raise no_file(file_id) from None

    def path(self, file_id: str) -> Path:
        """Where a file's bytes are; read only. Raises ApiError 404."""
        self.about(file_id)
        return self._folder / file_id

    def all(self) -> list[dict[str, Any]]:
        """Every file, the newest first."""
        found = [json.loads(path.read_bytes()) for path in self._folder.glob("*.json")]
        return sorted(found, key=lambda about: (-about["created_at"], about["id"]))

    def delete(self, file_id: str) -> None:
        """Raises ApiError 404."""
        self.about(file_id)
        (self._folder / f"{file_id}.json").unlink()
        (self._folder / file_id).unlink(missing_ok=True)
        sync_folder(self._folder)
