# SPDX-License-Identifier: Apache-2.0
"""The waiting requests, smallest queue_key first."""

import heapq
from typing import Any

from fastserve.request import Request


class WaitingQueue:
    """A heap. push and pop are O(log n), remove O(1): a removed entry stays in the heap until it surfaces or
    until removed entries are the majority, when all of them are swept."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[Any, ...], Request]] = []  # keys are unique
        self._members: dict[str, Request] = {}
        self.num_tokens = 0  # of all members; a waiting request gets none

    def __len__(self) -> int:
        return len(self._members)

    def push(self, request: Request) -> None:
        self._members[request.request_id] = request
        self.num_tokens += len(request.token_ids)
        heapq.heappush(self._heap, (request.queue_key, request))

    def first(self) -> Request:
        while not self._is_member(self._heap[0][1]):
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def pop(self) -> Request:
        request = self.first()
        heapq.heappop(self._heap)
        self._forget(request)
        return request

    def remove(self, request: Request) -> None:
        self._forget(request)

    def _forget(self, request: Request) -> None:
        del self._members[request.request_id]
        self.num_tokens -= len(request.token_ids)
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [entry for entry in self._heap if self._is_member(entry[1])]
            heapq.heapify(self._heap)

    def _is_member(self, request: Request) -> bool:
        return self._members.get(request.request_id) is request
