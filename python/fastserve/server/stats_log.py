# SPDX-License-Identifier: Apache-2.0
"""A line in the log every few seconds: what the engine did meanwhile. None while it does nothing."""

from __future__ import annotations

import asyncio
import logging
import time

from fastserve.server.service import Service

log = logging.getLogger("fastserve.server")


class StatsLog:
    """Rates between two looks at the counters."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._last = self._look()

    def _look(self) -> tuple[float, int, int, int]:
        metrics, stats = self._service.metrics, self._service.llm.loaded.engine.stats
        return time.monotonic(), metrics.num_prefill_tokens, metrics.num_generated_tokens, stats.num_cached_tokens

    def line(self) -> str | None:
        """What happened since the last call; None if that is nothing."""
        before, now = self._last, self._look()
        self._last = now
        seconds = max(now[0] - before[0], 1e-9)
        computed, generated, cached = (now[i] - before[i] for i in (1, 2, 3))
        stats = self._service.llm.loaded.engine.stats
        num_waiting = max(stats.num_waiting, self._service.num_open - stats.num_running)
        if not (computed or generated or cached or stats.num_running or num_waiting):
            return None
        return (
            f"prompts {(computed + cached) / seconds:.1f} tok/s, outputs {generated / seconds:.1f} tok/s, "
            f"running {stats.num_running}, waiting {num_waiting}, "
            f"KV cache {stats.num_used_blocks / stats.num_blocks:.1%}, "
            f"prefix hits {cached / max(computed + cached, 1):.1%}"
        )

    async def run(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            if (line := self.line()) is not None:
                log.info("%s", line)
