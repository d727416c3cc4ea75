# SPDX-License-Identifier: Apache-2.0
"""The baseline that SARATHI is compared with: prompts and decodes in steps of their own."""

from __future__ import annotations

from typing import Any

from fastserve.config import EngineConfig
from fastserve.engine.scheduler import Scheduler, _Draft
from fastserve.errors import InvalidRequest
from fastserve.request import RequestStatus


class SeparateScheduler(Scheduler):
    """While a prompt waits that may start, or is not through, a step computes prompts only and all decodes stand
    still. To see whole prompts in a step give it a budget of the longest. Never used by an engine that serves."""

    def __init__(self, config: EngineConfig, *arguments: Any, **options: Any) -> None:
        if config.max_num_seqs > config.max_num_batched_tokens:
            raise InvalidRequest(
                f"max_num_seqs={config.max_num_seqs} is not allowed with separate steps: at most "
                f"max_num_batched_tokens={config.max_num_batched_tokens}, for all decodes are one step"
            )
        super().__init__(config, *arguments, **options)

    def _fill(self, step: _Draft) -> None:
        running = tuple(self._running)
        for request in running:
            unfinished = request.num_uncomputed_tokens > 1
            if unfinished and request.status is RequestStatus.RUNNING and step.budget:
                self._count_cached(request, self._blocks.adopt_prefix(request))
                self._carry(step, request)
        while step.budget and not step.preempted and (admitted := self._admit()):
            self._carry(step, admitted)
        if not step.items:
            for request in running:
                if request.status is RequestStatus.RUNNING:
                    self._carry(step, request)
