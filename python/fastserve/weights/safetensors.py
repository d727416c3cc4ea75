# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the safetensors format, sharded or not.

Files are mapped, not copied. Before that the header of every file is checked here in full: a checkpoint comes from
strangers, and an error must name the file, the tensor, what was given and what is allowed. Then a tensor is a place in
the mapping; the `safetensors` library would find it as well, but keeps every page that was ever read, and with them a
second copy of the weights. Pickle-based checkpoints (.bin, .pt, .pth) run code when they are loaded: they are refused.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastserve.errors import ModelLoadError
from fastserve.json_file import parse_json_object, read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_RANK = 8
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class FileVersion:
    """A file as its header was read: where its data section starts, and what tells that it is still that file."""

    path: Path
    data_start: int
    stamp: tuple[int, int, int, int]

    @staticmethod
    def stamp_of(status: os.stat_result) -> tuple[int, int, int, int]:
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, dtype, shape, and its bytes [begin, end) in the data section."""

    file: FileVersion
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # not isinstance, for which True is an int


def _read_entry(file: FileVersion, name: str, raw: Any, data_bytes: int) -> TensorEntry:
    """One header entry, checked against itself and against the number of data bytes the file really has."""
    where = f"{file.path}: tensor {name!r}"
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelLoadError(f"{where}: expected dtype, shape and data_offsets, got {raw!r:.200}")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelLoadError(f"{where}: dtype {dtype!r:.100} is not known; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_count, shape)):
        raise ModelLoadError(f"{where}: shape must be at most {MAX_RANK} non-negative integers, got {shape!r:.200}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ModelLoadError(f"{where}: data_offsets must be two non-negative integers, got {offsets!r:.200}")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise ModelLoadError(f"{where}: data_offsets [{begin}, {end}) must ascend within {data_bytes} data bytes")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if needed != end - begin:
        raise ModelLoadError(
            f"{where}: {dtype} of shape {shape} takes {needed} bytes, "
            f"but data_offsets [{begin}, {end}) span {end - begin}"
        )
    return TensorEntry(file, DTYPES[dtype], tuple(shape), begin, end)


def _check_coverage(path: Path, entries: dict[str, TensorEntry], data_bytes: int) -> None:
    """The tensors must cover the data section exactly: no overlap, no hole, nothing after the last one."""
    position, previous = 0, "the start of the data"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position:
            raise ModelLoadError(
                f"{path}: tensor {name!r} begins at byte {entry.begin}, inside {previous} (to {position})"
            )
        if entry.begin > position:
            raise ModelLoadError(
                f"{path}: {entry.begin - position} bytes between {previous} and tensor {name!r} are a hole"
            )
        position, previous = entry.end, f"tensor {name!r}"
    if position != data_bytes:
        raise ModelLoadError(
            f"{path}: {data_bytes - position} of {data_bytes} data bytes (after {previous}) have no tensor"
        )


def read_header(path: Path) -> dict[str, TensorEntry]:
    """All tensors of one safetensors file, fully validated; raises ModelLoadError."""
    if not path.is_file():
        raise ModelLoadError(f"{path}: {'not a regular file' if path.exists() else 'does not exist'}")
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ModelLoadError(f"{path}: {size} bytes is too short for a safetensors file (at least 8)")
            header_bytes = int.from_bytes(prefix, "little")
            if header_bytes > MAX_HEADER_BYTES or header_bytes > size - 8:
                raise ModelLoadError(
                    f"{path}: the header claims {header_bytes} bytes; {size - 8} follow the length field "
                    f"and the format allows {MAX_HEADER_BYTES}; is the file truncated?"
                )
            header = parse_json_object(file.read(header_bytes), f"{path} (header)")
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelLoadError(f"{path}: __metadata__ must map strings to strings")
    data_bytes = size - 8 - header_bytes
    version = FileVersion(path, 8 + header_bytes, FileVersion.stamp_of(status))
    entries = {name: _read_entry(version, name, raw, data_bytes) for name, raw in header.items()}
    _check_coverage(path, entries, data_bytes)
    return entries


def _read_index(index_path: Path) -> dict[str, TensorEntry]:
    """All tensors of a sharded checkpoint. The index may name only plain files that lie beside it."""
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index_path}: weight_map must map tensor names to file names")
    shards: dict[str, dict[str, TensorEntry]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise ModelLoadError(
                f"{index_path}: tensor {name!r} is placed in {shard!r:.200}; allowed is the plain name of a "
                ".safetensors file in the same folder"
            )
        if shard not in shards:
            path = index_path.parent / shard
            if not path.exists():
                raise ModelLoadError(f"{index_path}: shard {shard} is missing from the folder")
            shards[shard] = read_header(path)
        if name not in shards[shard]:
            raise ModelLoadError(f"{index_path}: {shard} does not hold tensor {name!r}, which is said to be there")
    for shard, entries in shards.items():
        for name in entries:
            if weight_map.get(name) != shard:
                raise ModelLoadError(
                    f"{index_path}: {shard} holds tensor {name!r}, which the index places in {weight_map.get(name)!r}"
                )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


class Checkpoint:
    """The tensors of a model folder by name; made by `open_checkpoint`, closed by close() or a with block."""

    def __init__(self, entries: dict[str, TensorEntry]) -> None:
        self._entries = entries
        self._mappings: dict[Path, mmap.mmap] = {}

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Raises ModelLoadError naming the tensor when the checkpoint does not hold it."""
        try:
            return self._entries[name]
        except KeyError:
            raise ModelLoadError(f"the checkpoint of {len(self)} tensors has no {name!r}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).dtype

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._entries.values())

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, backed by the mapped file: read it, do not write to it. It outlives the checkpoint."""
        entry = self.entry(name)
        if entry.num_bytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        try:
            mapping = self._mapping(entry.file)
        except OSError as error:
            raise ModelLoadError(
                f"{entry.file.path}: tensor {name!r} cannot be read: {error.strerror or error}"
            ) from error
        begin, count = entry.file.data_start + entry.begin, math.prod(entry.shape)
        return torch.frombuffer(mapping, dtype=entry.dtype, count=count, offset=begin).view(entry.shape)

    def _mapping(self, file: FileVersion) -> mmap.mmap:
        mapping = self._mappings.get(file.path)
        if mapping is None:
            with file.path.open("rb") as opened:
                if FileVersion.stamp_of(os.fstat(opened.fileno())) != file.stamp:
                    raise ModelLoadError(
                        f"{file.path}: changed while read: it is not the file whose header was checked"
                    )
                mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            self._mappings[file.path] = mapping
        return mapping

    def release(self) -> None:
        """Gives back the memory of all that was read so far. Tensors stay valid: what is read again is mapped again."""
        with contextlib.suppress(AttributeError, OSError):  # a system without it keeps the pages
            for mapping in self._mappings.values():
                mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Files stay mapped as long as there are tensors of them."""
        self._mappings.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(model_dir: str | Path) -> Checkpoint:
    """Open the safetensors checkpoint of a Hugging Face folder, all headers validated.

    Raises ModelLoadError, naming file and tensor, what was given and what is allowed.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise ModelLoadError(f"{folder}: not a folder with config.json and *.safetensors files")
    if (folder / SINGLE_FILE).exists():
        return Checkpoint(read_header(folder / SINGLE_FILE))
    if (folder / INDEX_FILE).exists():
        return Checkpoint(_read_index(folder / INDEX_FILE))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelLoadError(
            f"{folder}: holds only pickle-based weights ({', '.join(pickles[:3])}), and loading a pickle "
            f"runs whatever code it contains; convert them to {SINGLE_FILE} first"
        )
    raise ModelLoadError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
