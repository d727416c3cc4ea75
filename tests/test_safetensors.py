# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is saved is read back bit for bit, and a file that lies ends in a named error."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastserve.errors import ModelLoadError
from fastserve.weights.safetensors import DTYPES, Checkpoint, open_checkpoint, read_header

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "scalar": torch.tensor(7, dtype=torch.int64),
}


def raw_file(path: Path, header: Any, data: bytes = b"", claim: int | None = None) -> Path:
    """A file with exactly this header (an object or bytes), header length `claim`, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claim is None else claim) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_back_what_was_saved(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert sorted(checkpoint.names()) == sorted(TENSORS)
        assert checkpoint.num_bytes == sum(t.numel() * t.itemsize for t in TENSORS.values())
        for name, expected in TENSORS.items():
            assert name in checkpoint
            assert checkpoint.shape(name) == tuple(expected.shape)
            assert checkpoint.dtype(name) == expected.dtype
            assert torch.equal(checkpoint.tensor(name), expected)
        with pytest.raises(ModelLoadError, match=r"no 'lm_head\.weight'"):
            checkpoint.tensor("lm_head.weight")


def test_every_known_dtype_has_the_size_the_library_gives_it(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(3, 5).to(dtype) for name, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for name, dtype in DTYPES.items():
        assert checkpoint.tensor(name).dtype == dtype == checkpoint.dtype(name)


def test_tensors_are_mapped_not_copied_and_outlive_the_checkpoint(tmp_path: Path) -> None:
    save_file({"w": torch.full((1 << 16,), 3.0)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    first, second = checkpoint.tensor("w"), checkpoint.tensor("w")
    assert first.data_ptr() == second.data_ptr()
    checkpoint.close()
    assert float(first.sum()) == 3.0 * (1 << 16)


def sharded(folder: Path, weight_map: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"a": TENSORS["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "model-00002-of-00002.safetensors")
    if weight_map is None:
        weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {"total_size": 28}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_sharded(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    assert torch.equal(checkpoint.tensor("a"), TENSORS["a"])
    assert torch.equal(checkpoint.tensor("b"), TENSORS["b"])


def test_shards_behind_symlinks_are_read(tmp_path: Path) -> None:
    # The Hugging Face cache links to files kept elsewhere; the user made those links, not the index.
    folder = sharded(tmp_path / "snapshot")
    for file in folder.glob("*.safetensors"):
        blob = tmp_path / f"blob-{file.name}"
        file.rename(blob)
        file.symlink_to(blob)
    assert torch.equal(open_checkpoint(folder).tensor("b"), TENSORS["b"])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model-00001-of-00002.safetensors"}, "plain name"),
        ({"a": "/etc/passwd"}, "plain name"),
        ({"a": "sub/x.safetensors"}, "plain name"),
        ({"a": "..\\x.safetensors"}, "plain name"),
        ({"a": "model\0.safetensors"}, "plain name"),
        ({"a": "weights.bin"}, "plain name"),
        ({"a": 7}, "plain name"),
        ({"a": "model-00003-of-00003.safetensors"}, "shard model-00003-of-00003.safetensors is missing"),
        ({"c": "model-00001-of-00002.safetensors"}, "does not hold tensor 'c'"),
        (
            {"b": "model-00002-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"},
            "does not hold tensor 'a'",
        ),
        ({}, "weight_map"),
        ([], "weight_map"),
        (None, "weight_map"),
    ],
)
def test_lying_index(tmp_path: Path, weight_map: Any, message: str) -> None:
    sharded(tmp_path, weight_map={})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelLoadError, match=message):
        open_checkpoint(tmp_path)


def test_a_shard_with_a_tensor_the_index_places_elsewhere(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelLoadError, match="holds tensor 'a', which the index places in 'model-00001"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"x": entry(offsets=[0, 12])}, bytes(8), r"'x'.*\[0, 12\).*8 data bytes"),  # past the end
        ({"x": entry(offsets=[8, 0])}, bytes(8), "ascend"),
        ({"x": entry(offsets=[-8, 0])}, bytes(8), "non-negative"),
        ({"x": entry(offsets=[0])}, bytes(8), "two non-negative"),
        ({"x": entry(offsets=[0, 8.0])}, bytes(8), "two non-negative"),
        ({"x": entry(offsets=[False, 8])}, bytes(8), "two non-negative"),
        ({"x": entry(offsets={"0": 8})}, bytes(8), "two non-negative"),
        ({"x": entry(dtype="F16")}, bytes(8), "F16 of shape .2. takes 4 bytes"),
        ({"x": entry(dtype="F33")}, bytes(8), "dtype 'F33' is not known"),
        ({"x": entry(dtype=["F32"])}, bytes(8), "is not known"),
        ({"x": entry(shape=[3])}, bytes(8), "takes 12 bytes"),
        ({"x": entry(shape=[-2])}, bytes(8), "non-negative integers"),
        ({"x": entry(shape=[-2, -1])}, bytes(8), "non-negative integers"),
        ({"x": entry(shape=[True, 2])}, bytes(8), "non-negative integers"),
        ({"x": entry(shape=[1] * 9)}, bytes(8), "at most 8"),
        ({"x": entry(shape=[2**62, 4, 2])}, bytes(8), "takes"),  # wraps to 8 * 2**64 in 64-bit arithmetic
        ({"x": entry(shape=[2**63, 2])}, bytes(8), "non-negative integers"),
        ({"x": entry(shape=[2**32, 2**32, 0], offsets=[0, 8])}, bytes(8), "takes 0 bytes"),
        ({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12), "'y' begins at byte 4, inside tensor 'x'"),
        ({"x": entry(), "y": entry()}, bytes(8), "begins at byte 0, inside"),
        (
            {"x": entry(), "y": entry(offsets=[12, 20])},
            bytes(20),
            "4 bytes between tensor 'x' and tensor 'y'",
        ),
        ({"x": entry(offsets=[4, 12])}, bytes(12), "4 bytes between the start of the data"),
        ({"x": entry()}, bytes(12), "4 of 12 data bytes"),
        ({}, bytes(4), "4 of 4 data bytes"),
        ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8), "expected dtype, shape and data_offsets"),
        ({"x": entry() | {"more": 1}}, bytes(8), "expected dtype, shape and data_offsets"),
        ({"x": [1, 2]}, bytes(8), "expected dtype, shape and data_offsets"),
        ({"x": entry(), "__metadata__": {"a": 1}}, bytes(8), "__metadata__"),
        ({"x": entry(), "__metadata__": "text"}, bytes(8), "__metadata__"),
        ([], b"", "expected a JSON object, got list"),
        (b"{", b"", "not valid JSON"),
        (b"", b"", "not valid JSON"),
        (b'{"x": "\xff"}', b"", "not valid JSON"),
        (b'{"x": ' + b"[" * 100_000, b"", "JSON"),
        (b'{"x": NaN}', b"", "not valid JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", b"", "."),
        (
            b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(8),
            "'x' appears twice",
        ),
        (
            b'{"x":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}',
            bytes(8),
            "'dtype' appears twice",
        ),
    ],
)
def test_lying_header(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelLoadError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("claim", [200, 2**31, 2**63, 2**64 - 1, 100_000_001])
def test_header_past_the_end(tmp_path: Path, claim: int) -> None:
    raw_file(tmp_path / "model.safetensors", {"x": entry()}, bytes(8), claim=claim)
    with pytest.raises(ModelLoadError, match=f"the header claims {claim} bytes"):
        open_checkpoint(tmp_path)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "model.safetensors", b"", claim=100_000_001)
    os.truncate(path, 200_000_000)  # sparse: takes no space
    with pytest.raises(ModelLoadError, match="the format allows 100000000"):
        open_checkpoint(tmp_path)


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelLoadError):
            read_header(cut)
    cut.write_bytes(whole)
    assert len(read_header(cut)) == 2


def test_random_damage_never_passes_a_file_the_library_refuses(tmp_path: Path) -> None:
    """One changed byte: a named error, or a file that the library accepts too and reads with equal shapes."""
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    rng = random.Random(1)
    accepted = 0
    for _ in range(1500):
        content = bytearray(whole)
        content[rng.randrange(len(whole) - 28)] = rng.randrange(256)  # the header; the data may hold anything
        damaged.write_bytes(content)
        try:
            entries = read_header(damaged)
        except ModelLoadError:
            continue
        accepted += 1
        checkpoint = Checkpoint(entries)
        with safe_open(damaged, framework="pt") as oracle:
            assert sorted(oracle.keys()) == sorted(entries)
            for name in entries:
                assert tuple(oracle.get_slice(name).get_shape()) == checkpoint.tensor(name).shape
    assert accepted < 1500


def test_pickles_are_refused_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(ModelLoadError, match=r"pickle.*runs whatever code"):
        open_checkpoint(tmp_path)


def test_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"neither model\.safetensors nor"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelLoadError, match="not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelLoadError, match="not a regular file"):
        open_checkpoint(tmp_path)


def test_a_fifo_does_not_hang_the_loader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="not a regular file"):
        open_checkpoint(tmp_path)


def test_a_file_that_changes_after_validation_is_noticed(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    save_file({"w": torch.zeros(8)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="changed while read"):
        checkpoint.tensor("w")


def test_nothing_in_the_package_unpickles() -> None:
    package = Path(__file__).parent.parent / "python" / "fastserve"
    for file in package.rglob("*.py"):
        source = file.read_text()
        for forbidden in (
            "import pickle",
            "from pickle",
            "torch.load(",
            "import dill",
            "trust_remote_code=True",
        ):
            assert forbidden not in source, f"{file} contains {forbidden!r}"
