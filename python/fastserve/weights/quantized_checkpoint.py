# SPDX-License-Identifier: Apache-2.0
"""Int4 checkpoints (GPTQ, AWQ, compressed-tensors, our own) read into QuantizedWeight, one linear at a time, and the
int8 matrices of our own.

What must hold is checked from the headers first, then scales and zero points, and the codes are unpacked last: a lying
file is refused, by the name of its tensor, before anything of the weight's size is made.

A word is an int32 of eight nibbles, the lowest first. The layouts of a weight [N, K] in G groups:

    gptq                 qweight [K/8, N], qzeros [G, N/8], scales [G, N], g_idx [K] (the group of each input)
    awq                  qweight [K, N/8], qzeros [G, N/8], scales [G, N]; columns of a word in the order 02461357
    compressed-tensors   weight_packed [N, K/8], weight_scale [N, G], weight_zero_point [N/8, G], weight_shape [2],
                         weight_g_idx [K]
    fastserve            the same, or weight_minimum [N, G] in place of the zero points; in 8 bits weight [N, K], int8,
                         and weight_scale [N, G]
"""

from __future__ import annotations

import torch

from fastserve.errors import ModelLoadError
from fastserve.weights.int8 import Int8Weight
from fastserve.weights.quantization_config import QuantizationConfig
from fastserve.weights.quantized import SYMMETRIC_ZERO, QuantizedWeight
from fastserve.weights.safetensors import Checkpoint

