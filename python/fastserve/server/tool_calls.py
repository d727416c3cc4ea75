# SPDX-License-Identifier: Apache-2.0
"""Calls of tools in the text of a model: found while it streams, the same ones however the text is cut.

A call is told when it is complete, as one piece. What does not parse is text, and is never dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MAX_CALL_CHARS = 256 * 1024  # a longer one is text


@dataclass(frozen=True)
class Call:
    """One call; `arguments` is JSON text."""

    name: str
    arguments: str


Event = str | Call


class ObjectScanner:
    """Finds the end of a JSON object or array in a growing text, looking at each character once."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def ends_at(self, char: str) -> bool:
        """Takes one character; True when it closes what the first one opened."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
            return False
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


class ToolCallParser:
    """Splits a growing text into text and calls.

    A block of calls begins with `begin` (the empty string: only at the very start of the text), holds JSON values
    with whitespace or `between` around them, and ends after `end` or with the text. `parse` makes calls of a value.
    """

    def __init__(self, begin: str, end: str, between: str, parse: Callable[[Any], list[Call] | None]) -> None:
        self._begin, self._end, self._between, self._parse = begin, end, between, parse
        self._held = ""  # text that is neither told nor part of a block yet
        self._block: list[str] | None = None  # characters of the block so far
        self._value: list[str] | None = None  # of these, those of the value that is being read
        self._scanner = ObjectScanner()
        self._calls: list[Call] = []
        self._at_start = True
        self._tail = ""

    def push(self, text: str) -> list[Event]:
        """Takes new text; returns what is certain now."""
        events: list[Event] = []
        for char in text:
            events += self._take(char)
        return list(_merged(events))

    def flush(self) -> list[Event]:
        """The rest, when no text comes any more."""
        events: list[Event] = [self._held]
        self._held = ""
        if self._block is not None:
            events += self._close(complete=self._value is None and not self._tail)
        return list(_merged(events))

    def _take(self, char: str) -> list[Event]:
        if self._block is not None:
            return self._take_in_block(char)
        if not self._begin:
            if not self._at_start:
                return [char]
            self._held += char
            if char.isspace():
                return []
            self._at_start = False
            held, self._held = self._held, ""
            if char != "{":
                return [held]
            self._open(held[:-1])
            return self._take_in_block(char)
        self._held += char
        if self._held.endswith(self._begin):
            before, self._held = self._held[: -len(self._begin)], ""
            self._open(self._begin)
            return [before]
        keep = _overlap(self._held, self._begin)
        told, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return [told]

    def _open(self, text: str) -> None:
        self._block, self._value, self._calls, self._tail = [text], None, [], ""

    def _take_in_block(self, char: str) -> list[Event]:
        assert self._block is not None
        self._block.append(char)
        if self._value is not None:
            self._value.append(char)
            if len(self._value) > MAX_CALL_CHARS:
                return self._close(complete=False)
            if self._scanner.ends_at(char):
                calls = _parsed("".join(self._value), self._parse)
                if calls is None:
                    return self._close(complete=False)
                self._calls += calls
                self._value = None
                if not self._end:  # nothing will confirm the block, so the value does
                    told: list[Event] = [*self._calls]
                    self._calls, self._block = [], [""]
                    return told
            return []
        if not self._tail and char in "{[":
            self._value, self._scanner = [char], ObjectScanner()
            self._scanner.ends_at(char)
            return []
        if not self._tail and (char.isspace() or (self._between and char == self._between)):
            return []
        self._tail += char
        if self._end and self._calls:
            if self._tail == self._end:
                return self._close(complete=True)
            if self._end.startswith(self._tail):
                return []
        return self._close(complete=False)

    def _close(self, *, complete: bool) -> list[Event]:
        """Ends the block: its calls if it is a complete one, else its text."""
        block, calls = "".join(self._block or []), self._calls
        self._block, self._value, self._calls, self._tail = None, None, [], ""
        if complete and calls:
            return [*calls]
        if complete and not block.strip():
            return []
        return [block]


def _merged(events: list[Event]) -> Iterator[Event]:
    """Adjacent texts as one, without empty ones."""
    text = ""
    for event in events:
        if isinstance(event, str):
            text += event
            continue
        if text:
            yield text
        text = ""
        yield event
    if text:
        yield text


def _overlap(text: str, pattern: str) -> int:
    """The length of the longest end of `text` that is the beginning of `pattern`; patterns are short."""
    return next(n for n in range(min(len(text), len(pattern) - 1), -1, -1) if pattern.startswith(text[len(text) - n :]))


def _parsed(text: str, parse: Callable[[Any], list[Call] | None]) -> list[Call] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parse(value)


def _call(value: Any, arguments_key: str) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get(arguments_key, {})
    if isinstance(arguments, str):  # some fine-tunes write the object as a string
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _one(arguments_key: str) -> Callable[[Any], list[Call] | None]:
    def parse(value: Any) -> list[Call] | None:
        call = _call(value, arguments_key)
        return None if call is None else [call]

    return parse


def _several(arguments_key: str) -> Callable[[Any], list[Call] | None]:
    def parse(value: Any) -> list[Call] | None:
        calls = [_call(one, arguments_key) for one in (value if isinstance(value, list) else [value])]
        return None if not calls or None in calls else [call for call in calls if call is not None]

    return parse


# name of the format -> a parser for one answer
FORMATS: dict[str, Callable[[], ToolCallParser]] = {
    "hermes": lambda: ToolCallParser("<tool_call>", "</tool_call>", "", _one("arguments")),
    "llama3_json": lambda: ToolCallParser("", "", ";", _one("parameters")),
    "mistral": lambda: ToolCallParser("[TOOL_CALLS]", "", ",", _several("arguments")),
}


def required_calls() -> ToolCallParser:
    """For output that a grammar keeps to {"name", "arguments"} objects: tool_choice "required" or a named tool."""
    return ToolCallParser("", "", "", _one("arguments"))


def format_of_template(template: str | None) -> str | None:
    """The format that a chat template teaches, None if it teaches none of those known here."""
    for mark, name in (("<tool_call>", "hermes"), ("[TOOL_CALLS]", "mistral"), ('"parameters"', "llama3_json")):
        if template is not None and mark in template and "tools" in template:
            return name
    return None
