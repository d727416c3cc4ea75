# SPDX-License-Identifier: Apache-2.0
"""Checks a GGUF file's structure before the `gguf` library reads it.

The library trusts the counts in the file: an array that claims 2^60 elements keeps it appending until memory
is gone. So every length, count and offset is first held against the size of the file, in integers that do not
overflow.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from fastserve.errors import ModelLoadError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_FIELDS = 2**16
MAX_TENSORS = 2**20
MAX_ELEMENTS = 2**24  # of one metadata array; the largest vocabularies have 2**18 tokens
MAX_DIMS = 4
MAX_NAME_BYTES = 2**10

SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
UINT32, STRING, ARRAY = 4, 8, 9


class _Cursor:
    """A position in the file; reading past the end is an error that says what was being read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def error(self, message: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {message} (at byte {self.position} of {len(self.data)})")

    def take(self, num_bytes: int, what: str) -> bytes:
        self.skip(num_bytes, what)
        return self.data[self.position - num_bytes : self.position]

    def skip(self, num_bytes: int, what: str) -> None:
        if num_bytes > len(self.data) - self.position:
            raise self.error(f"{what} takes {num_bytes} bytes, which the file does not have; is it truncated?")
        self.position += num_bytes

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def u64(self, what: str, limit: int) -> int:
        value = int(struct.unpack("<Q", self.take(8, what))[0])
        if value > limit:
            raise self.error(f"{what} is {value}, at most {limit} is allowed")
        return value

    def name(self, what: str) -> str:
        raw = self.take(self.u64(f"the length of {what}", MAX_NAME_BYTES), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8") from None


def _check_value(cursor: _Cursor, key: str, kind: int) -> None:
    what = f"field {key!r}"
    if kind in SCALAR_BYTES:
        cursor.skip(SCALAR_BYTES[kind], what)
    elif kind == STRING:
        cursor.skip(cursor.u64(f"the length of {what}", len(cursor.data)), what)
    elif kind == ARRAY:
        element = cursor.u32(what)
        count = cursor.u64(f"the number of elements of {what}", MAX_ELEMENTS)
        if element in SCALAR_BYTES:
            cursor.skip(count * SCALAR_BYTES[element], what)
        elif element == STRING:
            for _ in range(count):  # each takes at least eight bytes, so the file's size bounds the loop
                cursor.skip(cursor.u64(f"the length of a string in {what}", len(cursor.data)), what)
        else:
            raise cursor.error(f"{what} is an array of value type {element}; scalars and strings are allowed")
    else:
        raise cursor.error(f"{what} has the unknown value type {kind}")


def check_gguf(path: Path, block_sizes: dict[int, tuple[int, int]]) -> None:
    """Raise ModelLoadError unless all metadata and all tensors lie within the file, apart from each other.

    block_sizes: tensor type -> (elements per block, bytes per block).
    """
    if not path.is_file():
        raise ModelLoadError(f"{path}: {'not a regular file' if path.exists() else 'does not exist'}")
    if path.stat().st_size < 24:
        raise ModelLoadError(f"{path}: {path.stat().st_size} bytes is too short for a GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _check(_Cursor(path, data), block_sizes)


def _check(cursor: _Cursor, block_sizes: dict[int, tuple[int, int]]) -> None:
    magic = cursor.take(4, "the magic")
    if magic != MAGIC:
        raise cursor.error(f"not a GGUF file: it begins with {magic!r} instead of {MAGIC!r}")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        raise cursor.error(f"GGUF version {version} is not known; known are {VERSIONS} in little-endian order")
    num_tensors = cursor.u64("the number of tensors", MAX_TENSORS)
    num_fields = cursor.u64("the number of fields", MAX_FIELDS)
    alignment = 32
    for _ in range(num_fields):
        key = cursor.name("a field's name")
        kind = cursor.u32(f"the type of field {key!r}")
        start = cursor.position
        _check_value(cursor, key, kind)
        if key == "general.alignment":
            alignment = struct.unpack("<I", cursor.data[start : start + 4])[0] if kind == UINT32 else 0
            if not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
                raise cursor.error(f"general.alignment must be a power of two up to 2^20, got {alignment}")
    tensors = [_tensor_span(cursor, block_sizes) for _ in range(num_tensors)]
    data_bytes = len(cursor.data) - -(-cursor.position // alignment) * alignment
    end, previous = 0, ""
    for begin, num_bytes, name in sorted(tensors):
        if begin + num_bytes > data_bytes:
            raise cursor.error(
                f"tensor {name!r} spans [{begin}, {begin + num_bytes}) of {max(data_bytes, 0)} data bytes; "
                "is the file truncated?"
            )
        if begin < end:
            raise cursor.error(f"tensor {name!r} begins at {begin}, inside {previous!r}, which ends at {end}")
        end, previous = begin + num_bytes, name


def _tensor_span(cursor: _Cursor, block_sizes: dict[int, tuple[int, int]]) -> tuple[int, int, str]:
    """(offset in the data section, bytes, name) of the next tensor description."""
    name = cursor.name("a tensor's name")
    what = f"tensor {name!r}"
    num_dims = cursor.u32(what)
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.error(f"{what} has {num_dims} dimensions, 1 to {MAX_DIMS} are allowed")
    dims = [cursor.u64(f"a dimension of {what}", 2**40) for _ in range(num_dims)]
    kind = cursor.u32(what)
    if kind not in block_sizes:
        raise cursor.error(f"{what} has the unknown tensor type {kind}")
    offset = cursor.u64(f"the offset of {what}", len(cursor.data))
    per_block, block_bytes = block_sizes[kind]
    if dims[0] % per_block or 0 in dims:
        raise cursor.error(f"{what} has rows of {dims[0]} elements; they must fill blocks of {per_block}")
    return offset, math.prod(dims) // per_block * block_bytes, name
