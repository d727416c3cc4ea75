# SPDX-License-Identifier: Apache-2.0
"""int4 and int8 weights on a GPU: `linear_int4` and `linear_int8` beside their roofline, torch's 16-bit product and,
for int4 and where installed, vLLM's Marlin.

Part of `make gpu-report`. Times are medians of CUDA events over calls whose weights rotate through more than the L2
cache. The roofline is the larger of packed weights / measured bandwidth and operations / measured torch product.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastserve import _native

# (N, K): qkv, attention output, gate and up, down
SHAPES = {
    "135M": [(960, 576), (576, 576), (3072, 576), (576, 1536)],
    "8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "70B": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
}
HEADS = {"135M": (49152, 576), "8B": (128256, 4096), "70B": (128256, 8192)}  # LM heads, which int8 is for as well
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
COUNTED = (1, 8, 16, 32, 48, 64)  # on the simulated device
ROTATE_BYTES = 256 << 20


def median_seconds(calls: list[Callable[[], None]], repeat: int = 30) -> float:
    """Of one call; the list holds the same work on different memory."""
    for call in calls[:2]:
        call()
    times = []
    for i in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measured_limits() -> dict[str, float]:
    """GB/s of a large copy (read and write), and TFLOP/s of torch's float16 product of 8192 x 8192 matrices."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = median_seconds([lambda: target.copy_(source)])
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    product = median_seconds([lambda: torch.mm(a, b)])
    return {"copy_GB_per_s": 2 * source.numel() / copy / 1e9, "product_TFLOP_per_s": 2 * 8192**3 / product / 1e12}


