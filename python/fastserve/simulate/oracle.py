# SPDX-License-Identifier: Apache-2.0
"""Admission that knows every output's length beforehand: the best that a prediction can come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fastserve.admission import Memory
from fastserve.admission.past_future import fits
from fastserve.request import Request


class Oracle:
    """`lengths`: output tokens by request id; may grow while requests arrive."""

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self._lengths = lengths

    def admit(self, candidate: Request, running: Sequence[Request], memory: Memory) -> bool:
        if memory.num_needed > memory.num_available:
            return False
        requests = [*running, candidate]
        remaining = np.array([self._lengths[one.request_id] - one.num_output_tokens - 1 for one in requests])
        return fits(requests, np.maximum(remaining, 0)[None, :], memory, reserve=0.0)
