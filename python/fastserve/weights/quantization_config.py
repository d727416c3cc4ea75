# SPDX-License-Identifier: Apache-2.0
"""config.json's quantization_config: which int4 format the weights of a checkpoint are in.

Read strictly: a field that would change the meaning of the bits and is not understood here is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastserve.json_file import Fields

METHODS = ("gptq", "awq", "compressed-tensors", "fastserve")
MAX_GROUP = 2**20
WHOLE_ROW = MAX_GROUP  # one group per row: a group larger than any row


@dataclass(frozen=True)
class QuantizationConfig:
    """method: one of METHODS. group_size: inputs that share a scale; WHOLE_ROW for all of them. symmetric: code 8 is
    zero, so zero points tell nothing. zero_point_offset: GPTQ's first format stores zero points less one."""

    method: str
    group_size: int
    symmetric: bool = False
    zero_point_offset: int = 0

    @staticmethod
    def from_fields(model: Fields) -> QuantizationConfig | None:
        """From config.json's fields; None for a checkpoint that is not quantised. Raises ModelLoadError naming the
        field, what was given and what is allowed."""
        data = model.object("quantization_config")
        if data is None:
            return None
        fields = Fields(f"{model.where}: quantization_config", data)
        if fields.choice("quant_method", METHODS) is None:
            raise fields.error("quant_method", f"one of {', '.join(METHODS)}")
        return _READERS[data["quant_method"]](fields)


def _four_bits(fields: Fields, *keys: str) -> None:
    given = [key for key in keys if fields.has(key)]
    if not given or any(fields.data[key] != 4 or type(fields.data[key]) is not int for key in given):
        raise fields.error(given[0] if given else keys[0], "4 (int4 is the only width that is read)")


def _group_size(fields: Fields, *keys: str) -> int:
    for key in keys:
        if fields.data.get(key) == -1:
            return WHOLE_ROW
        if fields.has(key):
            return fields.integer(key, 1, MAX_GROUP)
    raise fields.error(keys[0], f"-1 (one group per row) or an integer from 1 to {MAX_GROUP}")


def _gptq(fields: Fields) -> QuantizationConfig:
    _four_bits(fields, "bits")
    if fields.data.get("dynamic"):
        raise fields.error("dynamic", "absent (one setting for all layers)")
    layout = fields.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    fields.boolean("desc_act", False)  # the g_idx tensors tell
    symmetric = fields.boolean("sym", False)
    return QuantizationConfig("gptq", _group_size(fields, "group_size"), symmetric, 1 if layout == "gptq" else 0)


def _awq(fields: Fields) -> QuantizationConfig:
    _four_bits(fields, "bits", "w_bit")
    version = fields.data.get("version")
    if version is not None and str(version).lower() != "gemm":
        raise fields.error("version", "gemm (the layouts gemv and marlin are not read)")
    if not fields.boolean("zero_point", True):
        raise fields.error("zero_point", "true")
    return QuantizationConfig("awq", _group_size(fields, "group_size", "q_group_size"))


def _compressed_tensors(fields: Fields) -> QuantizationConfig:
    fields.choice("format", ("pack-quantized",))
    fields.choice("quantization_status", ("compressed", "frozen"))
    if fields.data.get("kv_cache_scheme") is not None:
        raise fields.error("kv_cache_scheme", "null")
    if fields.data.get("sparsity_config"):
        raise fields.error("sparsity_config", "absent")
    groups = fields.object("config_groups")
    if not groups:
        raise fields.error("config_groups", "an object with at least one group")
    found = {_compressed_group(Fields(f"{fields.where}: config_groups", groups), name) for name in groups}
    if len(found) > 1:
        raise fields.error("config_groups", "groups with the same weights settings")
    return found.pop()


def _compressed_group(groups: Fields, name: str) -> QuantizationConfig:
    group = Fields(f"{groups.where}: {name}", groups.object(name) or {})
    for key in ("input_activations", "output_activations"):
        if group.data.get(key) is not None:
            raise group.error(key, "null (activations are not quantised)")
    group.choice("format", ("pack-quantized",))
    weights = Fields(f"{group.where}: weights", group.object("weights") or {})
    _four_bits(weights, "num_bits")
    weights.choice("type", ("int",))
    if weights.boolean("dynamic", False):
        raise weights.error("dynamic", "false")
    strategy = weights.choice("strategy", ("group", "channel"))
    if strategy is None:
        strategy = "group" if weights.has("group_size") else "channel"
    size = _group_size(weights, "group_size") if strategy == "group" else WHOLE_ROW
    return QuantizationConfig("compressed-tensors", size, weights.boolean("symmetric", True))


def _fastserve(fields: Fields) -> QuantizationConfig:
    """Ours: the tensors of pack-quantized, each linear with zero points, with minimums or with neither, beside int8
    matrices. Which is which is seen from the tensors."""
    if fields.data.get("bits") not in (4, 8) or type(fields.data["bits"]) is not int:
        raise fields.error("bits", "4, or 8 where all quantised matrices are int8")
    return QuantizationConfig("fastserve", _group_size(fields, "group_size"))


def fastserve_config(group_size: int, bits: int = 4) -> dict[str, Any]:
    """The quantization_config that `fastserve convert` and `fastserve quantize` write where there are minimums or int8
    matrices; bits: of the linears."""
    return {"quant_method": "fastserve", "bits": bits, "group_size": group_size}


def compressed_tensors_config(group_size: int, symmetric: bool, not_int4: Sequence[str] = ()) -> dict[str, Any]:
    """The same for weights without minimums, as other engines read it; `not_int4` names linears that stay dense.
    A group size of -1: one group per row."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *not_int4],
    }


_READERS = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors, "fastserve": _fastserve}
