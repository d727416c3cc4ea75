# SPDX-License-Identifier: Apache-2.0
"""The only class that touches a device: it owns the model, the KV cache and the buffers, and runs step plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fastserve import _native
from fastserve.config import EngineConfig
from fastserve.engine.batch import BatchBuilder, StepBuffers, StepViews
from fastserve.engine.memory import MemoryPlan, free_memory_bytes, plan_memory
from fastserve.engine.sampler import Sampler
from fastserve.engine.scheduler import StepItem, StepPlan
from fastserve.errors import FastserveError
from fastserve.model_config import ModelConfig
from fastserve.models import model_class_for
from fastserve.outputs import SampledToken
from fastserve.weights.safetensors import open_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelRunner:
    """Runs one model on one device.

    Loading raises ModelLoadError for a bad folder and FastserveError when memory does not suffice. `progress` is
    called as (layers loaded, layers).
    """

    def __init__(
        self, model_dir: str | Path, config: EngineConfig, progress: Callable[[int, int], None] | None = None
    ) -> None:
        if config.device == "cuda":
            raise FastserveError("device='cuda': this build has CPU kernels only; use device='auto' or 'cpu'")
        _native.set_num_threads(config.num_threads or _native.num_physical_cores())
        torch.set_num_threads(1)  # inside a step the native pool has the cores
        self.config = config
        self.model_config = ModelConfig.from_dir(model_dir)
        model_class = model_class_for(self.model_config.architecture)
        dtype = _weight_dtype(config, self.model_config)
        kv_dtype = _kv_dtype(config, dtype)
        model_max_len = self.model_config.max_position_embeddings
        with torch.inference_mode(), open_checkpoint(model_dir) as checkpoint:
            longest = min(config.max_model_len or model_max_len, model_max_len)
            self.model = model_class(self.model_config, checkpoint, dtype, longest, progress)
            max_logit_rows = min(config.max_num_seqs, config.max_num_batched_tokens)
            self.buffers = StepBuffers(
                self.model_config, list(self.model.linears()), config.max_num_batched_tokens, max_logit_rows
            )
        m = self.model_config
        block_elements = m.num_layers * 2 * m.num_kv_heads * config.block_size * m.head_dim
        self.memory_plan: MemoryPlan = plan_memory(
            config,
            block_bytes=block_elements * kv_dtype.itemsize,
            weight_bytes=self.model.num_bytes,
            buffer_bytes=self.buffers.num_bytes,
            model_max_len=model_max_len,
            free_bytes=free_memory_bytes(),
        )
        shape = (self.memory_plan.num_blocks, 2, m.num_kv_heads, config.block_size, m.head_dim)
        self.kv_cache = [torch.empty(shape, dtype=kv_dtype) for _ in range(m.num_layers)]
        self.batches = BatchBuilder(m, config.block_size)
        self.sampler = Sampler(m.vocab_size, max_logit_rows, self.eos_token_ids)

    @property
    def num_blocks(self) -> int:
        return self.memory_plan.num_blocks

    @property
    def vocab_size(self) -> int:
        return self.model_config.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset(self.model_config.eos_token_ids)

    @property
    def max_model_len(self) -> int:
        return self.memory_plan.max_model_len

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[SampledToken | None]:
        """Compute the plan's tokens. Returns, per item, the sampled next token, or None where the item does not
        reach its request's last known token."""
        for request_id in plan.finished:
            self.sampler.forget(request_id)
        batch = self.batches.build(plan)
        views = self.buffers.rows(batch.num_tokens)
        self.model.forward(batch, self.kv_cache, views)
        results: list[SampledToken | None] = [None] * len(plan.items)
        sampling = [index for index, item in enumerate(plan.items) if item.sample]
        if sampling:  # never more than max_num_seqs, which is what the logits buffer holds
            logits = self._logits([batch.row_starts[index + 1] - 1 for index in sampling], views)
            tokens = self.sampler.sample(logits, [plan.items[index].request for index in sampling])
            for index, token in zip(sampling, tokens, strict=True):
                results[index] = token
        for index, item in enumerate(plan.items):
            if item.request.params.prompt_logprobs is not None:
                prompt = self._prompt_logprobs(item, batch.row_starts[index], views)
                if prompt:
                    results[index] = replace(results[index] or SampledToken(None), prompt=prompt)
        return results

    def _logits(self, rows: list[int], views: StepViews) -> torch.Tensor:
        return self.model.logits(torch.tensor(rows, dtype=torch.int64), views, self.buffers)

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
        for name in ("model", "kv_cache", "buffers", "batches", "sampler"):
            if hasattr(self, name):
                delattr(self, name)


def _weight_dtype(config: EngineConfig, model: ModelConfig) -> torch.dtype:
    """'auto' keeps the checkpoint's own dtype: on the CPU all three are computed with float32 sums."""
    return DTYPES[model.torch_dtype or "float32"] if config.dtype == "auto" else DTYPES[config.dtype]


def _kv_dtype(config: EngineConfig, weights: torch.dtype) -> torch.dtype:
    if config.kv_cache_dtype == "auto":
        return torch.float32 if weights == torch.float32 else torch.bfloat16
    if config.kv_cache_dtype == "float16":
        raise FastserveError("kv_cache_dtype='float16' is not available on the CPU; use auto, bfloat16 or float32")
    return DTYPES[config.kv_cache_dtype]
