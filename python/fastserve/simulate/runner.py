# SPDX-License-Identifier: Apache-2.0
"""A runner that computes nothing: it looks at a step's plan, says how long a GPU would take, and moves a clock."""

from __future__ import annotations

from array import array

from fastserve.engine.block_tables import BlockPool
from fastserve.engine.scheduler import StepPlan
from fastserve.outputs import SampledToken
from fastserve.simulate.cost import CostModel

EOS = 0
VOCAB_SIZE = 2**31 - 1  # tokens of a workload are names of texts, not of words


class CostModelRunner:
    """Stands in for ModelRunner in an Engine; `now` is the engine's clock, in seconds.

    `expect` says how long the output of a request will be: the scheduler sees its end only when the EOS comes.
    KV that running requests share is read once in a step, as the attention kernel does.
    """

    def __init__(self, cost: CostModel, pool: BlockPool, block_size: int, max_model_len: int) -> None:
        self.num_blocks = pool.num_blocks
        self.max_model_len = max_model_len
        self.vocab_size = VOCAB_SIZE
        self.eos_token_ids = frozenset({EOS})
        self.cost = cost
        self.now = 0.0
        self.steps = StepLog()
        self._pool = pool
        self._block_size = block_size
        self._end = SampledToken(EOS)
        self._expected: dict[str, tuple[int, SampledToken]] = {}

    def expect(self, request_id: str, output_tokens: int, token_id: int) -> None:
        """The request will give `output_tokens` tokens: `token_id` again and again, then EOS."""
        self._expected[request_id] = output_tokens, SampledToken(token_id)

    def forget(self, request_id: str) -> None:
        del self._expected[request_id]

    def run(self, plan: StepPlan) -> list[SampledToken | None]:
        begin, expected = self.now, self._expected
        chunks: list[tuple[int, int]] = []
        num_decodes = decode_tokens = num_rows = num_steady = 0
        results: list[SampledToken | None] = []
        late: list[float] = []  # times of the last tokens of those that missed a step
        for item in plan.items:
            request = item.request
            if item.num_new_tokens == 1:
                num_decodes += 1
                decode_tokens += item.start + 1
            else:
                chunks.append((item.num_new_tokens, item.start))
            if not item.sample:
                results.append(None)
                continue
            num_rows += 1
            if request.last_token_s == begin:
                num_steady += 1
            elif request.last_token_s is not None:
                late.append(request.last_token_s)
            length, token = expected[request.request_id]
            results.append(self._end if request.num_output_tokens + 1 >= length else token)
        decode_tokens = min(decode_tokens, self._pool.num_used * self._block_size)
        cost = self.cost.step(chunks, num_decodes, decode_tokens, num_rows)
        self.now = begin + cost.total
        log = self.steps
        log.begin_s.append(begin)
        log.seconds.append(cost.total)
        log.linear_s.append(cost.linear)
        log.prefill_attention_s.append(cost.prefill_attention)
        log.decode_attention_s.append(cost.decode_attention)
        log.head_s.append(cost.head)
        log.launch_s.append(cost.launch)
        log.num_decodes.append(num_decodes)
        log.num_chunks.append(len(chunks))
        log.num_tokens.append(plan.num_tokens)
        log.num_preempted.append(len(plan.preempted))
        log.num_steady.append(num_steady)
        log.late_gaps_s.extend(self.now - last for last in late)
        return results


class StepLog:
    """One entry for each step, in columns."""

    def __init__(self) -> None:
        self.begin_s = array("d")
        self.seconds = array("d")
        self.linear_s = array("d")
        self.prefill_attention_s = array("d")
        self.decode_attention_s = array("d")
        self.head_s = array("d")
        self.launch_s = array("d")
        self.num_decodes = array("l")  # requests that computed one token
        self.num_chunks = array("l")  # requests that computed more
        self.num_tokens = array("l")
        self.num_preempted = array("l")
        self.num_running = array("l")
        self.num_waiting = array("l")
        self.num_used_blocks = array("l")
        self.num_steady = array("l")  # tokens whose gap to the one before is exactly this step
        self.late_gaps_s = array("d")  # gaps of all other tokens but the first ones

    def __len__(self) -> int:
        return len(self.seconds)
