# SPDX-License-Identifier: Apache-2.0
"""Where a model runs: the native ops of a device, its memory, and the ways there and back.

The rest of the engine is the same for all devices: it asks its device for memory, hands step inputs to `stage` and
reads results with `fetch`. All work of a step is queued on one stream; nothing waits but `fetch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from fastserve import _native
from fastserve.config import EngineConfig
from fastserve.engine.huge_pages import HugePages
from fastserve.engine.memory import free_memory_bytes
from fastserve.errors import FastserveError

MAX_CPU_BLOCK_SIZE = 256  # csrc/cpu/kv_layout.h
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Device(Protocol):
    """What the engine needs of a device. Tensors that are made here live there."""

    name: str  # "cpu" or "cuda", in messages
    ops: Any  # the ops of csrc/ops/ops.h for tensors of this device
    exact: bool  # our own `linear`, whose rows depend on nothing but themselves; False: torch multiplies
    rows_per_item: int  # packed query rows of an attention item
    rows_per_shared_item: int  # the same for an item whose rows are of several requests
    rows_per_warp: int  # packed rows that the attention kernel gives to a warp of its own; 0: it has no warps
    rows_per_token_read: int  # packed rows that attention computes with a KV token while it is read
    attention_fold_levels: int  # of the binary trees in which its spans fold
    has_graphs: bool  # `capture` works
    graphs_fix_shapes: bool  # a recording serves only steps whose arrays have the same shapes

    @property
    def activation_bits(self) -> tuple[int, ...]:
        """What int4 and int8 weights can be multiplied with, the default first."""

    @property
    def attention_workers(self) -> int:
        """Units of attention that can run at the same time."""

    def attention_workspace_floats(self, head_dim: int) -> int:
        """What attention needs besides the partial results of a plan."""

    @property
    def sample_workers(self) -> int:
        """Rows of logits that the sampler works on at the same time."""

    def weight_dtype(self, asked: str, checkpoint: torch.dtype) -> torch.dtype:
        """The dtype of weights for EngineConfig.dtype; FastserveError if the device cannot."""

    def activation_dtype(self, weights: torch.dtype) -> torch.dtype: ...

    def kv_dtype(self, asked: str, weights: torch.dtype) -> torch.dtype: ...

    def check_block_size(self, block_size: int) -> None:
        """Raises FastserveError if the attention kernel takes no KV blocks of so many tokens."""

    def packed_linear_shape(self, num_rows: int, depth: int) -> tuple[int, int, int]:
        """The shape of a weight [num_rows, depth] as `pack_linear` arranges it here."""

    def linear_workspace_bytes(self, max_tokens: int, depth: int, dtype: torch.dtype) -> int: ...

    has_int4: bool  # linear_int4 runs here, and packed_int4_shape works
    has_int8: bool  # the same of linear_int8 and packed_int8_shape

    has_gated: bool  # linear_gated and its int4 and int8 forms run here

    def multiplies_bf16(self, depth: int) -> bool:
        """Whether activations are float32, and linears with `depth` inputs that round them to bfloat16 take rows of
        bfloat16 just as well."""

    def packed_int4_shape(self, num_rows: int, depth: int, group_size: int, form: int) -> tuple[int, int]:
        """The shape of what `pack_int4` makes of codes [num_rows, depth]."""

    def packed_int8_shape(self, num_rows: int, depth: int, group_size: int) -> tuple[int, int]: ...

    def quantized_workspace_bytes(self, max_tokens: int, depth: int, activation_bits: int, reorders: bool) -> int:
        """For up to max_tokens rows of `depth` inputs; reorders: with an input_order."""

    linear_counters: torch.Tensor | None
    """The argument `counters` of linears, which find and leave zeros there; one for all, as they run in turn."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory with any content."""

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous host tensor there; it may be the same memory."""

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a host tensor there, contiguous, which needs the host's no longer."""

    def stage(self, arrays: _native.StepArrays, size: int) -> torch.Tensor:
        """The memory, int32, to which the `size` numbers of a step's arrays were brought in one copy; overwritten by
        the next call. It is the same memory every time, on which graphs rely, unless `stage_generation` changed."""

    @property
    def stage_generation(self) -> int: ...

    def views(self, memory: torch.Tensor, arrays: _native.StepArrays, *, recorded: bool) -> list[torch.Tensor]:
        """The arrays as tensors in what `stage` returned, for ops that run or that are `recorded`."""

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the host, once all that was queued before has run."""

    def reader(self, tensor: torch.Tensor) -> Callable[[], list[int]]:
        """Something that fetches the int32 numbers of a tensor [N], for those who want them in every step."""

    def free_memory_bytes(self) -> int: ...

    def capture(self, arrays: _native.StepArrays, work: Callable[[], None]) -> Callable[[], None]:
        """Records what `work` does with the staged arrays; it may run once before. The function returned does all of it
        at once, with what is staged then."""


class CpuDevice:
    """This machine's processor. Host tensors are its own: staging and fetching copy nothing."""

    name = "cpu"
    exact = True
    rows_per_item = 96
    rows_per_shared_item = 384
    rows_per_warp = 0
    attention_fold_levels = 0
    linear_counters = None
    has_graphs = True
    graphs_fix_shapes = False
    has_int4 = has_int8 = has_gated = True
    stage_generation = 0

    def __init__(self, num_threads: int | None) -> None:
        _native.set_num_threads(num_threads or _native.num_physical_cores())
        torch.set_num_threads(1)  # inside a step the native pool has the cores
        self.rows_per_token_read = 48 if _native.isa().startswith("amx") else 4
        self.ops = _native.ops
        self._memory = HugePages()
        self._staging = torch.empty(0, dtype=torch.int32)
        self._staging_size = 0

    @property
    def activation_bits(self) -> tuple[int, ...]:
        # On AMX's tiles 16 bits are the faster choice too, except for a single token.
        return (16, 12, 8) if _native.isa().startswith("amx") else (8, 12, 16)

    @property
    def attention_workers(self) -> int:
        return _native.num_threads()

    def attention_workspace_floats(self, head_dim: int) -> int:
        return 0

    @property
    def sample_workers(self) -> int:
        return _native.num_threads()

    def weight_dtype(self, asked: str, checkpoint: torch.dtype) -> torch.dtype:
        return checkpoint if asked == "auto" else DTYPES[asked]  # all three are computed with float32 sums

    def activation_dtype(self, weights: torch.dtype) -> torch.dtype:
        return torch.float32

    def kv_dtype(self, asked: str, weights: torch.dtype) -> torch.dtype:
        if asked == "float16":
            raise FastserveError("kv_cache_dtype='float16' is not available on the CPU; use auto, bfloat16 or float32")
        if asked == "auto":
            return torch.float32 if weights == torch.float32 else torch.bfloat16
        return DTYPES[asked]

    def check_block_size(self, block_size: int) -> None:
        if block_size % 16 != 0 or block_size > MAX_CPU_BLOCK_SIZE:
            raise FastserveError(
                f"block_size={block_size} is not available on the CPU; use a multiple of 16 up to {MAX_CPU_BLOCK_SIZE}"
            )

    def multiplies_bf16(self, depth: int) -> bool:
        return _native.isa().startswith("amx") and depth % 32 == 0

    def packed_linear_shape(self, num_rows: int, depth: int) -> tuple[int, int, int]:
        return _native.packed_linear_shape(num_rows, depth)

    def linear_workspace_bytes(self, max_tokens: int, depth: int, dtype: torch.dtype) -> int:
        return _native.linear_workspace_bytes(max_tokens, depth, str(dtype))

    def packed_int4_shape(self, num_rows: int, depth: int, group_size: int, form: int) -> tuple[int, int]:
        return _native.packed_int4_shape(num_rows, depth, group_size, form)

    def packed_int8_shape(self, num_rows: int, depth: int, group_size: int) -> tuple[int, int]:
        return _native.packed_int8_shape(num_rows, depth, group_size)

    def quantized_workspace_bytes(self, max_tokens: int, depth: int, activation_bits: int, reorders: bool) -> int:
        return _native.quantized_workspace_bytes(max_tokens, depth, activation_bits)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._memory.empty(shape, dtype)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def stage(self, arrays: _native.StepArrays, size: int) -> torch.Tensor:
        if self._staging_size < size:
            self._staging_size = 2 * size
            self._staging = self.empty((self._staging_size,), torch.int32)
        arrays.write(self._staging)
        return self._staging

    def views(self, memory: torch.Tensor, arrays: _native.StepArrays, *, recorded: bool) -> list[torch.Tensor]:
        # A recording knows the arrays by their addresses, and torch gives none to an empty tensor.
        least = 1 if recorded else 0
        return [_view(memory, begin, (max(rows, least), *columns)) for begin, (rows, *columns) in arrays.layout()]

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def reader(self, tensor: torch.Tensor) -> Callable[[], list[int]]:
        return memoryview(tensor.numpy()).tolist  # nothing of torch: its code is cold after a step

    def free_memory_bytes(self) -> int:
        return free_memory_bytes()

    def capture(self, arrays: _native.StepArrays, work: Callable[[], None]) -> Callable[[], None]:
        recording = _native.Recording(arrays)
        with recording:
            work()
        return recording.run


