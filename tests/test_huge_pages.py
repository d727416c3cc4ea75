# SPDX-License-Identifier: Apache-2.0
"""Memory in huge pages is memory: aligned, not shared between tensors, and given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastserve.engine.huge_pages import ALIGNMENT, CHUNK_BYTES, HugePages


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_tensors_are_aligned_and_do_not_overlap(dtype: torch.dtype) -> None:
    memory = HugePages()
    shapes = [(3, 5), (1,), (), (1000, 1001), (0, 7), (CHUNK_BYTES // dtype.itemsize + 1,), (17,)] * 3
    tensors = [memory.empty(shape, dtype) for shape in shapes]
    for index, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % ALIGNMENT == 0
        tensor.fill_(index)
    for index, tensor in enumerate(tensors):
        assert bool((tensor == index).all())


def test_memory_is_given_back_when_its_tensors_go() -> None:
    memory = HugePages()
    before = resident_bytes()
    large = memory.empty((8, 2 * CHUNK_BYTES), torch.uint8)
    small = [memory.empty((CHUNK_BYTES // 8,), torch.uint8) for _ in range(16)]
    for tensor in (large, *small):
        tensor.fill_(1)
    assert resident_bytes() > before + 16 * CHUNK_BYTES
    del large, small, tensor
    assert resident_bytes() < before + 2 * CHUNK_BYTES  # the chunk at hand is kept


def test_a_system_without_huge_pages_gives_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastserve.engine import huge_pages

    monkeypatch.setattr(huge_pages.mmap, "MADV_HUGEPAGE", -1)  # what such a kernel refuses
    tensor = HugePages().empty((100,), torch.float32)
    tensor.fill_(2)
    assert float(tensor.sum()) == 200
