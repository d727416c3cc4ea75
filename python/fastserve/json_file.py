# SPDX-License-Identifier: Apache-2.0
"""The JSON files of a model folder, read as data: bounded, no duplicate keys, errors naming the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from fastserve.errors import ModelLoadError

MAX_JSON_BYTES = 256 * 2**20  # the largest tokenizer.json files in use are about 35 MB


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:200]!r} appears twice in one object")
            seen.add(key)
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def parse_json_object(data: bytes | str, where: str, *, allow_nan: bool = False) -> dict[str, Any]:
    """Parse one JSON object; `where` names the source in errors.

    Python's json keeps the last of two equal keys, and two readers that disagree about which one counts are
    how a lying header gets past a check, so duplicates are an error. NaN and Infinity are allowed on request.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=None if allow_nan else _no_constant
        )
    except RecursionError:
        raise ModelLoadError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors too
        raise ModelLoadError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def read_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes`."""
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise ModelLoadError(f"{path}: {what}")
    size = path.stat().st_size
    if size > max_bytes:
        raise ModelLoadError(f"{path}: {size} bytes, at most {max_bytes} are allowed")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from error


def read_json_object(
    path: Path, max_bytes: int = MAX_JSON_BYTES, *, allow_nan: bool = False
) -> dict[str, Any]:
    """The JSON object in a file, see parse_json_object."""
    return parse_json_object(read_bytes(path, max_bytes), str(path), allow_nan=allow_nan)
