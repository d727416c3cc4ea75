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
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=None if allow_nan else _no_constant)
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


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES, *, allow_nan: bool = False) -> dict[str, Any]:
    """The JSON object in a file, see parse_json_object."""
    return parse_json_object(read_bytes(path, max_bytes), str(path), allow_nan=allow_nan)


class Fields:
    """Typed access to the fields of one JSON object; every complaint names file, field, given and allowed.

    `null` counts as absent, as it does for the writers of config.json.
    """

    def __init__(self, where: str, data: dict[str, Any]) -> None:
        self.where = where
        self.data = data

    def error(self, key: str, allowed: str) -> ModelLoadError:
        given = f"{self.data[key]!r:.200}" if key in self.data else "nothing"
        return ModelLoadError(f"{self.where}: {key} must be {allowed}, got {given}")

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        value = self.data.get(key)
        if value is None:
            return None
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.optional_integer(key, low, high)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        value = self.data.get(key)
        if value is None:
            return None
        # The comparison also refuses NaN; float() comes later, since an integer of 400 digits overflows it.
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.error(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.optional_number(key, low, high)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, f"a number from {low:g} to {high:g}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str | None:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, f"one of {', '.join(allowed)}")
        return value

    def object(self, key: str) -> dict[str, Any] | None:
        value = self.data.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them, all within the vocabulary; () when absent."""
        value = self.data.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise self.error(key, f"a token id, or a list of them, from 0 to {vocab_size - 1}")
        return tuple(ids)
