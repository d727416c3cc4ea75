# SPDX-License-Identifier: Apache-2.0
"""A device without arithmetic: its KV cache holds the tokens themselves, its model hashes what the cache
gives it.

A block that was freed too early, shared wrongly, written twice or read before it was computed changes the
hash, and with it the tokens.
"""

import codecs
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

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int = 7, max_model_len: int = 64) -> None:
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


class ScriptedDevice(FakeDevice):
    """Samples what the test wrote down for each sequence, with made-up logprobs."""

    def __init__(self, script: dict[str, Sequence[int]], vocab_size: int = 256) -> None:
        super().__init__(num_blocks=64, block_size=32, vocab_size=vocab_size)
        self.script = script

    def run(self, plan: StepPlan) -> list[SampledToken | None]:
        sampled = []
        for item, token in zip(plan.items, super().run(plan), strict=True):
            request = item.request
            if token is not None:
                token_id = self.script[request.request_id][request.num_output_tokens]
                token = self.with_logprobs(token_id, request.params.logprobs)
            if request.params.prompt_logprobs is not None:
                following = request.prompt_token_ids[item.start + 1 : item.start + item.num_new_tokens + 1]
                prompt = tuple(self.with_logprobs(t, request.params.prompt_logprobs) for t in following)
                token = SampledToken(None, prompt=prompt) if token is None else token._replace(prompt=prompt)
            sampled.append(token)
        return sampled

    @staticmethod
    def with_logprobs(token_id: int, num_top: int | None) -> SampledToken:
        """The token has logprob -token_id/8; the top ones are 1, 2, 3 and so on."""
        top = tuple((i, -i / 8, i) for i in range(1, (num_top or 0) + 1))
        return SampledToken(token_id, -token_id / 8, token_id, top)


class ByteTokenizer:
    """Token i is the byte i, like the last resort of real vocabularies; 0 is EOS and special."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i or not skip_special_tokens).decode("utf-8", "replace")


class ByteDetokenizer:
    def __init__(self, skip_special_tokens: bool, prompt_token_ids: Sequence[int]) -> None:
        self.skip_special_tokens = skip_special_tokens
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id == 255:
            raise ValueError("a token that breaks the detokenizer")
        return "" if token_id == 0 and self.skip_special_tokens else self.utf8.decode(bytes([token_id]))

    def flush(self, token_ids: Sequence[int] = ()) -> str:
        return "".join(map(self.push, token_ids)) + self.utf8.decode(b"", final=True)