class CudaDevice:
    """An NVIDIA GPU, by torch's allocator, stream and graphs. Subclassed for the simulated device of the tests."""

    name = "cuda"
    rows_per_item = rows_per_shared_item = 128  # csrc/cuda/attention.cu: of a block
    rows_per_warp = 16
    rows_per_token_read = 64
    attention_fold_levels = 2
    has_graphs = graphs_fix_shapes = True
    has_int4, has_int8, has_gated = True, True, False
    activation_bits: tuple[int, ...] = (16,)

    def __init__(self, exact: bool, index: int = 0) -> None:
        devices = _native.cuda_devices()
        if not _native.built_with_cuda:
            raise FastserveError("device='cuda': this build has CPU kernels only; use device='auto' or 'cpu'")
        if not devices or not torch.cuda.is_available():
            what = "finds no CUDA device" if not devices else "has a torch without CUDA"
            raise FastserveError(f"device='cuda': this machine {what}; use device='auto' or 'cpu'")
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        self._set_up(exact, _native.ops, devices[index]["multiprocessors"])

    def _set_up(self, exact: bool, ops: Any, num_multiprocessors: int) -> None:
        self.exact = exact
        self.ops = ops
        self.num_multiprocessors = num_multiprocessors
        self.attention_workers = 2 * num_multiprocessors
        self.sample_workers = num_multiprocessors
        self.linear_counters: torch.Tensor | None = self.upload(
            torch.zeros(_native.cuda_linear_counters, dtype=torch.int32)
        )
        self._staging: tuple[torch.Tensor, torch.Tensor] | None = None  # on the host, there
        self._staged: Any = None  # an event after the last copy
        self.stage_generation = 0

    def attention_workspace_floats(self, head_dim: int) -> int:
        # csrc/cuda/attention.cu: a block of 128 threads parks 16-byte vectors, outputs of two tiles and their sums, for
        # each level and what comes before.
        return self.attention_workers * (self.attention_fold_levels + 1) * 128 * 4 * 2 * (head_dim // 8 + 1)

    def weight_dtype(self, asked: str, checkpoint: torch.dtype) -> torch.dtype:
        if asked == "float32":
            raise FastserveError("dtype='float32' is not available on CUDA; use auto, bfloat16 or float16")
        if asked == "auto":
            return torch.bfloat16 if checkpoint == torch.float32 else checkpoint
        return DTYPES[asked]

    def activation_dtype(self, weights: torch.dtype) -> torch.dtype:
        return weights

    def kv_dtype(self, asked: str, weights: torch.dtype) -> torch.dtype:
        if asked not in ("auto", str(weights).removeprefix("torch.")):
            raise FastserveError(f"kv_cache_dtype={asked!r} is not available on CUDA with {weights} weights; use auto")
        return weights

    def check_block_size(self, block_size: int) -> None:
        if block_size < 16 or block_size & (block_size - 1) != 0:
            raise FastserveError(f"block_size={block_size} is not available on CUDA; use a power of two from 16")

    def multiplies_bf16(self, depth: int) -> bool:
        return False

    def packed_linear_shape(self, num_rows: int, depth: int) -> tuple[int, int, int]:
        return -(-num_rows // 32), -(-depth // 16) * 16, 32  # csrc/layout/fragment.h

    def linear_workspace_bytes(self, max_tokens: int, depth: int, dtype: torch.dtype) -> int:
        return _native.cuda_linear_workspace_bytes(max_tokens, self.num_multiprocessors)

    def packed_int4_shape(self, num_rows: int, depth: int, group_size: int, form: int) -> tuple[int, int]:
        return _native.cuda_packed_int4_shape(num_rows, depth, group_size, form)

    def packed_int8_shape(self, num_rows: int, depth: int, group_size: int) -> tuple[int, int]:
        return _native.cuda_packed_int8_shape(num_rows, depth, group_size)

    def quantized_workspace_bytes(self, max_tokens: int, depth: int, activation_bits: int, reorders: bool) -> int:
        of_int4 = _native.cuda_int4_workspace_bytes(max_tokens, depth, self.num_multiprocessors, reorders)
        return max(of_int4, _native.cuda_linear_workspace_bytes(max_tokens, self.num_multiprocessors))  # int8's

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        there = self.empty(tensor.shape, tensor.dtype)
        there.copy_(tensor)
        return there

    keep = upload

    def stage(self, arrays: _native.StepArrays, size: int) -> torch.Tensor:
        if self._staging is None or self._staging[0].numel() < size:
            room = max(2 * size, 1 << 16)
            self._staging = self._pinned(room), self.empty((room,), torch.int32)
            self.stage_generation += 1
        host, there = self._staging
        self._wait_for_staging()
        arrays.write(host)
        there[:size].copy_(host[:size], non_blocking=True)
        self._staged = self._record_event()
        return there

    def views(self, memory: torch.Tensor, arrays: _native.StepArrays, *, recorded: bool) -> list[torch.Tensor]:
        return [_view(memory, begin, shape) for begin, shape in arrays.layout()]

    def _wait_for_staging(self) -> None:
        """A step that samples nothing fetches nothing: its copy may still read the host's buffer."""
        if self._staged is not None:
            self._staged.synchronize()

    def _record_event(self) -> Any:
        return torch.cuda.current_stream(self.torch_device).record_event()

    def _pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, pin_memory=True)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu")

    def reader(self, tensor: torch.Tensor) -> Callable[[], list[int]]:
        return lambda: self.fetch(tensor).tolist()

    def free_memory_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def capture(self, arrays: _native.StepArrays, work: Callable[[], None]) -> Callable[[], None]:
        work()  # what is set up on first use must not be recorded
        torch.cuda.synchronize(self.torch_device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


def _view(memory: torch.Tensor, begin: int, shape: Sequence[int]) -> torch.Tensor:
    return memory[begin : begin + math.prod(shape)].view(tuple(shape))


def make_device(config: EngineConfig) -> Device:
    """'auto' is a CUDA device where this build and this machine have one."""
    if config.device == "cuda" or (
        config.device == "auto" and _native.built_with_cuda and _native.cuda_devices() and torch.cuda.is_available()
    ):
        return CudaDevice(config.exact)
    return CpuDevice(config.num_threads)
