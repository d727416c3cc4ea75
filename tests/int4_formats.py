# SPDX-License-Identifier: Apache-2.0
"""Int4 checkpoints written nibble by nibble, as the formats' descriptions say, for tests of what reads them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each nibble of a word, the lowest nibble first


@dataclass
class Linear:
    """A random quantised linear: the tensors of a file, and the weight [N, K] they stand for."""

    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor


def to_word(nibbles: list[int]) -> int:
    word = sum(nibble << (4 * i) for i, nibble in enumerate(nibbles))
    return word - 2**32 if word >= 2**31 else word


def quantization_config(kind: str, group_size: int) -> dict[str, Any]:
    if kind.startswith("gptq"):
        more = {"checkpoint_format": "gptq_v2"} if "v2" in kind else {}
        return {
            "quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": "act" in kind,
            "sym": "asym" not in kind, **more,
        }  # fmt: skip
    if kind == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    if kind == "fastserve":
        return {"quant_method": "fastserve", "bits": 4, "group_size": group_size}
    weights: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": kind == "ct", "dynamic": False}
    if group_size == -1:
        weights |= {"strategy": "channel", "group_size": None}
    else:
        weights |= {"strategy": "group", "group_size": group_size}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


KINDS = ("gptq", "gptq-asym", "gptq-asym-v2", "gptq-act", "gptq-asym-act", "awq", "ct", "ct-asym", "fastserve")


def random_linear(kind: str, rows: int, depth: int, group_size: int, seed: int = 0) -> Linear:
    """group_size -1: one group per row. The same seed gives the same act-order for any number of rows."""
    size = depth if group_size == -1 else group_size
    groups = -(-depth // size)
    order = torch.Generator().manual_seed(seed)
    group_of = torch.arange(depth) // size
    if kind.endswith("act"):
        group_of = group_of[torch.randperm(depth, generator=order)]
    generator = torch.Generator().manual_seed(1000 + seed)
    codes = torch.randint(0, 16, (rows, depth), generator=generator).tolist()
    scales = (0.01 + 0.02 * torch.rand(rows, groups, generator=generator)).half()
    symmetric = kind in ("gptq", "gptq-act", "ct")
    low = 1 if kind.startswith("gptq") else 0
    zeros = torch.randint(low, 16, (rows, groups), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 8)
    minimums = (-0.2 * torch.rand(rows, groups, generator=generator)).half()
    weight = torch.zeros(rows, depth)
    for n in range(rows):
        for k in range(depth):
            g = int(group_of[k])
            if kind == "fastserve":
                weight[n, k] = float(scales[n, g]) * codes[n][k] + float(minimums[n, g])
            else:
                weight[n, k] = float(scales[n, g]) * (codes[n][k] - int(zeros[n, g]))
    z = zeros.tolist()
    if kind.startswith("gptq"):
        less = 0 if kind.endswith("v2") else 1
        tensors = {
            "qweight": words(
                [[codes[n][8 * w + i] for i in range(8)] for w in range(depth // 8) for n in range(rows)]
            ).reshape(depth // 8, rows),
            "qzeros": words(
                [[z[8 * w + i][g] - less for i in range(8)] for g in range(groups) for w in range(rows // 8)]
            ).reshape(groups, rows // 8),
            "scales": scales.T.contiguous(),
            "g_idx": group_of.int(),
        }  # fmt: skip
    elif kind == "awq":
        tensors = {
            "qweight": words([[codes[8 * w + c][k] for c in AWQ_ORDER] for k in range(depth) for w in range(rows // 8)])
            .reshape(depth, rows // 8),
            "qzeros": words([[z[8 * w + c][g] for c in AWQ_ORDER] for g in range(groups) for w in range(rows // 8)])
            .reshape(groups, rows // 8),
            "scales": scales.T.contiguous(),
        }  # fmt: skip
    else:
        padded = [row + [0] * (-depth % 8) for row in codes]
        width = len(padded[0]) // 8
        tensors = {
            "weight_packed": words([row[8 * w : 8 * w + 8] for row in padded for w in range(width)])
            .reshape(rows, width),
            "weight_scale": scales,
            "weight_shape": torch.tensor([rows, depth]),
        }  # fmt: skip
        if kind == "ct-asym":
            tall = z + [[0] * groups] * (-rows % 8)
            tensors["weight_zero_point"] = words(
                [[tall[8 * w + i][g] for i in range(8)] for w in range(len(tall) // 8) for g in range(groups)]
            ).reshape(len(tall) // 8, groups)
        if kind == "fastserve":
            tensors["weight_minimum"] = minimums
    return Linear(tensors, weight)


def words(nibbles: list[list[int]]) -> torch.Tensor:
    return torch.tensor([to_word(one) for one in nibbles], dtype=torch.int32)


def quantize_folder(plain: Path, out: Path, kind: str, group_size: int) -> None:
    """A copy of a plain model folder whose linears are random quantised ones; the dense twin lies in `out`/dense."""
    dense = out / "dense"
    for folder in (out, dense):
        folder.mkdir()
        for file in plain.iterdir():
            if file.suffix == ".json":
                shutil.copy(file, folder)
    stored: dict[str, torch.Tensor] = {}
    twins: dict[str, torch.Tensor] = {}
    for index, (name, tensor) in enumerate(load_file(plain / "model.safetensors").items()):
        if not name.endswith("_proj.weight"):
            stored[name] = twins[name] = tensor
            continue
        prefix = name.removesuffix(".weight")
        # Projections of the same input have the same order of inputs, as their common Hessian gives.
        same_input = prefix.rsplit("_proj")[0].rstrip("qkvo") if "attn" in prefix else prefix
        seed = 7 if kind.endswith("act") and "down" not in same_input else index
        linear = random_linear(kind, *tensor.shape, group_size, seed)
        stored |= {f"{prefix}.{part}": value.contiguous() for part, value in linear.tensors.items()}
        twins[name] = linear.weight
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    save_file(twins, dense / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (out / "config.json").write_text(
        json.dumps(config | {"quantization_config": quantization_config(kind, group_size)})
    )


def to_int8(folder: Path, *names: str) -> None:
    """Makes matrices of a folder that are not quantised int8, in groups of 32: the last parts of their names. Their
    values, exactly, go to its dense twin. The folder's config must be of the kind "fastserve"."""
    path, twin_path = folder / "model.safetensors", folder / "dense" / "model.safetensors"
    stored, twins = load_file(path), load_file(twin_path)
    for name in [name for name in stored if name.endswith(".weight") and name.split(".")[-2] in names]:
        rows, depth = stored[name].shape
        generator = torch.Generator().manual_seed(rows + depth)
        codes = torch.randint(-128, 128, (rows, depth), generator=generator)
        scales = (
            (0.5 + torch.rand(rows, -(-depth // 32), generator=generator)) * float(stored[name].std()) / 90
        ).half()
        stored |= {name: codes.to(torch.int8), f"{name}_scale": scales}
        twins[name] = scales.float().repeat_interleave(32, 1)[:, :depth] * codes.float()
    save_file(stored, path, metadata={"format": "pt"})
    save_file(twins, twin_path, metadata={"format": "pt"})
