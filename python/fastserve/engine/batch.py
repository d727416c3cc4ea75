# SPDX-License-Identifier: Apache-2.0
"""From a StepPlan to the flat tensors of one step, and the buffers that a step works in."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fastserve import _native
from fastserve.engine.device import Device
from fastserve.engine.scheduler import StepPlan
from fastserve.layers import DecoderLayer, Linear
from fastserve.model_config import ModelConfig

# Blocks of a span: attention over longer contexts is cut only at multiples of it, so that results do not depend on
# how a step's work was shared out, and prefixes are shared in whole spans. 256 tokens with the default block size.
ATTENTION_SPAN = 8


@dataclass(frozen=True)
class AttentionWork:
    """A step's attention, planned for one window size; the same for all layers with that window."""

    items: torch.Tensor  # int32 [items, 10], see csrc/plan/attention_plan.h
    merges: torch.Tensor  # int32 [merges, 5]
    parts: torch.Tensor  # int32 [parts]
    workspace: torch.Tensor  # float32, partial results
    counters: torch.Tensor  # int32, zeros whenever no attention is running
    span: int


class Batch:
    """One step as tensors, until the next one is built. Rows are the step's tokens, request after request.

    Requests stand depth-first in the tree of the prefixes that they share, not in the plan's order: so the readers of
    a prefix are neighbours, and attention reads it once for all of them. No result depends on the order of rows.

    `graph_key`: what a recording of this step depends on; None if it is not to be recorded. `forward_key`: the same of
    its forward pass, without the logits.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        memory: torch.Tensor,
        num_rows: int,
        graph_key: Hashable | None,
        forward_key: Hashable | None,
    ) -> None:
        self._builder = builder
        self._memory = memory
        self.num_rows = num_rows  # the step's tokens; if recorded, perhaps with padding that nobody reads
        self.graph_key = graph_key
        self.forward_key = forward_key

    # Made when asked for: a step that is replayed needs none of them.

    @cached_property
    def _tensors(self) -> list[torch.Tensor]:
        recorded = self.graph_key is not None or self.forward_key is not None
        return self._builder.device.views(self._memory, self._builder.arrays, recorded=recorded)

    @property
    def token_ids(self) -> torch.Tensor:
        """int32 [T]"""
        return self._tensors[0]

    @property
    def positions(self) -> torch.Tensor:
        """int32 [T]"""
        return self._tensors[1]

    @property
    def slot_mapping(self) -> torch.Tensor:
        """int32 [T], block * block_size + offset of the token's key and value"""
        return self._tensors[2]

    @property
    def block_tables(self) -> torch.Tensor:
        """int32 [requests, longest table], -1 padded"""
        return self._tensors[3]

    @property
    def sample_rows(self) -> torch.Tensor:
        """int32, the last row of each item that samples, in the plan's order; if none does, perhaps one without
        meaning"""
        return self._tensors[4]

    @cached_property
    def attention(self) -> dict[int, AttentionWork]:
        """By window, 0 = none."""
        b, work = self._builder, iter(self._tensors[5:])
        return {
            window: AttentionWork(next(work), next(work), next(work), b.workspace, b.counters, b.span)
            for window in b.windows
        }

    @property
    def row_starts(self) -> list[int]:
        """First row of each item of the plan, in the plan's order."""
        return self._builder.arrays.row_starts


class BatchBuilder:
    """Makes Batches; keeps what is the same for all steps.

    `windows` are the distinct attention windows of the model's layers, 0 for none. On a device with graphs a step of
    decodes alone, of at most `max_decodes` requests, can be recorded; and if graphs take arrays of other shapes than
    they were made with, so can the forward pass of any step of `full_rows` tokens: full steps follow one another.
    """

    def __init__(
        self, device: Device, config: ModelConfig, block_size: int, max_decodes: int, full_rows: int = 0
    ) -> None:
        self.device = device
        self.config = config
        self.span = ATTENTION_SPAN * block_size
        self.windows = sorted({window or 0 for window in config.layer_windows})
        self.arrays = _native.StepArrays(
            self.windows,
            block_size=block_size,
            span=self.span,
            group_size=config.num_heads // config.num_kv_heads,
            num_kv_heads=config.num_kv_heads,
            rows_per_item=device.rows_per_item,
            rows_per_shared_item=device.rows_per_shared_item,
            rows_per_warp=device.rows_per_warp,
            rows_per_token_read=device.rows_per_token_read,
            fold_levels=device.attention_fold_levels,
            max_decodes=max_decodes if device.has_graphs else 0,
            fixed_shapes=device.graphs_fix_shapes,
        )
        self._full_rows = full_rows if device.has_graphs and not device.graphs_fix_shapes else 0
        self.workspace = device.empty((0,), torch.float32)
        self.counters = device.upload(torch.zeros(0, dtype=torch.int32))
        self._num_floats = self._num_counters = 0  # theirs
        self._generation = 0  # of the two: a recording holds their addresses

    def build(self, plan: StepPlan) -> Batch:
        arrays = self.arrays
        key, num_rows, size, num_slots, num_merges = arrays.build(plan.items, self.device.attention_workers)
        self._reserve(num_slots, num_merges)
        memory = self.device.stage(arrays, size)
        memories = (self._generation, self.device.stage_generation)
        forward_key = ("forward", num_rows, memories) if key is None and num_rows == self._full_rows else None
        return Batch(self, memory, num_rows, key and (key, memories), forward_key)

    def _reserve(self, num_slots: int, num_merges: int) -> None:
        """Room for the attention of a step. One workspace serves all layers: they run one after another."""
        config, device = self.config, self.device
        num_floats = num_slots * config.num_heads * (config.head_dim + 2)
        num_floats += device.attention_workspace_floats(config.head_dim)
        num_counters = 2 + num_merges * config.num_kv_heads
        if self._num_floats < num_floats:
            self._num_floats = 2 * num_floats
            self.workspace = device.empty((self._num_floats,), torch.float32)
            self._generation += 1
        if self._num_counters < num_counters:
            self._num_counters = 2 * num_counters
            self.counters = device.upload(torch.zeros(self._num_counters, dtype=torch.int32))
            self._generation += 1


