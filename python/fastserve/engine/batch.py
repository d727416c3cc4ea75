# SPDX-License-Identifier: Apache-2.0
"""From a StepPlan to the flat tensors of one step, and the buffers that a step works in."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch

from fastserve import _native
from fastserve.engine.device import Device
from fastserve.engine.scheduler import StepPlan
from fastserve.layers import Linear
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


@dataclass(frozen=True)
class Batch:
    """One step as tensors. Rows are the step's tokens, request after request.

    Requests stand depth-first in the tree of the prefixes that they share, not in the plan's order: so the readers of
    a prefix are neighbours, and attention reads it once for all of them. No result depends on the order of rows.
    """

    token_ids: torch.Tensor  # int32 [T]
    positions: torch.Tensor  # int32 [T]
    slot_mapping: torch.Tensor  # int32 [T], block * block_size + offset of the token's key and value
    block_tables: torch.Tensor  # int32 [requests, longest table], -1 padded
    attention: dict[int, AttentionWork]  # by window, 0 = none
    row_starts: tuple[int, ...]  # first row of each item of the plan, in the plan's order
    sample_rows: torch.Tensor  # int32, the last row of each item that samples, in the plan's order
    num_kv_tokens: int  # of all requests
    num_kv_tokens_spared: int  # of these, tokens of shared prefixes that need no second read, by the least window
    graph_key: Hashable | None  # what a recording of this step depends on; None: it is not to be recorded

    @property
    def num_rows(self) -> int:
        """The step's tokens; with padding rows, which nobody reads, if it is to be recorded."""
        return self.token_ids.shape[0]


