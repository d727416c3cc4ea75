# SPDX-License-Identifier: Apache-2.0
"""The Llama family: pre-norm decoder, rotary positions, grouped-query attention, gated SiLU MLP.

Mistral (windows), Qwen2 (q/k/v bias) and Qwen3 (per-head q/k norm) are the same graph with a switch of
ModelConfig set, so they share this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fastserve.engine.batch import Batch, StepBuffers, StepViews
from fastserve.engine.device import Device
from fastserve.engine.memory import give_back_freed_memory
from fastserve.errors import ModelLoadError
from fastserve.layers import (
    Embedding,
    Int8Linear,
    Linear,
    Precision,
    RMSNorm,
    can_gate,
    make_int4_linear,
    make_linear,
    num_bytes,
)
from fastserve.model_config import ModelConfig
from fastserve.rope import cos_sin_table
from fastserve.weights.int8 import Int8Weight, round_int8
from fastserve.weights.quantization_config import QuantizationConfig
from fastserve.weights.quantized import QuantizedWeight
from fastserve.weights.quantized_checkpoint import QuantizedCheckpoint
from fastserve.weights.safetensors import Checkpoint

# Buffers that older checkpoints carry and that are computed here.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)

Parts = list[tuple[str, int]]  # projections of the same input: names in the checkpoint, and their outputs


def projections(config: ModelConfig, index: int) -> dict[str, tuple[Parts, int]]:
    """The linears of a layer and the width of their inputs."""
    width, mlp, head = config.hidden_size, config.intermediate_size, config.head_dim
    num_q, num_kv = config.num_heads * head, config.num_kv_heads * head
    attention, feed_forward = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
    qkv = [(attention + "q_proj", num_q), (attention + "k_proj", num_kv), (attention + "v_proj", num_kv)]
    return {
        "qkv": (qkv, width),
        "o": ([(attention + "o_proj", width)], num_q),
        "gate_up": ([(feed_forward + "gate_proj", mlp), (feed_forward + "up_proj", mlp)], width),
        "down": ([(feed_forward + "down_proj", width)], mlp),
    }


class Model:
    """Weights and forward pass. Owns its weights; borrows the batch, the KV cache and the buffers of a step."""

    architectures = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        device: Device,
        precision: Precision,
        max_model_len: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Load the weights in `precision` onto the device; `progress(layers done, layers)` is called after each layer.

        Raises ModelLoadError naming tensors that are missing, unexpected or of the wrong shape.
        """
        self.config = config
        self.ops = device.ops
        weights = self.open_weights(config, checkpoint, device, precision)
        for index in range(config.num_layers):
            for parts, in_features in projections(config, index).values():
                weights.check_headers(parts, in_features)  # before anything is read or allocated
        width, head = config.hidden_size, config.head_dim
        table = weights.vocabulary("model.embed_tokens", config.vocab_size, width)
        self.embedding = Embedding(device, table)
        if config.tie_word_embeddings:
            weights.drop("lm_head.weight")
            self.lm_head = weights.lm_head(table)
        elif weights.is_int4("lm_head"):
            self.lm_head = weights.linear([("lm_head", config.vocab_size)], width, bias=False)
        else:
            self.lm_head = weights.lm_head(weights.vocabulary("lm_head", config.vocab_size, width))
        del table  # the largest tensors first: nothing else is there yet when they are there twice
        weights.release()
        self.layers = []
        for index in range(config.num_layers):
            self.layers.append(Layer(config, weights, index))
            weights.release()
            if progress is not None:
                progress(index + 1, config.num_layers)
        self.norm = weights.norm("model.norm.weight", width, config.rms_norm_eps)
        weights.check_all_taken()
        self.cos_sin = device.upload(cos_sin_table(config.rope, head, max_model_len))

    @staticmethod
    def open_weights(config: ModelConfig, checkpoint: Checkpoint, device: Device, precision: Precision) -> Weights:
        """What `layer` takes its weights from. With it a model can be gone through one layer at a time."""
        return Weights(checkpoint, config.quantization, device, precision)

    @staticmethod
    def layer(config: ModelConfig, weights: Weights, index: int) -> Layer:
        return Layer(config, weights, index)

    @property
    def num_bytes(self) -> int:
        layers = sum(layer.num_bytes for layer in self.layers)
        return layers + self.embedding.num_bytes + self.lm_head.num_bytes + num_bytes(self.cos_sin)

    def linears(self) -> Iterator[Linear]:
        for layer in self.layers:
            yield from (layer.qkv, layer.o, layer.gate_up, layer.down)
        yield self.lm_head

    def forward(self, batch: Batch, kv_cache: list[torch.Tensor], views: StepViews) -> None:
        """Compute all rows of the batch and write their keys and values to the cache. Leaves the hidden states in
        `views.residual` and `views.sublayer_out`, not yet added, for `logits`."""
        self.embedding(views.residual, batch.token_ids)
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            layer.forward(batch, cache, self.cos_sin, views)

    def logits(self, rows: torch.Tensor, views: StepViews, buffers: StepBuffers) -> None:
        """The logits of some rows (int32 [R], R <= buffers.max_logit_rows) of the step just computed, for
        `buffers.float_logits`."""
        num_rows = rows.shape[0]
        hidden, residual = buffers.logit_rows[:num_rows], buffers.logit_residual[:num_rows]
        self.ops.embedding(hidden, rows, views.sublayer_out)  # gathers rows of any matrix
        self.ops.embedding(residual, rows, views.residual)
        self.norm(hidden, hidden, residual)
        self.lm_head(buffers.head_out[:num_rows], hidden, buffers.workspace)


