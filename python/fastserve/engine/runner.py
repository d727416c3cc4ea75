# SPDX-License-Identifier: Apache-2.0
"""The only class that touches a device: it owns the model, the KV cache and the buffers, and runs step plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fastserve.config import EngineConfig
from fastserve.engine.batch import Batch, BatchBuilder, StepBuffers, StepViews
from fastserve.engine.device import DTYPES, Device, make_device
from fastserve.engine.memory import MemoryPlan, plan_memory
from fastserve.engine.pages_ahead import PagesAhead
from fastserve.engine.sampler import Sampler
from fastserve.engine.scheduler import StepItem, StepPlan
from fastserve.engine.step_graphs import StepGraphs
from fastserve.layers import Precision
from fastserve.model_config import ModelConfig
from fastserve.models import model_class_for
from fastserve.outputs import SampledToken
from fastserve.request import Request
from fastserve.weights.safetensors import open_checkpoint

# A layer's keys and values from this size on begin in a huge page of their own, which makes a decode of 64 requests 2 %
# faster. Smaller ones lie in one piece: the half page that each would waste at its end is too much of them.
LAYER_BYTES_APART = 64 << 20


class ModelRunner:
    """Runs one model on one device, by default the one that `config` names.

    Loading raises ModelLoadError for a bad folder and FastserveError when memory does not suffice. `progress` is
    called as (layers loaded, layers).
    """

    def __init__(
        self,
        model_dir: str | Path,
        config: EngineConfig,
        progress: Callable[[int, int], None] | None = None,
        device: Device | None = None,
    ) -> None:
        self.device = device or make_device(config)
        self.config = config
        self.device.check_block_size(config.block_size)
        self.model_config = ModelConfig.from_dir(model_dir)
        model_class = model_class_for(self.model_config.architecture)
        dtype = self.device.weight_dtype(config.dtype, DTYPES[self.model_config.torch_dtype or "float32"])
        kv_dtype = self.device.kv_dtype(config.kv_cache_dtype, dtype)
        model_max_len = self.model_config.max_position_embeddings
        with open_checkpoint(model_dir) as checkpoint:
            longest = min(config.max_model_len or model_max_len, model_max_len)
            precision = Precision.of(config, self.device, dtype)
            self.model = model_class(self.model_config, checkpoint, self.device, precision, longest, progress)
            max_logit_rows = min(config.max_num_seqs, config.max_num_batched_tokens)
            self.buffers = StepBuffers(
                self.device,
                self.model_config,
                self.device.activation_dtype(dtype),
                self.model.layers,
                self.model.lm_head,
                config.max_num_batched_tokens,
                max_logit_rows,
            )
        m = self.model_config
        block_elements = m.num_layers * 2 * m.num_kv_heads * config.block_size * m.head_dim
        self.memory_plan: MemoryPlan = plan_memory(
            config,
            block_bytes=block_elements * kv_dtype.itemsize,
            weight_bytes=self.model.num_bytes,
            buffer_bytes=self.buffers.num_bytes,
            model_max_len=model_max_len,
            free_bytes=self.device.free_memory_bytes(),
        )
        shape = (self.memory_plan.num_blocks, 2, m.num_kv_heads, config.block_size, m.head_dim)
        if self.memory_plan.kv_bytes < m.num_layers * LAYER_BYTES_APART:
            self.kv_cache = list(self.device.empty((m.num_layers, *shape), kv_dtype))
        else:
            self.kv_cache = [self.device.empty(shape, kv_dtype) for _ in range(m.num_layers)]
        self.pages = PagesAhead(self.kv_cache)
        self.batches = BatchBuilder(
            self.device, m, config.block_size, max_logit_rows, full_rows=config.max_num_batched_tokens
        )
        self.graphs = StepGraphs(self.device, self.batches.arrays)
        self.sampler = Sampler(self.device, m.vocab_size, max_logit_rows, self.eos_token_ids)

    @property
    def num_blocks(self) -> int:
        return self.memory_plan.num_blocks

    @property
    def num_kv_tokens(self) -> int:
        """Tokens of all requests of all steps so far: attention's work for one KV head."""
        return self.batches.arrays.num_kv_tokens

    @property
    def num_kv_tokens_spared(self) -> int:
        """Of these, those read once for several requests: for all readers but one."""
        return self.batches.arrays.num_kv_tokens_spared

    @property
    def vocab_size(self) -> int:
        return self.model_config.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset(self.model_config.eos_token_ids)

    @property
    def max_model_len(self) -> int:
        return self.memory_plan.max_model_len

    def run(self, plan: StepPlan) -> list[SampledToken | None]:
        """Compute the plan's tokens. Returns, per item, the sampled next token, or None where the item does not
        reach its request's last known token."""
        with self.pages.step(max(item.request.block_ids[-1] for item in plan.items)):
            return self._run(plan)

    def _run(self, plan: StepPlan) -> list[SampledToken | None]:
        for request_id in plan.finished:
            self.sampler.forget(request_id)
        batch = self.batches.build(plan)
        views = self.buffers.rows(batch.num_rows)
        if batch.graph_key is not None:  # decodes alone
            self.graphs.run(batch.graph_key, lambda: self._forward_and_logits(batch, views))
            return list(self._sample([item.request for item in plan.items]))
        if batch.forward_key is not None:  # a full step
            self.graphs.run(batch.forward_key, lambda: self._forward(batch, views))
        else:
            self._forward(batch, views)
        results: list[SampledToken | None] = [None] * len(plan.items)
        sampling = [index for index, item in enumerate(plan.items) if item.sample]
        if sampling:  # never more than max_num_seqs, which is what the logits buffer holds
            self.model.logits(batch.sample_rows, views, self.buffers)
            tokens = self._sample([plan.items[index].request for index in sampling])
            for index, token in zip(sampling, tokens, strict=True):
                results[index] = token
        for index, item in enumerate(plan.items):
            if item.request.params.prompt_logprobs is not None:
                prompt = self._prompt_logprobs(item, batch.row_starts[index], views)
                if prompt:
                    results[index] = (results[index] or SampledToken(None))._replace(prompt=prompt)
        return results

    def _sample(self, requests: list[Request]) -> list[SampledToken]:
        return self.sampler.sample(self.buffers.float_logits(len(requests)), requests)

    def _forward(self, batch: Batch, views: StepViews) -> None:
        """Queues the hidden states of all rows, into `views`."""
        self.model.forward(batch, self.kv_cache, views)

    def _forward_and_logits(self, batch: Batch, views: StepViews) -> None:
        """And the logits of the rows that sample, into the buffers."""
        self._forward(batch, views)
        self.model.logits(batch.sample_rows, views, self.buffers)

    def _logits(self, rows: list[int], views: StepViews) -> torch.Tensor:
        self.model.logits(self.device.upload(torch.tensor(rows, dtype=torch.int32)), views, self.buffers)
        return self.buffers.float_logits(len(rows))

    def _prompt_logprobs(self, item: StepItem, first_row: int, views: StepViews) -> list[SampledToken]:
        """For each row of the item whose next token is in the prompt, that token with its logprobs. The logits are
        made a slice at a time: all at once they would take a vocabulary's width for every prompt token."""
        request, limit = item.request, self.buffers.max_logit_rows
        end = min(item.start + item.num_new_tokens, request.num_prompt_tokens - 1)
        tokens: list[SampledToken] = []
        for begin in range(item.start, end, limit):
            positions = range(begin, min(begin + limit, end))
            logits = self._logits([first_row + position - item.start for position in positions], views)
            following = [request.token_ids[position + 1] for position in positions]
            tokens += self.sampler.prompt_logprobs(logits, following, request.params.prompt_logprobs or 0)
        return tokens

    def close(self) -> None:
        """Give back the weights, the KV cache and the buffers. The runner must not be used afterwards."""
        if hasattr(self, "pages"):
            self.pages.close()
        for name in ("graphs", "model", "kv_cache", "buffers", "batches", "sampler"):
            if hasattr(self, name):
                delattr(self, name)