class BatchBuilder:
    """Makes Batches; keeps what is the same for all steps.

    `windows` are the distinct attention windows of the model's layers, 0 for none. On a device with graphs a step of
    decodes alone, of at most `max_decodes` requests, is padded, so that few recordings serve all such steps.
    """

    def __init__(self, device: Device, config: ModelConfig, block_size: int, max_decodes: int) -> None:
        self.device = device
        self.max_decodes = max_decodes
        self.block_size = block_size
        self.config = config
        self.span = ATTENTION_SPAN * block_size
        self.windows = sorted({window or 0 for window in config.layer_windows})
        self.workspaces = {window: device.empty((0,), torch.float32) for window in self.windows}
        self.counters = device.upload(torch.zeros(0, dtype=torch.int32))

    def build(self, plan: StepPlan) -> Batch:
        num_tokens, num_requests = plan.num_tokens, len(plan.items)
        token_ids = np.empty(num_tokens, np.int32)
        positions = np.empty(num_tokens, np.int32)
        slots = np.empty(num_tokens, np.int32)
        tables = np.full((num_requests, max(len(i.request.block_ids) for i in plan.items)), -1, np.int32)
        query_start = np.zeros(num_requests + 1, np.int32)
        seq_lens = np.empty(num_requests, np.int32)
        row, size = 0, self.block_size
        for table, item in zip(tables, plan.items, strict=True):
            table[: len(item.request.block_ids)] = item.request.block_ids
        # Shared is what a request only reads: whole blocks before its first row.
        order, groups = _native.prefix_groups(tables, [item.start // size for item in plan.items], block_size=size)
        if len(groups):
            tables = tables[order]
        row_starts = [0] * num_requests
        for index, place in enumerate(order.tolist()):
            item = plan.items[place]
            request, start, count = item.request, item.start, item.num_new_tokens
            end = start + count
            row_starts[place] = row
            if count == 1:  # nearly every item of a decode-maximal step
                token_ids[row] = request.token_ids[start]
                positions[row] = start
                slots[row] = request.block_ids[start // size] * size + start % size
            else:
                rows = slice(row, row + count)
                where = np.arange(start, end, dtype=np.int32)
                token_ids[rows] = request.token_ids[start:end]
                positions[rows] = where
                slots[rows] = tables[index, where // size] * size + where % size
            row += count
            query_start[index + 1] = row
            seq_lens[index] = end
        sampling = [
            first + item.num_new_tokens - 1 for first, item in zip(row_starts, plan.items, strict=True) if item.sample
        ]
        plans = [self._plan_attention(window, query_start, seq_lens, groups) for window in self.windows]
        arrays = [token_ids, positions, slots, tables, np.array(sampling, np.int32)]
        arrays += [array for work in plans for array in (work.items, work.merges, work.parts)]
        decodes_only = num_tokens == num_requests == len(sampling) <= self.max_decodes
        recorded = self.device.has_graphs and decodes_only
        if recorded:
            arrays = _padded(arrays, self.max_decodes)
        num_counters = 2 + max(len(merges) for merges in arrays[6::3]) * self.config.num_kv_heads
        if self.counters.numel() < num_counters:
            self.counters = self.device.upload(torch.zeros(2 * num_counters, dtype=torch.int32))
        staged = self.device.stage(arrays)
        work_tensors = iter(staged[5:])
        return Batch(
            token_ids=staged[0],
            positions=staged[1],
            slot_mapping=staged[2],
            block_tables=staged[3],
            attention={
                window: AttentionWork(
                    items=next(work_tensors),
                    merges=next(work_tensors),
                    parts=next(work_tensors),
                    workspace=self.workspaces[window],
                    counters=self.counters,
                    span=self.span,
                )
                for window in self.windows
            },
            row_starts=tuple(row_starts),
            sample_rows=staged[4],
            num_kv_tokens=int(seq_lens.sum()),
            num_kv_tokens_spared=plans[0].num_tokens_spared,
            graph_key=self._graph_key(arrays) if recorded else None,
        )

    def _graph_key(self, arrays: list[np.ndarray]) -> Hashable:
        # Sizes too: an address may come back with another one.
        tensors = (*self.workspaces.values(), self.counters)
        kept = tuple((tensor.data_ptr(), tensor.numel()) for tensor in tensors)
        return tuple(array.shape for array in arrays), kept, self.device.stage_generation

    def _plan_attention(
        self, window: int, query_start: np.ndarray, seq_lens: np.ndarray, groups: np.ndarray
    ) -> _native.AttentionPlan:
        config = self.config
        plan = _native.AttentionPlan(
            query_start,
            seq_lens,
            block_size=self.block_size,
            span=self.span,
            group_size=config.num_heads // config.num_kv_heads,
            num_kv_heads=config.num_kv_heads,
            window=window,
            num_workers=self.device.attention_workers,
            rows_per_item=self.device.rows_per_item,
            rows_per_shared_item=self.device.rows_per_shared_item,
            rows_per_warp=self.device.rows_per_warp,
            groups=groups,
        )
        needed = plan.workspace_floats(config.num_heads, config.head_dim)
        needed += self.device.attention_workspace_floats(config.head_dim)
        if self.workspaces[window].numel() < needed:
            self.workspaces[window] = self.device.empty((needed,), torch.float32)
        return plan


def _padded(arrays: list[np.ndarray], max_rows: int) -> list[np.ndarray]:
    """The arrays of a step of decodes at the next larger of a few sizes. A padding row is a token at position 0 that
    is written to no slot; a padding item or merge has no rows."""
    token_ids, positions, slots, tables, sample_rows, *work = arrays
    rows = min(_next_size(len(token_ids)), max_rows)
    width = 1 << (tables.shape[1] - 1).bit_length()

    def grown(array: np.ndarray, shape: tuple[int, ...], fill: int) -> np.ndarray:
        large = np.full(shape, fill, np.int32)
        large[tuple(slice(0, extent) for extent in array.shape)] = array
        return large

    return [
        grown(token_ids, (rows,), 0),
        grown(positions, (rows,), 0),
        grown(slots, (rows,), -1),
        grown(tables, (rows, width), -1),
        grown(sample_rows, (rows,), 0),
        *(grown(array, (1 << len(array).bit_length(), *array.shape[1:]), 0) for array in work),
    ]


def _next_size(num_rows: int) -> int:
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8


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
        linears: list[Linear],
        max_num_tokens: int,
        max_logit_rows: int,
    ) -> None:
        """`dtype` is that of the activations; logits are always float32."""
        width, head = config.hidden_size, config.head_dim
        self.max_logit_rows = max_logit_rows
        self.num_q, self.num_kv = config.num_heads * head, config.num_kv_heads * head
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, head

        def floats(rows: int, columns: int) -> torch.Tensor:
            return device.empty((rows, columns), dtype)

        self.residual = floats(max_num_tokens, width)
        self.normed = floats(max_num_tokens, width)
        self.sublayer_out = floats(max_num_tokens, width)
        self.qkv = floats(max_num_tokens, self.num_q + 2 * self.num_kv)
        self.attention = floats(max_num_tokens, self.num_q)
        self.gate_up = floats(max_num_tokens, 2 * config.intermediate_size)
        self.gated = floats(max_num_tokens, config.intermediate_size)
        self.logit_rows = floats(max_logit_rows, width)
        self.logit_residual = floats(max_logit_rows, width)
        self.logits = device.empty((max_logit_rows, config.vocab_size), torch.float32)
        # What the head writes: the logits themselves, or narrower ones.
        self.head_out = self.logits if dtype == torch.float32 else floats(max_logit_rows, config.vocab_size)
        workspace_bytes = max(linear.workspace_bytes(max(max_num_tokens, max_logit_rows)) for linear in linears)
        self.workspace = device.empty((workspace_bytes,), torch.uint8).zero_()
        self._views: dict[int, StepViews] = {}

    @property
    def num_bytes(self) -> int:
        tensors = {id(t): t for t in vars(self).values() if isinstance(t, torch.Tensor)}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def float_logits(self, num_rows: int) -> torch.Tensor:
        """float32 [num_rows, vocab_size], what the head has written last; valid until the next call. Not for recorded
        work: it may be torch that widens them."""
        logits = self.logits[:num_rows]
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
