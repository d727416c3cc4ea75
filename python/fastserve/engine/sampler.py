# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens: turns the parameters of a batch of requests into the arguments of the native ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastserve.config import SamplingParams
from fastserve.engine.device import Device
from fastserve.errors import FastserveError
from fastserve.outputs import SampledToken
from fastserve.request import Request
from fastserve.structured import GrammarCompiler, Matcher

_MAX_TOP_ENTRIES = 1 << 20  # of one call of the logprobs op: bounds its outputs to 8 MB


class _SeenTokens:
    """The distinct tokens of one request and how often each is in its output, kept up to date as it grows."""

    def __init__(self) -> None:
        self._ids = np.empty(64, np.int32)
        self._output_counts = np.empty(64, np.int32)
        self._slots: dict[int, int] = {}
        self._num_read = 0

    def update(self, token_ids: list[int], num_prompt_tokens: int) -> None:
        """Takes in what `token_ids` (prompt, then output) has more than at the last call."""
        if len(token_ids) < self._num_read:  # tokens were taken back
            self._slots.clear()
            self._num_read = 0
        if self._num_read < num_prompt_tokens:
            for token_id in dict.fromkeys(token_ids[:num_prompt_tokens]):
                self._slot(token_id)
            self._num_read = num_prompt_tokens
        for token_id in token_ids[self._num_read :]:
            slot = self._slot(token_id)  # may make the arrays larger
            self._output_counts[slot] += 1
        self._num_read = len(token_ids)

    def _slot(self, token_id: int) -> int:
        slot = self._slots.get(token_id)
        if slot is None:
            slot = self._slots[token_id] = len(self._slots)
            if slot == len(self._ids):
                self._ids = np.resize(self._ids, 2 * slot)
                self._output_counts = np.resize(self._output_counts, 2 * slot)
            self._ids[slot] = token_id
            self._output_counts[slot] = 0
        return slot

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: len(self._slots)]

    @property
    def output_counts(self) -> np.ndarray:
        return self._output_counts[: len(self._slots)]


@dataclass(slots=True)
class _RequestState:
    """What is kept for a request between steps, until `Sampler.forget`."""

    request: Request
    seen: _SeenTokens | None  # if it has penalties
    allowed: torch.Tensor | None  # its mask, [ceil(V / 32)] int32, if not all tokens are allowed
    matcher: Matcher | None = None  # if its output has a structure: gives the mask of each step
    bad_words: list[list[int]] = field(default_factory=list)  # the tokens of each

    def banned(self) -> list[int]:
        """The tokens that would complete a bad word now. Only the output counts, not the prompt."""
        output = self.request.token_ids[self.request.num_prompt_tokens :] if self.bad_words else []
        return [ids[-1] for ids in self.bad_words if len(ids) == 1 or output[1 - len(ids) :] == ids[:-1]]

    def mask(self) -> torch.Tensor | None:
        """What is allowed now. A structure that cannot be followed any more allows nothing: the request ends alone."""
        if self.matcher is None:
            return self.allowed
        request = self.request
        try:
            return torch.from_numpy(self.matcher.mask(request.token_ids[request.num_prompt_tokens :]))
        except FastserveError:
            assert self.allowed is not None
            return self.allowed


@dataclass(slots=True)
class _Batch:
    """The arguments of the sample op for one list of rows; only those that change from step to step are remade."""

    rows: list[Request] = field(default_factory=list)
    states: list[_RequestState | None] = field(default_factory=list)
    arguments: dict[str, torch.Tensor] = field(default_factory=dict)
    random: bool = False  # some row draws
    penalised: bool = False
    structured: bool = False  # some row's output has a structure
    min_tokens: list[int] = field(default_factory=list)  # rows with params.min_tokens
    bad_words: list[int] = field(default_factory=list)  # rows with params.bad_words
    banned: dict[int, list[int]] | None = None  # by row, the tokens that may not come now; None: not known
    logprobs: list[int] = field(default_factory=list)  # rows that ask for logprobs
    read: Callable[[], list[int]] = list  # the tokens that the op has chosen


