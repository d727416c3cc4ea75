# SPDX-License-Identifier: Apache-2.0
"""One sequence on its way through the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fastserve.config import RequestOutputKind, SamplingParams


class RequestStatus(Enum):
    WAITING = "waiting"  # holds no blocks; new, or preempted and to be recomputed
    RUNNING = "running"  # holds blocks; every step computes some of its tokens
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class SharedPrefix:
    """Tokens that several requests of a batch begin with: whole blocks, those of its parent first.

    Made with the batch's plan (`engine/prefix_plan.py`); from then on only the scheduler changes it.
    """

    num_tokens: int  # the parent's included
    parent: "SharedPrefix | None"
    num_open: int  # requests whose innermost prefix it is, and prefixes that continue it, that have not ended
    block_ids: list[int] | None = None  # where its KV is held, after the parent's blocks; None: it is not


@dataclass(eq=False, slots=True)
class Request:
    """Prompt, output and progress of one sequence. Only the Scheduler changes it.

    Progress is one number, `num_computed_tokens`: the KV of `token_ids[:num_computed_tokens]` is in
    `block_ids`. A new prompt, a decode and a preempted request differ in nothing else.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_s: float = 0.0
    priority: int = 0  # lower goes first under the priority policy
    cache_salt: str = ""  # requests share cached prefixes only within one salt
    seed: int = 0  # of the sampling noise, in [0, 2**64)
    shared_prefix: SharedPrefix | None = None  # the innermost one of its batch

    token_ids: list[int] = field(init=False)  # prompt + output
    num_prompt_tokens: int = field(init=False)
    has_late_text: bool = field(init=False)  # nobody looks at its text before it has ended: it is made then, at once
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens that were served from the cache instead of computed
    block_ids: list[int] = field(default_factory=list)
    tree_node: int | None = None  # handle of the last of its blocks that is in the prefix tree
    num_tree_blocks: int = 0  # how many of its leading blocks are in the prefix tree
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None  # stop, length, abort, error
    stop_reason: str | int | None = None  # the stop string or stop token id; None for EOS
    num_preemptions: int = 0
    queue_key: tuple[Any, ...] = ()  # its place in the policy's order: smaller goes first
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.num_prompt_tokens = len(self.prompt_token_ids)
        params = self.params
        self.has_late_text = (
            params.output_kind is RequestOutputKind.FINAL_ONLY
            and not params.stop
            and params.logprobs is None
            and params.prompt_logprobs is None
        )

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> Sequence[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def must_go_on(self) -> bool:
        """While true (`min_tokens` not reached) the sampler masks EOS and the request's stop token ids."""
        return self.num_output_tokens < self.params.min_tokens
