# SPDX-License-Identifier: Apache-2.0
"""How long the outputs of the latest requests were."""

from array import array
from bisect import bisect_left, insort
from collections import deque

WINDOW = 1000  # as in the Past-Future paper
# What stands for the first lengths until they are known: evenly up to 512 tokens (which is what the authors' simulator
# assumes), in no order. An engine that assumed its longest output instead would start a few requests and wait for
# them; one that guesses too low preempts some, once.
GUESSES = tuple(8 * (1 + 27 * i % 64) for i in range(64))


class OutputLengths:
    """The last `window` lengths; the first ones take the places of `guesses`. `ascending` is a sorted view: do not
    change it."""

    def __init__(self, window: int = WINDOW, guesses: tuple[int, ...] = GUESSES) -> None:
        self.ascending = array("q", sorted(guesses))
        self._window = window
        self._num_guesses = len(guesses)
        self._by_age: deque[int] = deque(guesses)

    def add(self, length: int) -> None:
        if self._num_guesses or len(self._by_age) == self._window:
            del self.ascending[bisect_left(self.ascending, self._by_age.popleft())]
            self._num_guesses -= self._num_guesses > 0
        self._by_age.append(length)
        insort(self.ascending, length)