def _is_penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class Sampler:
    """Samples one token for each row of logits, on their device.

    vocab_size: V, the width of the logits. max_num_rows: the most rows of one call. eos_token_ids: what
    `min_tokens` bans besides the request's own stop token ids.
    """

    def __init__(
        self, device: Device, vocab_size: int, max_num_rows: int, eos_token_ids: frozenset[int] = frozenset()
    ) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self.grammars: GrammarCompiler | None = None  # for requests with structured_outputs
        self.encode: Callable[[str], list[int]] | None = None  # text to tokens, for requests with bad_words
        self._states: dict[str, _RequestState] = {}
        self._batch = _Batch()
        self._token_ids = device.empty((max_num_rows,), torch.int32)
        self._workspace = device.empty((0, 4 * vocab_size), torch.float32)
        self._num_workers = 0  # that have a part in it

    def sample(self, logits: torch.Tensor, rows: Sequence[Request]) -> list[SampledToken]:
        """The next token of each request; `logits` [len(rows), V] float32 are those of its last token, unchanged."""
        rows = list(rows)
        if self._batch.rows != rows:
            self._batch = self._make_batch(rows)
        batch = self._batch
        arguments = batch.arguments
        if batch.random:
            arguments["positions"] = self._upload([len(row.token_ids) for row in rows], torch.int32)
        if batch.penalised:
            self._list_seen_tokens(batch)
        if batch.structured:
            self._list_masks(batch)
        if batch.min_tokens or batch.bad_words:
            banned = self._banned(batch)
            if banned != batch.banned:
                self._list_bias(batch, banned)

        self._device.ops.sample(logits=logits, workspace=self._workers_workspace(), **arguments)
        token_ids = batch.read()
        if not batch.logprobs:
            return [SampledToken(token_id) for token_id in token_ids]
        return self._with_logprobs(logits, token_ids, batch)

    def prompt_logprobs(self, logits: torch.Tensor, next_ids: Sequence[int], num: int) -> list[SampledToken]:
        """For each row of `logits` [len(next_ids), V] the logprob and rank of the prompt token that follows it, and
        the `num` (-1: all V) most likely tokens in its place."""
        return self._logprobs(logits, list(next_ids), [num] * len(next_ids))

    def forget(self, request_id: str) -> None:
        """Drops what is kept for a request. Call it when the request has finished; unknown ids are ignored."""
        self._states.pop(request_id, None)
        if any(row.request_id == request_id for row in self._batch.rows):
            self._batch = _Batch()

    # --- the arguments of the op ---

    def _make_batch(self, rows: list[Request]) -> _Batch:
        params = [row.params for row in rows]
        batch = _Batch(rows, [self._state_of(row) for row in rows])
        batch.random = any(not p.greedy for p in params)
        batch.penalised = any(state is not None and state.seen is not None for state in batch.states)
        batch.structured = any(state is not None and state.matcher is not None for state in batch.states)
        batch.min_tokens = [i for i, p in enumerate(params) if p.min_tokens > 0]
        batch.bad_words = [i for i, p in enumerate(params) if p.bad_words]
        batch.logprobs = [i for i, p in enumerate(params) if p.logprobs is not None]

        arguments = batch.arguments
        arguments["token_ids"] = self._token_ids[: len(rows)]
        batch.read = self._device.reader(arguments["token_ids"])

        def put(name: str, values: list[Any], dtype: torch.dtype, neutral: float | None = None) -> None:
            if neutral is None or any(value != neutral for value in values):
                arguments[name] = self._upload(values, dtype)

        if batch.random:
            put("temperature", [0.0 if p.greedy else p.temperature for p in params], torch.float32)
            put("top_k", [min(p.top_k, self._vocab_size) for p in params], torch.int32, 0)
            put("top_p", [p.top_p for p in params], torch.float32, 1.0)
            put("min_p", [p.min_p for p in params], torch.float32, 0.0)
            put("seeds", [row.seed - 2**64 if row.seed >= 2**63 else row.seed for row in rows], torch.int64)
        if batch.penalised:
            put("repetition_penalty", [p.repetition_penalty for p in params], torch.float32)
            put("frequency_penalty", [p.frequency_penalty for p in params], torch.float32)
            put("presence_penalty", [p.presence_penalty for p in params], torch.float32)
        if not batch.structured:  # else they are listed in every step
            self._list_masks(batch)
        self._list_bias(batch, {})
        batch.banned = None
        return batch

    def _state_of(self, request: Request) -> _RequestState | None:
        params = request.params
        structured = params.structured_outputs
        if not (params.allowed_token_ids or structured or params.bad_words or _is_penalised(params)):
            return None
        state = self._states.get(request.request_id)
        if state is None or state.request is not request:
            seen = _SeenTokens() if _is_penalised(params) else None
            state = _RequestState(request, seen, self._mask_of(params))
            if structured is not None:
                if self.grammars is None:
                    raise FastserveError("structured outputs need a tokenizer; this engine has none")
                state.matcher = self.grammars.matcher(structured)
                state.allowed = torch.zeros((self._vocab_size + 31) // 32, dtype=torch.int32)
            state.bad_words = self._tokens_of(params.bad_words or ())
            self._states[request.request_id] = state
        return state

    def _tokens_of(self, bad_words: Iterable[str]) -> list[list[int]]:
        """Token ids of each text, as it is and as it follows a space: vLLM's meaning of bad_words. The second form
        counts only where the space changes the first token but not their number, so that it never bans a space."""
        found = []
        for text in bad_words:
            if self.encode is None:
                raise FastserveError("bad_words need a tokenizer; this engine has none")
            text = text.lstrip() or text
            plain, spaced = self.encode(text), self.encode(" " + text)
            if plain:
                found.append(plain)
            if spaced and len(spaced) == len(plain) and spaced[0] != plain[0]:
                found.append(spaced)
        return found

    def _banned(self, batch: _Batch) -> dict[int, list[int]]:
        banned = {}
        for i in batch.min_tokens:
            if batch.rows[i].must_go_on:
                banned[i] = sorted(self._eos_token_ids.union(batch.rows[i].params.stop_token_ids or ()))
        for i in batch.bad_words:
            state = batch.states[i]
            if state is not None and (ids := state.banned()):
                banned[i] = banned.get(i, []) + ids
        return banned

    def _mask_of(self, params: SamplingParams) -> torch.Tensor | None:
        if params.allowed_token_ids is None:
            return None
        num_words = (self._vocab_size + 31) // 32
        bits = np.zeros(32 * num_words, np.uint8)
        bits[list(params.allowed_token_ids)] = 1
        return torch.from_numpy(np.packbits(bits, bitorder="little").view("<i4").astype(np.int32))

    def _list_masks(self, batch: _Batch) -> None:
        masks: list[torch.Tensor] = []
        mask_rows = [-1] * len(batch.rows)
        for i, state in enumerate(batch.states):
            mask = None if state is None else state.mask()
            if mask is not None:
                mask_rows[i] = len(masks)
                masks.append(mask)
        if masks:
            batch.arguments["allowed"] = self._device.upload(torch.stack(masks))
            batch.arguments["allowed_rows"] = self._upload(mask_rows, torch.int32)

    def _list_bias(self, batch: _Batch, banned: dict[int, list[int]]) -> None:
        """The bias lists, in which the tokens of `banned` have -infinity in their rows."""
        batch.banned = banned
        offsets = [0]
        ids: list[int] = []
        values: list[float] = []
        for i, row in enumerate(batch.rows):
            if row.params.logit_bias:
                ids += row.params.logit_bias.keys()
                values += row.params.logit_bias.values()
            if i in banned:
                ids += banned[i]
                values += [float("-inf")] * len(banned[i])
            offsets.append(len(ids))
        if ids or "bias" in batch.arguments:
            batch.arguments["bias_offsets"] = self._upload(offsets, torch.int32)
            batch.arguments["bias_ids"] = self._upload(ids, torch.int32)
            batch.arguments["bias"] = self._upload(values, torch.float32)

    def _list_seen_tokens(self, batch: _Batch) -> None:
        offsets, ids, counts = [0], [], []
        for row, state in zip(batch.rows, batch.states, strict=True):
            if state is not None and state.seen is not None:
                state.seen.update(row.token_ids, row.num_prompt_tokens)
                ids.append(state.seen.ids)
                counts.append(state.seen.output_counts)
            offsets.append(offsets[-1] + (len(ids[-1]) if state is not None and state.seen is not None else 0))
        batch.arguments["seen_offsets"] = self._upload(offsets, torch.int32)
        batch.arguments["seen_ids"] = self._device.upload(torch.from_numpy(np.concatenate(ids)))
        batch.arguments["seen_counts"] = self._device.upload(torch.from_numpy(np.concatenate(counts)))

    def _upload(self, values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return self._device.upload(torch.tensor(values, dtype=dtype))

    def _workers_workspace(self) -> torch.Tensor:
        num_workers = self._device.sample_workers
        if self._num_workers < num_workers:
            self._num_workers = num_workers
            self._workspace = self._device.empty((num_workers, 4 * self._vocab_size), torch.float32)
        return self._workspace

    # --- logprobs ---

    def _with_logprobs(self, logits: torch.Tensor, token_ids: list[int], batch: _Batch) -> list[SampledToken]:
        sampled = [SampledToken(token_id) for token_id in token_ids]
        wanted = [i for i in batch.logprobs if token_ids[i] >= 0]
        if wanted:
            nums = [batch.rows[i].params.logprobs or 0 for i in wanted]
            chosen = logits if len(wanted) == len(token_ids) else logits[self._upload(wanted, torch.int64)]
            for i, token in zip(wanted, self._logprobs(chosen, [token_ids[i] for i in wanted], nums), strict=True):
                sampled[i] = token
        return sampled

    def _logprobs(self, logits: torch.Tensor, token_ids: list[int], nums: list[int]) -> list[SampledToken]:
        """Rows with token ids and their number of top entries, in pieces of bounded size."""
        nums = [self._vocab_size if num < 0 else min(num, self._vocab_size) for num in nums]
        rows_at_once = max(1, _MAX_TOP_ENTRIES // max(1, *nums, 1))
        sampled: list[SampledToken] = []
        for begin in range(0, len(token_ids), rows_at_once):
            piece = slice(begin, begin + rows_at_once)
            ids = self._upload(token_ids[piece], torch.int32)
            num_top = max(nums[piece])
            logprobs = self._device.empty((len(ids),), torch.float32)
            ranks = self._device.empty((len(ids),), torch.int32)
            top_ids = self._device.empty((len(ids), num_top), torch.int32)
            top_logprobs = self._device.empty((len(ids), num_top), torch.float32)
            self._device.ops.token_logprobs(
                logprobs=logprobs,
                ranks=ranks,
                top_ids=top_ids,
                top_logprobs=top_logprobs,
                logits=logits[piece],
                token_ids=ids,
                workspace=self._workers_workspace(),
            )
            columns = [self._device.fetch(t).tolist() for t in (logprobs, ranks, top_ids, top_logprobs)]
            for token_id, num, logprob, rank, tops, values in zip(token_ids[piece], nums[piece], *columns, strict=True):
                top = tuple(zip(tops[:num], values[:num], range(1, num + 1), strict=True))
                sampled.append(SampledToken(token_id, logprob, rank, top))
        return sampled