class StepBuffers:
    """All activations of a step, allocated once for `max_num_tokens` rows and cut to size per step.

    `rows(num_tokens)` returns a view of the first rows of every buffer; views of the sizes in use are kept, since
    the same sizes come back step after step.
    """

    def __init__(
        self,
        device: Device,
        config: ModelConfig,
        dtype: torch.dtype,
        layers: Sequence[DecoderLayer],
        lm_head: Linear | None,
        max_num_tokens: int,
        max_logit_rows: int,
    ) -> None:
        """`dtype` is that of the activations, but for those that all linears which read them round to bfloat16; logits
        are always float32."""
        width, head = config.hidden_size, config.head_dim
        self.max_logit_rows = max_logit_rows
        self.num_q, self.num_kv = config.num_heads * head, config.num_kv_heads * head
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, head

        def floats(rows: int, columns: int) -> torch.Tensor:
            return device.empty((rows, columns), dtype)

        def operands(columns: int, rounded: bool) -> torch.Tensor:
            """What linears read. Rows an odd number of cache lines apart lie in different sets of a cache."""
            if not rounded:
                return floats(max_num_tokens, columns)
            padded = (-(-columns // 32) | 1) * 32
            return device.empty((max_num_tokens, padded), torch.bfloat16)[:, :columns]

        mlp = config.intermediate_size
        is_gated = all(layer.gate_up.is_gated for layer in layers)
        takes_gated = all(layer.gate_up.takes_bf16 and layer.down.takes_bf16 for layer in layers)
        self.residual = floats(max_num_tokens, width)
        self.normed = operands(width, all(layer.qkv.takes_bf16 and layer.gate_up.takes_bf16 for layer in layers))
        self.sublayer_out = floats(max_num_tokens, width)
        self.qkv = floats(max_num_tokens, self.num_q + 2 * self.num_kv)
        self.attention = operands(self.num_q, all(layer.o.takes_bf16 for layer in layers))
        self.gate_up = floats(max_num_tokens, 0 if is_gated else 2 * mlp)
        self.gated = operands(mlp, is_gated and takes_gated)
        self.logit_rows = floats(max_logit_rows, width)
        self.logit_residual = floats(max_logit_rows, width)
        self.logits = device.empty((max_logit_rows, config.vocab_size), torch.float32)
        # What the head writes: the logits themselves, or narrower ones.
        self.head_out = self.logits if dtype == torch.float32 else floats(max_logit_rows, config.vocab_size)
        linears = [linear for layer in layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        linears += [] if lm_head is None else [lm_head]
        workspace_bytes = max(linear.workspace_bytes(max(max_num_tokens, max_logit_rows)) for linear in linears)
        self.workspace = device.empty((workspace_bytes,), torch.uint8)
        self._views: dict[int, StepViews] = {}
        self._logit_views: dict[int, torch.Tensor] = {}  # torch takes up to 0.1 ms for a slice when caches are cold

    @property
    def num_bytes(self) -> int:
        tensors = {id(t): t for t in vars(self).values() if isinstance(t, torch.Tensor)}
        return sum(t.shape[0] * t.stride(0) * t.element_size() for t in tensors.values())

    def float_logits(self, num_rows: int) -> torch.Tensor:
        """float32 [num_rows, vocab_size], what the head has written last; valid until the next call. Not for recorded
        work: it may be torch that widens them."""
        logits = self._logit_views.get(num_rows)
        if logits is None:
            logits = self._logit_views[num_rows] = self.logits[:num_rows]
        if self.head_out is not self.logits:
            logits.copy_(self.head_out[:num_rows])
        return logits

    def rows(self, num_tokens: int) -> StepViews:
        views = self._views.get(num_tokens)
        if views is None:
            views = self._views[num_tokens] = StepViews(self, num_tokens)
        return views


class StepViews:
    """The buffers of a step with exactly `num_tokens` rows."""

    def __init__(self, buffers: StepBuffers, num_tokens: int) -> None:
        b, rows = buffers, slice(0, num_tokens)
        self.residual, self.normed = b.residual[rows], b.normed[rows]
        self.sublayer_out = b.sublayer_out[rows]
        self.qkv = b.qkv[rows]
        q, k, v = self.qkv.split((b.num_q, b.num_kv, b.num_kv), dim=1)
        self.q = q.unflatten(1, (b.num_heads, b.head_dim))
        self.k = k.unflatten(1, (b.num_kv_heads, b.head_dim))
        self.v = v.unflatten(1, (b.num_kv_heads, b.head_dim))
        self.attention = b.attention[rows]
        self.attention_heads = self.attention.unflatten(1, (b.num_heads, b.head_dim))
        self.gate_up, self.gated = b.gate_up[rows], b.gated[rows]
        self.workspace = b.workspace
