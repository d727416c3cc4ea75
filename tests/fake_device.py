# SPDX-License-Identifier: Apache-2.0
"""A device without arithmetic: its KV cache holds the tokens themselves, its model hashes what the cache
gives it.

A block that was freed too early, shared wrongly, written twice or read before it was computed changes the
hash, and with it the tokens.
"""

import hashlib
from collections.abc import Sequence

from fastserve.engine.scheduler import StepPlan
from fastserve.outputs import SampledToken
from fastserve.request import Request


def next_token(token_ids: Sequence[int], salt: str, seed: int, vocab_size: int) -> int:
    digest = hashlib.blake2b(repr((list(token_ids), salt, seed)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocab_size


def generate_alone(
    prompt: Sequence[int],
    salt: str,
    seed: int,
    vocab_size: int,
    eos: frozenset[int],
    max_tokens: int,
    max_len: int,
) -> list[int]:
    """The tokens that a request must get, whoever else is there."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens, salt, seed, vocab_size))
        if tokens[-1] in eos or len(tokens) - len(prompt) == max_tokens or len(tokens) >= max_len:
            return tokens[len(prompt) :]


class FakeDevice:
    """Runs a plan as the real runner does: all KV of the step is written, then each row reads its context."""

    def __init__(
        self, num_blocks: int, block_size: int, vocab_size: int = 7, max_model_len: int = 64
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset({0})
        self.cache: list[list[object]] = [[None] * block_size for _ in range(num_blocks)]
        self.fail_next: BaseException | None = None

    def run(self, plan: StepPlan) -> list[SampledToken | None]:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            for item in plan.items:  # half done: what was written must never be read
                self._write(item.request, item.start, item.num_new_tokens, poison=True)
            raise error
        for item in plan.items:
            self._write(item.request, item.start, item.num_new_tokens)
        return [self._sample(item.request) if item.sample else None for item in plan.items]

    def _write(self, request: Request, start: int, count: int, poison: bool = False) -> None:
        for position in range(start, start + count):
            block = self.cache[request.block_ids[position // self.block_size]]
            token = None if poison else request.token_ids[position]
            block[position % self.block_size] = (position, request.cache_salt, token)

    def _sample(self, request: Request) -> SampledToken:
        context = []
        for position in range(len(request.token_ids)):
            entry = self.cache[request.block_ids[position // self.block_size]][position % self.block_size]
            assert isinstance(entry, tuple), f"position {position} of {request.request_id} was never computed"
            assert entry[:2] == (position, request.cache_salt), f"foreign KV at position {position}: {entry}"
            context.append(entry[2])
        return SampledToken(next_token(context, request.cache_salt, request.seed, self.vocab_size))
