# SPDX-License-Identifier: Apache-2.0
"""int4 weights on a GPU: `linear_int4` beside its roofline, torch's 16-bit product and, where installed, vLLM's Marlin.

Part of `make gpu-report`. Times are medians of CUDA events over calls whose weights rotate through more than the L2
cache. The roofline is the larger of packed weights / measured bandwidth and operations / measured torch product.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from fastserve import _native

# (N, K): qkv, attention output, gate and up, down
SHAPES = {
    "135M": [(960, 576), (576, 576), (3072, 576), (576, 1536)],
    "8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "70B": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GROUP_SIZE = 128
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


def packed_weight(rows: int, depth: int) -> torch.Tensor:
    packed = torch.empty(_native.cuda_packed_int4_shape(rows, depth, GROUP_SIZE, 0), dtype=torch.uint8, device="cuda")
    codes = torch.randint(0, 16, (rows, depth), dtype=torch.uint8, device="cuda")
    scales = torch.full((rows, -(-depth // GROUP_SIZE)), 0.01, dtype=torch.float16, device="cuda")
    _native.ops.pack_int4(packed, codes, scales, None, None, GROUP_SIZE)
    return packed


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
        _, q, s, g_idx, perm, _ = marlin_quantize(weight, kind, GROUP_SIZE, act_order=False)
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


def measure(rows: int, depth: int, limits: dict[str, float]) -> list[dict[str, Any]]:
    multiprocessors = _native.cuda_devices()[0]["multiprocessors"]
    first = packed_weight(rows, depth)
    packed = [first, *(first.clone() for _ in range(num_copies(first.numel()) - 1))]
    dense = [torch.randn(rows, depth, dtype=torch.float16, device="cuda") for _ in range(num_copies(2 * rows * depth))]
    results = []
    for tokens in TOKENS:
        x = torch.randn(tokens, depth, dtype=torch.float16, device="cuda")
        out = torch.empty(tokens, rows, dtype=torch.float16, device="cuda")
        size = _native.cuda_int4_workspace_bytes(tokens, depth, multiprocessors, False)
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        counters = torch.zeros(_native.cuda_linear_counters, dtype=torch.int32, device="cuda")

        def ours(weight: torch.Tensor, out=out, x=x, workspace=workspace, counters=counters) -> None:
            _native.ops.linear_int4(out, x, weight, None, None, workspace, GROUP_SIZE, 0, 16, counters)

        seconds = median_seconds([lambda weight=weight, ours=ours: ours(weight) for weight in packed])
        torch_seconds = median_seconds([lambda w=w, x=x, out=out: torch.mm(x, w.T, out=out) for w in dense])
        marlin, why = marlin_calls(rows, depth, x)
        bytes_seconds = first.numel() / limits["copy_GB_per_s"] / 1e9
        product_seconds = 2 * tokens * rows * depth / limits["product_TFLOP_per_s"] / 1e12
        results.append(
            {
                "N": rows,
                "K": depth,
                "tokens": tokens,
                "us": seconds * 1e6,
                "weights_GB_per_s": first.numel() / seconds / 1e9,
                "of_roofline": max(bytes_seconds, product_seconds) / seconds,
                "torch_fp16_us": torch_seconds * 1e6,
                "vllm_marlin_us": median_seconds(marlin) * 1e6 if marlin else why,
            }
        )
    return results


def run() -> dict[str, Any]:
    limits = measured_limits()
    layers = {model: [measure(*shape, limits) for shape in shapes] for model, shapes in SHAPES.items()}
    return {"limits": limits, "layers": layers}


def counted(device: Any) -> list[dict[str, Any]]:
    """Without a GPU: what the kernel moves on the simulated device, for one 8B-like layer in small."""
    results = []
    for tokens in (1, 8, 16, 32, 48, 64):
        rows, depth = 512, 1024
        packed = torch.zeros(_native.cuda_packed_int4_shape(rows, depth, GROUP_SIZE, 0), dtype=torch.uint8)
        size = _native.cuda_int4_workspace_bytes(tokens, depth, device.num_multiprocessors, False)
        device.run(
            "linear_int4",
            {
                "out": torch.empty(tokens, rows, dtype=torch.float16),
                "x": torch.ones(tokens, depth, dtype=torch.float16),
                "packed": packed,
                "bias": None,
                "input_order": None,
                "workspace": torch.empty(size, dtype=torch.uint8),
                "counters": torch.zeros(_native.cuda_linear_counters, dtype=torch.int32),
                "group_size": GROUP_SIZE,
                "form": 0,
                "activation_bits": 16,
            },
        )
        (launch,) = device.counters()
        banks = launch["shared"]
        results.append(
            {
                "N": rows,
                "K": depth,
                "tokens": tokens,
                "weight_bytes_read_over_size": launch["buffers"]["packed"]["read"] / packed.numel(),
                "wavefronts_over_ideal": sum(b["wavefronts"] for b in banks.values())
                / sum(b["ideal"] for b in banks.values()),
                "products": launch["mma"],
                "warp_instructions_ptx": launch["warp_instructions"],
            }
        )
    return results