NIBBLES = 8  # in a word
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # where a word keeps its columns 0 to 7
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class QuantizedCheckpoint:
    """The matrices of a checkpoint that are stored as int4 or int8, by the name before ".weight"."""

    def __init__(self, checkpoint: Checkpoint, config: QuantizationConfig) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self._codes = "qweight" if config.method in ("gptq", "awq") else "weight_packed"

    def holds(self, name: str) -> bool:
        """Whether this linear is int4; if not, its weight is stored as in any checkpoint."""
        quantized = f"{name}.{self._codes}" in self.checkpoint
        if quantized and f"{name}.weight" in self.checkpoint:
            raise ModelLoadError(f"the checkpoint has both {name}.weight and {name}.{self._codes}; which one counts?")
        return quantized

    def holds_int8(self, name: str) -> bool:
        """Whether this matrix is int8."""
        weight = f"{name}.weight"
        has_it = self.config.method == "fastserve" and weight in self.checkpoint
        return has_it and self.checkpoint.dtype(weight) == torch.int8

    def tensor_names(self, name: str) -> list[str]:
        """The tensors that `read` and `read_int8` take for this matrix; those of them that the checkpoint has."""
        if self.holds_int8(name):
            return [f"{name}.weight", f"{name}.weight_scale"]
        suffixes = {
            "gptq": ("qweight", "qzeros", "scales", "g_idx"),
            "awq": ("qweight", "qzeros", "scales"),
            "compressed-tensors": (
                "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
            ),
            "fastserve": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_minimum"),
        }[self.config.method]  # fmt: skip
        return [full for suffix in suffixes if (full := f"{name}.{suffix}") in self.checkpoint]

    def check_headers(self, name: str, num_rows: int, depth: int) -> _Parts:
        """Raises ModelLoadError naming the tensor whose dtype or shape is not that of a weight [num_rows, depth]. Reads
        no tensor's data."""
        size = self.config.group_size
        num_groups = -(-depth // size)
        part = _Parts(self.checkpoint, name, num_rows, depth, size, num_groups)
        if size % 32 != 0 and size < depth:
            raise ModelLoadError(
                f"{name}: group size {size} is not supported; multiples of 32 are, and one group per row"
            )
        if self.holds_int8(name):
            part.expect("weight", (num_rows, depth), torch.int8)
            part.expect("weight_scale", (num_rows, num_groups), *FLOATS)
        elif self.config.method in ("gptq", "awq"):
            part.divisible(num_rows, "outputs")
            if self.config.method == "gptq":
                part.divisible(depth, "inputs")
            gptq, awq = (depth // NIBBLES, num_rows), (depth, num_rows // NIBBLES)
            part.expect("qweight", gptq if self.config.method == "gptq" else awq, torch.int32)
            part.expect("qzeros", (num_groups, num_rows // NIBBLES), torch.int32)
            part.expect("scales", (num_groups, num_rows), *FLOATS)
        else:
            part.expect("weight_packed", (num_rows, -(-depth // NIBBLES)), torch.int32)
            part.expect("weight_scale", (num_rows, num_groups), *FLOATS)
            if part.has("weight_shape"):
                part.expect("weight_shape", (2,), torch.int64, torch.int32)
            if f"{name}.weight_minimum" in self.tensor_names(name):
                part.expect("weight_minimum", (num_rows, num_groups), *FLOATS)
        for group_index in ("g_idx", "weight_g_idx"):
            if f"{name}.{group_index}" in self.tensor_names(name):
                part.expect(group_index, (depth,), torch.int32, torch.int64)
        return part

    def read(self, name: str, num_rows: int, depth: int) -> QuantizedWeight:
        """The weight [num_rows, depth]. Raises ModelLoadError naming the tensor."""
        weight = self.check_headers(name, num_rows, depth)
        read = {"gptq": self._gptq, "awq": self._awq}.get(self.config.method, self._pack_quantized)
        result = read(weight)
        result.check(name)
        return result

    def read_int8(self, name: str, num_rows: int, depth: int) -> Int8Weight:
        """The same of an int8 weight."""
        part = self.check_headers(name, num_rows, depth)
        scales = part.scales("weight_scale", (num_rows, part.num_groups))
        return Int8Weight(part.tensor("weight"), scales, self.config.group_size)

    def _gptq(self, part: _Parts) -> QuantizedWeight:
        scales = part.scales("scales", (part.num_groups, part.num_rows)).T.contiguous()
        stored = unpack_nibbles(part.tensor("qzeros")).T.contiguous()
        zero_points = stored.to(torch.int16) + self.config.zero_point_offset
        order = part.input_order("g_idx")
        codes = unpack_nibbles(part.tensor("qweight").T.contiguous())
        if order is not None:
            codes = codes[:, order.long()]
        symmetric = self.config.symmetric and bool((zero_points == SYMMETRIC_ZERO).all())
        return QuantizedWeight(codes, scales, self.config.group_size, None if symmetric else zero_points, None, order)

    def _awq(self, part: _Parts) -> QuantizedWeight:
        scales = part.scales("scales", (part.num_groups, part.num_rows)).T.contiguous()
        zero_points = _awq_columns(part.tensor("qzeros")).T.contiguous().to(torch.int16)
        codes = _awq_columns(part.tensor("qweight")).T.contiguous()
        return QuantizedWeight(codes, scales, self.config.group_size, zero_points)

    def _pack_quantized(self, part: _Parts) -> QuantizedWeight:
        shape = (part.num_rows, part.num_groups)
        if part.has("weight_shape"):
            given = part.tensor("weight_shape").tolist()
            if given != [part.num_rows, part.depth]:
                raise part.error("weight_shape", f"says {given}; config.json asks for {[part.num_rows, part.depth]}")
        scales = part.scales("weight_scale", shape)
        zero_points = minimums = order = None
        if self.config.method == "compressed-tensors":
            order = part.input_order("weight_g_idx")
            if not self.config.symmetric or part.has("weight_zero_point"):
                zero_points = part.zero_points("weight_zero_point")
            if self.config.symmetric and zero_points is not None:
                if bool((zero_points != SYMMETRIC_ZERO).any()):
                    raise part.error("weight_zero_point", "is not zero although config.json says symmetric")
                zero_points = None
        else:
            if part.has("weight_minimum"):
                minimums = part.scales("weight_minimum", shape)
            if part.has("weight_zero_point"):
                zero_points = part.zero_points("weight_zero_point")
        codes = unpack_nibbles(part.tensor("weight_packed"))[:, : part.depth]
        codes = codes.contiguous() if order is None else codes[:, order.long()]
        return QuantizedWeight(codes, scales, self.config.group_size, zero_points, minimums, order)


class _Parts:
    """The tensors of one linear, each checked against its header before it is read."""

    def __init__(
        self, checkpoint: Checkpoint, name: str, num_rows: int, depth: int, group_size: int, num_groups: int
    ) -> None:
        self.checkpoint = checkpoint
        self.name = name
        self.num_rows = num_rows
        self.depth = depth
        self.group_size = group_size
        self.num_groups = num_groups

    def error(self, part: str, problem: str) -> ModelLoadError:
        return ModelLoadError(f"tensor '{self.name}.{part}' {problem}")

    def has(self, part: str) -> bool:
        return f"{self.name}.{part}" in self.checkpoint

    def tensor(self, part: str) -> torch.Tensor:
        return self.checkpoint.tensor(f"{self.name}.{part}")

    def divisible(self, size: int, what: str) -> None:
        if size % NIBBLES != 0:
            raise ModelLoadError(f"{self.name}: {size} {what} do not fill words of {NIBBLES} nibbles")

    def expect(self, part: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        if not self.has(part):
            raise self.error(part, f"is missing (expected shape {list(shape)})")
        full = f"{self.name}.{part}"
        if self.checkpoint.shape(full) != shape or self.checkpoint.dtype(full) not in dtypes:
            raise self.error(
                part,
                f"is {self.checkpoint.dtype(full)} {list(self.checkpoint.shape(full))}; expected "
                f"{' or '.join(map(str, dtypes))} {list(shape)} for a weight {[self.num_rows, self.depth]} in groups "
                f"of {self.group_size}",
            )

    def scales(self, part: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Scales or minimums as float16; one that does not fit there, or is no number, is an error."""
        self.expect(part, shape, *FLOATS)
        values = self.tensor(part).to(torch.float16)
        if not bool(torch.isfinite(values).all()):
            raise self.error(part, "holds NaN, infinity or numbers beyond 65504; every scale must be a finite float16")
        return values

    def zero_points(self, part: str) -> torch.Tensor:
        """int16 [N, G]; packed along N, or, in older files, plain int8 around 0."""
        if self.has(part) and self.checkpoint.dtype(f"{self.name}.{part}") == torch.int8:
            self.expect(part, (self.num_rows, self.num_groups), torch.int8)
            return self.tensor(part).to(torch.int16) + SYMMETRIC_ZERO
        self.expect(part, (-(-self.num_rows // NIBBLES), self.num_groups), torch.int32)
        rows = unpack_nibbles(self.tensor(part).T.contiguous())[:, : self.num_rows]
        return rows.T.contiguous().to(torch.int16)

    def input_order(self, part: str) -> torch.Tensor | None:
        """The inputs sorted by group, int32 [K], from the group of each; None where they are in order already."""
        if not self.has(part):
            return None
        self.expect(part, (self.depth,), torch.int32, torch.int64)
        groups = self.tensor(part).long()
        low, high = int(groups.min()), int(groups.max())
        if low < 0 or high >= self.num_groups:
            raise self.error(part, f"holds groups {low} to {high}; there are groups 0 to {self.num_groups - 1}")
        in_order = torch.arange(self.depth) // self.group_size
        if torch.equal(groups, in_order):
            return None
        if not torch.equal(groups.sort().values, in_order):
            raise self.error(part, f"does not give each group {self.group_size} inputs")
        return groups.argsort(stable=True).to(torch.int32)


def unpack_nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., W] -> uint8 [..., 8 W], the lowest nibble first."""
    data = words.reshape(-1).view(torch.uint8)  # little-endian, as the file
    return torch.stack((data & 15, data >> 4), dim=-1).reshape(*words.shape[:-1], -1)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K] -> int32 [..., ceil(K / 8)], the inverse of `unpack_nibbles`; what is missing at the end is 0."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % NIBBLES))
    pairs = padded.unflatten(-1, (-1, 2))
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous().view(torch.int32)


def _awq_columns(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N / 8] -> uint8 [R, N] in the order of the columns."""
    return unpack_nibbles(words).unflatten(-1, (-1, NIBBLES))[..., list(AWQ_NIBBLES)].flatten(-2)


def pack_quantized(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors of `fastserve` and, without minimums, of compressed-tensors for a weight without an input order, by
    the last part of their names."""
    if weight.input_order is not None:
        raise ValueError("pack_quantized writes no input order; its callers make none")
    tensors = {"weight_packed": pack_nibbles(weight.codes), "weight_scale": weight.scales}
    tensors["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
    if weight.minimums is not None:
        tensors["weight_minimum"] = weight.minimums
    if weight.zero_points is not None:
        rows = weight.zero_points.to(torch.uint8).T.contiguous()
        tensors["weight_zero_point"] = pack_nibbles(rows).T.contiguous()
    return tensors


def pack_int8(weight: Int8Weight) -> dict[str, torch.Tensor]:
    """The tensors of `fastserve` for an int8 weight, by the last part of their names."""
    return {"weight": weight.codes, "weight_scale": weight.scales}
