# SPDX-License-Identifier: Apache-2.0
"""Finds stop strings in a growing text, in time linear in the text, whatever the stop strings are."""

from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache


@dataclass(slots=True)
class _State:
    """The longest end of the text so far that is the beginning of a stop string."""

    depth: int  # its length: so much of the text may yet turn out to belong to a stop string
    next: dict[str, "_State"] = field(default_factory=dict)
    fallback: "_State | None" = None  # the longest shorter end that is a beginning too; None for the empty one
    match: str | None = None  # the longest stop string that ends here


@lru_cache(maxsize=64)
def _automaton(strings: tuple[str, ...]) -> _State:
    """Aho-Corasick. The states are not changed afterwards, so requests with the same `stop` share them."""
    root = _State(0)
    for string in strings:
        state = root
        for char in string:
            state = state.next.setdefault(char, _State(state.depth + 1))
        state.match = string
    queue = deque([root])
    while queue:  # by depth, so that shorter states are complete when longer ones look at them
        parent = queue.popleft()
        for char, state in parent.next.items():
            queue.append(state)
            state.fallback = root if parent is root else _advance(parent.fallback or root, char)
            state.match = state.match or state.fallback.match
    return root


def _advance(state: _State, char: str) -> _State:
    while char not in state.next:
        if state.fallback is None:
            return state
        state = state.fallback
    return state.next[char]


class StopMatcher:
    """Lets text through up to the first stop string, holding back what may be the beginning of one.

    The first is the one that is complete first; among those complete at the same character, the longest. What
    is let through does not depend on how the text is cut into pieces.
    """

    def __init__(self, strings: tuple[str, ...], include_stop: bool) -> None:
        self.is_empty = not strings
        self._state = _automaton(strings)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Takes new text; returns what may be shown now, and the stop string that ends the text, if one does.

        While not `armed`, complete stop strings are ordinary text.
        """
        if self.is_empty:
            return text, None
        pending = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            self._state = _advance(self._state, char)
            if armed and self._state.match is not None:
                stop = self._state.match
                self._held = ""
                return pending[: end if self._include_stop else end - len(stop)], stop
        shown = len(pending) if self._include_stop else len(pending) - self._state.depth
        self._held = pending[shown:]
        return pending[:shown], None

    def flush(self) -> str:
        """The text held back; call it when no more text comes."""
        held, self._held = self._held, ""
        return held
