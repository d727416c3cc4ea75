# SPDX-License-Identifier: Apache-2.0
"""How long the outputs of the latest requests were."""

from array import array
from bisect import bisect_left, insort
from collections import deque

WINDOW = 1000  # as in the Past-Future paper


class OutputLengths:
    """The last `window` lengths. `ascending` is a sorted view: do not change it."""

    def __init__(self, window: int = WINDOW) -> None:
        self.ascending = array("q")
        self._window = window
        self._by_age: deque[int] = deque()

    def add(self, length: int) -> None:
        if len(self._by_age) == self._window:
            del self.ascending[bisect_left(self.ascending, self._by_age.popleft())]
        self._by_age.append(length)
        insort(self.ascending, length)