class Layer:
    """One decoder layer. Its linears are `qkv`, `o`, `gate_up` and `down`."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        width, head = config.hidden_size, config.head_dim
        prefix = f"model.layers.{index}."
        attention = prefix + "self_attn."
        linears = projections(config, index)

        self.ops = weights.device.ops
        self.is_first = index == 0
        self.input_norm = weights.norm(prefix + "input_layernorm.weight", width, config.rms_norm_eps)
        self.post_norm = weights.norm(prefix + "post_attention_layernorm.weight", width, config.rms_norm_eps)
        self.qkv = weights.linear(*linears["qkv"], config.qkv_bias)
        self.o = weights.linear(*linears["o"], config.o_bias)
        self.gate_up = weights.linear(*linears["gate_up"], config.mlp_bias, is_gated=True)
        self.down = weights.linear(*linears["down"], config.mlp_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = weights.norm(attention + "q_norm.weight", head, config.rms_norm_eps).weight
            self.k_norm = weights.norm(attention + "k_norm.weight", head, config.rms_norm_eps).weight
        self.eps = config.rms_norm_eps
        self.scale = head**-0.5
        self.window = config.layer_windows[index] or 0

    @property
    def num_bytes(self) -> int:
        return sum(linear.num_bytes for linear in (self.qkv, self.o, self.gate_up, self.down))

    def forward(self, batch: Batch, cache: torch.Tensor, cos_sin: torch.Tensor, views: StepViews) -> None:
        residual, normed, out, workspace = views.residual, views.normed, views.sublayer_out, views.workspace
        if self.is_first:
            self.input_norm(normed, residual)  # no sublayer has added to it yet
        else:
            self.input_norm(normed, out, residual)
        self.qkv(views.qkv, normed, workspace)
        self.ops.rope_kv_write(
            views.q, views.k, views.v, batch.positions, batch.slot_mapping, cos_sin, cache,
            self.q_norm, self.k_norm, self.eps,
        )  # fmt: skip
        work = batch.attention[self.window]
        self.ops.attention(
            views.attention_heads, views.q, cache, batch.block_tables, work.items, work.merges, work.parts,
            work.workspace, work.counters, self.scale, work.span, self.window,
        )  # fmt: skip
        self.o(out, views.attention, workspace)
        self.post_norm(normed, out, residual)
        if self.gate_up.is_gated:
            self.gate_up(views.gated, normed, workspace)
        else:
            self.gate_up(views.gate_up, normed, workspace)
            self.ops.silu_mul(views.gated, views.gate_up)
        self.down(out, views.gated, workspace)


class Weights:
    """Takes tensors out of a checkpoint one by one, so that what is left over can be named."""

    def __init__(
        self, checkpoint: Checkpoint, quantization: QuantizationConfig | None, device: Device, precision: Precision
    ) -> None:
        self.checkpoint = checkpoint
        self.quantized = None if quantization is None else QuantizedCheckpoint(checkpoint, quantization)
        self.device = device
        self.precision = precision
        self.dtype = precision.dtype
        self.keeps_int8_linears = precision.keep_int8 and device.has_int8
        self.left = {name for name in checkpoint.names() if not name.endswith(IGNORED_SUFFIXES)}

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self.checkpoint:
            raise ModelLoadError(f"the checkpoint has no tensor {name!r} (expected shape {list(shape)})")
        if self.checkpoint.shape(name) != shape:
            raise ModelLoadError(
                f"tensor {name!r} has shape {list(self.checkpoint.shape(name))}; config.json asks for {list(shape)}"
            )
        tensor = self.checkpoint.tensor(name)
        if not tensor.is_floating_point():
            raise ModelLoadError(f"tensor {name!r} is {tensor.dtype}; expected float32, float16 or bfloat16")
        self.left.discard(name)
        return tensor.to(self.dtype)

    def check_headers(self, parts: Parts, in_features: int) -> None:
        """Raises ModelLoadError for the first quantised tensor of these linears whose header cannot be right."""
        for name, rows in parts:
            if self.quantized is not None and (self.is_int4(name) or self.is_int8(name)):
                self.quantized.check_headers(name, rows, in_features)

    def linear(self, parts: Parts, in_features: int, bias: bool, is_gated: bool = False) -> Linear:
        """Projections of the same input as one Linear, their outputs side by side in the order given; `is_gated`: a
        gated one for a gate and what it gates, if that can be."""
        is_gated = is_gated and can_gate(self.device, parts[0][1], bias)
        biases = [self.take(f"{name}.bias", (rows,)) for name, rows in parts] if bias else []
        bits, joined = self.precision.activation_bits, torch.cat(biases) if bias else None
        if self.precision.keep_int4 and all(self.is_int4(name) for name, _ in parts):
            codes = [self._int4(name, rows, in_features) for name, rows in parts]
            return make_int4_linear(self.device, codes, biases, bits, parts[0][0], is_gated)
        if self.keeps_int8_linears and all(self.is_int8(name) for name, _ in parts):
            weight = Int8Weight.stack([self._int8(name, rows, in_features) for name, rows in parts])
            return Int8Linear(self.device, weight, joined, bits, is_gated)
        weight = self._matrix(*parts[0], in_features)
        if len(parts) > 1:
            weight = torch.cat([weight, *(self._matrix(name, rows, in_features) for name, rows in parts[1:])])
            self.checkpoint.release()  # there is a copy now
        return make_linear(self.device, weight, joined, is_gated)

    def vocabulary(self, name: str, rows: int, in_features: int) -> torch.Tensor | Int8Weight:
        """The table of the embedding or the head. An int8 one stays so: gathering its rows works on every device."""
        if self.is_int8(name) and self.precision.keep_int8:
            return self._int8(name, rows, in_features)
        return self._matrix(name, rows, in_features)

    def lm_head(self, weight: torch.Tensor | Int8Weight) -> Linear:
        if isinstance(weight, Int8Weight):
            if self.keeps_int8_linears:
                return Int8Linear(self.device, weight, None, self.precision.activation_bits)
            return make_linear(self.device, weight.dequantize().to(self.dtype))
        if self.precision.int8_lm_head:
            return Int8Linear(self.device, round_int8(weight), None, self.precision.activation_bits)
        return make_linear(self.device, weight)

    def is_int4(self, name: str) -> bool:
        return self.quantized is not None and self.quantized.holds(name)

    def is_int8(self, name: str) -> bool:
        return self.quantized is not None and self.quantized.holds_int8(name)

    def _matrix(self, name: str, rows: int, in_features: int) -> torch.Tensor:
        """The weight [rows, in_features] of a linear; a quantised one is dequantised."""
        if self.is_int4(name):
            return self._int4(name, rows, in_features).dequantize().to(self.dtype)
        if self.is_int8(name):
            return self._int8(name, rows, in_features).dequantize().to(self.dtype)
        return self.take(f"{name}.weight", (rows, in_features))

    def _int4(self, name: str, rows: int, in_features: int) -> QuantizedWeight:
        assert self.quantized is not None
        weight = self.quantized.read(name, rows, in_features)
        self.left -= set(self.quantized.tensor_names(name))
        return weight

    def _int8(self, name: str, rows: int, in_features: int) -> Int8Weight:
        assert self.quantized is not None
        weight = self.quantized.read_int8(name, rows, in_features)
        self.left -= set(self.quantized.tensor_names(name))
        return weight

    def norm(self, name: str, width: int, eps: float) -> RMSNorm:
        return RMSNorm(self.device, self.take(name, (width,)), eps)

    def release(self) -> None:
        """Gives back the memory of tensors that were read, and of what was made of them on the way to the device."""
        self.checkpoint.release()
        give_back_freed_memory()

    def drop(self, name: str) -> None:
        self.left.discard(name)

    def check_all_taken(self) -> None:
        if self.left:
            names = sorted(self.left)
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ModelLoadError(
                f"the checkpoint holds {len(names)} tensors that this architecture does not use: {shown}"
            )