@dataclass(frozen=True)
class Weight:
    """Weights of 4 bits, symmetric in groups of 128, or of 8 bits in groups of 32."""

    bits: int

    @property
    def op(self) -> str:
        return f"linear_int{self.bits}"

    @property
    def group_size(self) -> int:
        return 128 if self.bits == 4 else 32

    def shape(self, rows: int, depth: int) -> tuple[int, int]:
        if self.bits == 4:
            return _native.cuda_packed_int4_shape(rows, depth, self.group_size, 0)
        return _native.cuda_packed_int8_shape(rows, depth, self.group_size)

    def packed(self, rows: int, depth: int) -> torch.Tensor:
        packed = torch.empty(self.shape(rows, depth), dtype=torch.uint8, device="cuda")
        least, end, dtype = (0, 16, torch.uint8) if self.bits == 4 else (-127, 128, torch.int8)
        codes = torch.randint(least, end, (rows, depth), dtype=dtype, device="cuda")
        scales = torch.full((rows, -(-depth // self.group_size)), 0.01, dtype=torch.float16, device="cuda")
        if self.bits == 4:
            _native.ops.pack_int4(packed, codes, scales, None, None, self.group_size)
        else:
            _native.ops.pack_int8(packed, codes, scales, self.group_size)
        return packed

    def workspace_bytes(self, tokens: int, depth: int, multiprocessors: int) -> int:
        if self.bits == 4:
            return _native.cuda_int4_workspace_bytes(tokens, depth, multiprocessors, False)
        return _native.cuda_linear_workspace_bytes(tokens, multiprocessors)

    def arguments(
        self, out: torch.Tensor, x: torch.Tensor, packed: torch.Tensor, workspace: torch.Tensor
    ) -> dict[str, Any]:
        """Of a call of the op."""
        counters = torch.zeros(_native.cuda_linear_counters, dtype=torch.int32, device=out.device)
        of_int4 = {"input_order": None, "form": 0} if self.bits == 4 else {}
        return {
            "out": out, "x": x, "packed": packed, "bias": None, "workspace": workspace, "counters": counters,
            "group_size": self.group_size, "activation_bits": 16, **of_int4,
        }  # fmt: skip


def marlin_calls(rows: int, depth: int, x: torch.Tensor) -> tuple[list[Callable[[], Any]] | None, str]:
    """vLLM's kernel on a weight of the same shape, or None and why not."""
    try:
        from vllm import _custom_ops as vllm_ops
        from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
        from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
        from vllm.scalar_type import scalar_types
    except ImportError as error:
        return None, f"not installed or another version: {error}"
    try:
        kind = scalar_types.uint4b8
        weight = torch.randn(depth, rows, dtype=torch.float16, device="cuda")
        _, q, s, g_idx, perm, _ = marlin_quantize(weight, kind, Weight(4).group_size, act_order=False)
        workspace = marlin_make_workspace_new(x.device)
        copies = [q.clone() for _ in range(num_copies(q.numel() * q.element_size()))]
        calls = [
            lambda q=q: vllm_ops.gptq_marlin_gemm(
                x, None, q, None, s, None, None, g_idx, perm, workspace, kind, x.shape[0], rows, depth
            )
            for q in copies
        ]
        calls[0]()
    except Exception as error:  # its interface changes between versions; the report says what went wrong
        return None, f"{type(error).__name__}: {error}"
    return calls, ""


def num_copies(num_bytes: int) -> int:
    return max(1, min(64, ROTATE_BYTES // num_bytes))


def measure(weight: Weight, rows: int, depth: int, limits: dict[str, float]) -> list[dict[str, Any]]:
    multiprocessors = _native.cuda_devices()[0]["multiprocessors"]
    first = weight.packed(rows, depth)
    packed = [first, *(first.clone() for _ in range(num_copies(first.numel()) - 1))]
    dense = [torch.randn(rows, depth, dtype=torch.float16, device="cuda") for _ in range(num_copies(2 * rows * depth))]
    op = getattr(_native.ops, weight.op)
    results = []
    for tokens in TOKENS:
        x = torch.randn(tokens, depth, dtype=torch.float16, device="cuda")
        out = torch.empty(tokens, rows, dtype=torch.float16, device="cuda")
        size = weight.workspace_bytes(tokens, depth, multiprocessors)
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        arguments = [weight.arguments(out, x, each, workspace) for each in packed]
        seconds = median_seconds([lambda given=given: op(**given) for given in arguments])
        torch_seconds = median_seconds([lambda w=w, x=x, out=out: torch.mm(x, w.T, out=out) for w in dense])
        bytes_seconds = first.numel() / limits["copy_GB_per_s"] / 1e9
        product_seconds = 2 * tokens * rows * depth / limits["product_TFLOP_per_s"] / 1e12
        result = {
            "N": rows,
            "K": depth,
            "tokens": tokens,
            "us": seconds * 1e6,
            "weights_GB_per_s": first.numel() / seconds / 1e9,
            "of_roofline": max(bytes_seconds, product_seconds) / seconds,
            "torch_fp16_us": torch_seconds * 1e6,
        }
        if weight.bits == 4:
            marlin, why = marlin_calls(rows, depth, x)
            result["vllm_marlin_us"] = median_seconds(marlin) * 1e6 if marlin else why
        results.append(result)
    return results


def run() -> dict[str, Any]:
    limits = measured_limits()
    int4 = {model: [measure(Weight(4), *shape, limits) for shape in shapes] for model, shapes in SHAPES.items()}
    int8 = {
        model: [measure(Weight(8), *shape, limits) for shape in (*shapes, HEADS[model])]
        for model, shapes in SHAPES.items()
    }
    return {"limits": limits, "int4": int4, "int8": int8}


def counted(device: Any) -> dict[str, list[dict[str, Any]]]:
    """Without a GPU: what the kernels move on the simulated device, for one 8B-like layer in small. Bytes are those
    that lanes ask for: eight of them share each scale of int8 weights, so that 1.41 of the size is all of it once."""
    return {weight.op: [_counted(device, weight, tokens) for tokens in COUNTED] for weight in (Weight(4), Weight(8))}


def _counted(device: Any, weight: Weight, tokens: int) -> dict[str, Any]:
    rows, depth = 512, 1024
    out, x = torch.empty(tokens, rows, dtype=torch.float16), torch.ones(tokens, depth, dtype=torch.float16)
    packed = torch.zeros(weight.shape(rows, depth), dtype=torch.uint8)
    size = weight.workspace_bytes(tokens, depth, device.num_multiprocessors)
    device.run(weight.op, weight.arguments(out, x, packed, torch.empty(size, dtype=torch.uint8)))
    (launch,) = device.counters()
    banks, sectors = launch["shared"], [launch["global"][kind] for kind in ("load", "async")]
    return {
        "N": rows,
        "K": depth,
        "tokens": tokens,
        "weight_bytes_read_over_size": launch["buffers"]["packed"]["read"] / packed.numel(),
        "sectors_over_ideal": sum(s["sectors"] for s in sectors) / sum(s["ideal_sectors"] for s in sectors),
        "wavefronts_over_ideal": sum(b["wavefronts"] for b in banks.values()) / sum(b["ideal"] for b in banks.values()),
        "products": launch["mma"],
        "warp_instructions_ptx": launch["warp_instructions"],
    }
