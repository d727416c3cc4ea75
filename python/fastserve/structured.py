# SPDX-License-Identifier: Apache-2.0
"""Output that must match a JSON schema, a regular expression or a grammar: masks of allowed tokens, by llguidance.

The library compiles a constraint to an automaton over bytes, with limits on its work, and walks the tokenizer's trie
with it (https://github.com/guidance-ai/llguidance). Nothing here backtracks and nothing is fetched.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastserve.config import StructuredOutputs
from fastserve.errors import FastserveError, InvalidRequest

if TYPE_CHECKING:
    from fastserve.tokenizer import Tokenizer

MAX_CACHED = 64  # compiled constraints that are kept
# A small model left alone with free whitespace may never write anything else.
JSON_OPTIONS = {"whitespace_pattern": r"[ \t\r\n]{0,16}"}


class GrammarCompiler:
    """Compiles constraints for one tokenizer. Thread-safe; compiling lets other threads run."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._for_library: Any = None
        self._compiled: OrderedDict[StructuredOutputs, Any] = OrderedDict()

    def check(self, given: StructuredOutputs) -> None:
        """Compiles `given` unless it is known. Raises InvalidRequest when it cannot be compiled."""
        self._template(given)

    def matcher(self, given: StructuredOutputs) -> Matcher:
        """A fresh matcher, at the beginning of the output."""
        return Matcher(self._template(given).deep_copy(), self._vocab_size)

    def _template(self, given: StructuredOutputs) -> Any:
        with self._lock:
            if given in self._compiled:
                self._compiled.move_to_end(given)
                return self._compiled[given]
            library = self._library_tokenizer()
        compiled = _compile(given, library)
        with self._lock:
            self._compiled[given] = compiled
            while len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        return compiled

    def _library_tokenizer(self) -> Any:
        if self._for_library is None:
            if not self._eos_token_ids:
                raise InvalidRequest("structured outputs need a model with an end-of-sequence token")
            llguidance = _import()
            text = self._tokenizer.backend.to_str()
            self._for_library = llguidance.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        return self._for_library


class Matcher:
    """Follows one output and says which tokens may come next."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_words = (vocab_size + 31) // 32
        self._num_read = 0

    def mask(self, output_token_ids: Sequence[int]) -> np.ndarray:
        """[ceil(V / 32)] int32, one bit per token, for what may follow `output_token_ids`; these only ever grow."""
        new = list(output_token_ids[self._num_read :])
        self._num_read += len(new)
        if new and not self._matcher.consume_tokens(new):
            raise FastserveError(f"the output left its grammar: {self._matcher.get_error()[:200]}")
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise FastserveError(f"the grammar is too complex to follow: {self._matcher.get_error()[:200]}")
        return np.frombuffer(bits, np.int32)[: self._num_words].copy()


def _import() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise InvalidRequest(
            "structured outputs need the library llguidance on this server: pip install 'fastserve[server]'"
        ) from None
    return llguidance


def _compile(given: StructuredOutputs, tokenizer: Any) -> Any:
    llguidance = _import()
    make = llguidance.LLMatcher
    try:
        if given.json_object or given.json is not None:
            schema = {"type": "object"} if given.json is None else json.loads(str(given.json))
            grammar = make.grammar_from_json_schema(json.dumps(schema), defaults=JSON_OPTIONS)
        elif given.regex is not None:
            grammar = make.grammar_from_regex(given.regex)
        elif given.choice is not None:
            alternatives = " | ".join(json.dumps(one, ensure_ascii=False) for one in given.choice)
            grammar = make.grammar_from_lark(f"start: {alternatives}")
        else:
            grammar = make.grammar_from_lark(given.grammar)
    except ValueError as error:
        raise InvalidRequest(f"structured output: {str(error)[:300]}") from None
    # Silent: what is wrong with a request's grammar is told to whoever sent it.
    matcher = make(tokenizer, grammar, log_level=0)
    if matcher.is_error():
        raise InvalidRequest(f"structured output: {matcher.get_error()[:300]}")
    return matcher
