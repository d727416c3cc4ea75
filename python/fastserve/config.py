# SPDX-License-Identifier: Apache-2.0
"""What a user can set, with every default and every bound. Values are checked once, here, and trusted from
then on."""

import json
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fastserve.errors import InvalidRequest

# Bounds. Every number and every list that a request can carry has one, so that no request can exhaust the
# engine.
MAX_N = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_BAD_WORDS = 128
MAX_LOGIT_BIAS = 1024
MAX_TOKEN_ID = 2**31 - 1
MAX_LENGTH = 2**31 - 1
MAX_TEMPERATURE = 100.0
GREEDY_TEMPERATURE = 1e-5  # anything below is greedy decoding


class RequestOutputKind(IntEnum):
    """What each output of a request carries."""

    CUMULATIVE = 0  # everything generated so far
    DELTA = 1  # only what is new since the last output
    FINAL_ONLY = 2  # one output, when the request has finished


def _shown(value: object) -> str:
    """`value` for an error text, shortened: an error must not echo a megabyte back."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _reject(name: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name}={_shown(value)} is not allowed: {name} must be {allowed}")


def _integer(name: str, value: Any, low: int, high: int, extra: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise _reject(name, value, f"an integer in [{low}, {high}]{extra}")
    return int(value)


def _real(name: str, value: Any, low: float, high: float, *, above_low: bool = False) -> float:
    allowed = f"a number in {'(' if above_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _reject(name, value, allowed)
    try:
        number = float(value)
    except OverflowError:
        raise _reject(name, value, allowed) from None
    if not math.isfinite(number) or not low <= number <= high or (above_low and number == low):
        raise _reject(name, value, allowed)
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _reject(name, value, "True or False")
    return value


def _token_ids(name: str, value: Any, limit: int) -> tuple[int, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _reject(name, value, "a list of token ids")
    ids: dict[int, None] = {}  # a set that keeps the order
    for i, token_id in _bounded(name, value, limit):
        if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
            token_id = _integer(f"{name}[{i}]", token_id, 0, MAX_TOKEN_ID)
        ids[token_id] = None
    return tuple(ids)


def _bounded(name: str, values: Iterable[Any], limit: int) -> Iterable[tuple[int, Any]]:
    """Enumerates `values`, refusing more than `limit` of them without walking the rest."""
    for i, value in enumerate(values):
        if i == limit:
            raise InvalidRequest(f"{name} has more than {limit} entries; at most {limit} are allowed")
        yield i, value


MAX_GRAMMAR_CHARS = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_CHOICES = 256


@dataclass(frozen=True)
class StructuredOutputs:
    """What the output must match: exactly one of these. Names are vLLM's. Hashable: a schema is kept as its text."""

    json: str | Mapping[str, Any] | bool | None = None  # a JSON schema
    regex: str | None = None  # the whole output
    choice: Iterable[str] | None = None  # the output is one of these
    grammar: str | None = None  # in llguidance's Lark dialect
    json_object: bool | None = None  # any JSON object

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            raise InvalidRequest(
                "structured outputs need exactly one of json, regex, choice, grammar and json_object; "
                f"given: {', '.join(given) or 'none'}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            choices = list(self.choice) if isinstance(self.choice, Iterable) else []
            if (
                isinstance(self.choice, str)
                or not 1 <= len(choices) <= MAX_CHOICES
                or not all(isinstance(one, str) and one for one in choices)
            ):
                raise _reject("choice", self.choice, f"a list of 1 to {MAX_CHOICES} strings that are not empty")
            object.__setattr__(self, "choice", tuple(choices))
        for name in ("json", "regex", "grammar"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not 1 <= len(text) <= MAX_GRAMMAR_CHARS):
                raise _reject(name, text, f"a text of 1 to {MAX_GRAMMAR_CHARS} characters")
        if self.choice is not None and sum(map(len, self.choice)) > MAX_GRAMMAR_CHARS:
            raise InvalidRequest(f"the choices have more than {MAX_GRAMMAR_CHARS} characters together")


def _schema_text(schema: Any) -> str:
    """A JSON schema in one spelling; raises InvalidRequest unless it is one, not too large and not too deep."""
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise InvalidRequest("the JSON schema is not valid JSON, or nested too deeply") from None
    if not isinstance(schema, (Mapping, bool)):
        raise InvalidRequest("a JSON schema is an object, or true or false")
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(f"the JSON schema has {len(text)} characters; at most {MAX_GRAMMAR_CHARS} are allowed")
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise InvalidRequest(f"the JSON schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")
        inner = [list(one.values()) if isinstance(one, Mapping) else one for one in level if not isinstance(one, str)]
        level = [value for one in inner if isinstance(one, list) for value in one]
    return text


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end. Names and defaults are vLLM's.

    Invalid values raise `InvalidRequest` here, once; what depends on the model is checked by
    `check_for_model`. A temperature below 1e-5 means greedy decoding (top_p, top_k, min_p and seed then play
    no role). `stop`, `stop_token_ids` and `allowed_token_ids` are stored as tuples, `logit_bias` with integer
    keys.
    """

    n: int = 1  # independent completions of the prompt
    presence_penalty: float = 0.0  # in [-2, 2]
    frequency_penalty: float = 0.0  # in [-2, 2]
    repetition_penalty: float = 1.0  # in (0, 100]; 1 = none
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1 = all
    min_p: float = 0.0
    seed: int | None = None  # None: derived from the engine's seed and the order of arrival
    stop: str | Iterable[str] | None = None
    stop_token_ids: Iterable[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None = up to the context length
    min_tokens: int = 0  # no EOS, stop token or stop string ends the request before
    logprobs: int | None = None  # top entries per output token; -1 = the whole vocabulary
    prompt_logprobs: int | None = None  # the same per prompt token; no cached prefix is read
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # only True: spacing is the tokenizer's own business
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: Mapping[int, float] | None = None  # token id -> value in [-100, 100] added to its logit
    allowed_token_ids: Iterable[int] | None = None  # None = all
    structured_outputs: StructuredOutputs | None = None  # what the output must match
    # Texts whose tokens never come in this order; each as given and with a space before it.
    bad_words: Iterable[str] | None = None

    def __post_init__(self) -> None:
        put = self._put
        put("n", _integer("n", self.n, 1, MAX_N))
        put("presence_penalty", _real("presence_penalty", self.presence_penalty, -2.0, 2.0))
        put("frequency_penalty", _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        repetition = _real("repetition_penalty", self.repetition_penalty, 0, 100, above_low=True)
        put("repetition_penalty", repetition)
        put("temperature", _real("temperature", self.temperature, 0.0, MAX_TEMPERATURE))
        put("top_p", _real("top_p", self.top_p, 0.0, 1.0, above_low=True))
        put("top_k", max(0, _integer("top_k", self.top_k, -1, MAX_TOKEN_ID, " (0 or -1 = all)")))
        put("min_p", _real("min_p", self.min_p, 0.0, 1.0))
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, -(2**63), 2**63 - 1, " or None"))
        if self.max_tokens is not None:
            put("max_tokens", _integer("max_tokens", self.max_tokens, 1, MAX_LENGTH, " or None"))
        put("min_tokens", _integer("min_tokens", self.min_tokens, 0, MAX_LENGTH))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens={self.min_tokens} is not allowed: it is at most max_tokens={self.max_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            given = getattr(self, name)
            if given is not None:
                put(name, _integer(name, given, -1, MAX_TOKEN_ID, " (-1 = whole vocabulary) or None"))
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            _flag(name, getattr(self, name))
        if self.spaces_between_special_tokens is not True:
            raise _reject("spaces_between_special_tokens", self.spaces_between_special_tokens, "True")
        try:
            put("output_kind", RequestOutputKind(self.output_kind))
        except ValueError:
            kinds = ", ".join(f"{kind.name} ({kind.value})" for kind in RequestOutputKind)
            raise _reject("output_kind", self.output_kind, f"one of {kinds}") from None
        self._check_lists()
        if self.structured_outputs is not None:
            if not isinstance(self.structured_outputs, StructuredOutputs):
                raise _reject("structured_outputs", self.structured_outputs, "a StructuredOutputs or None")
            if self.ignore_eos or self.min_tokens or self.allowed_token_ids is not None:
                raise InvalidRequest(
                    "structured_outputs decide which tokens may come and when the output ends: ignore_eos, min_tokens "
                    "and allowed_token_ids are not allowed together with them"
                )

    def _check_lists(self) -> None:
        put = self._put
        put("stop", self._checked_texts("stop", self.stop, MAX_STOP_STRINGS))
        put("bad_words", self._checked_texts("bad_words", self.bad_words, MAX_BAD_WORDS))
        stop_ids = () if self.stop_token_ids is None else self.stop_token_ids
        put("stop_token_ids", _token_ids("stop_token_ids", stop_ids, MAX_STOP_TOKEN_IDS))
        if self.stop and not self.detokenize:
            raise InvalidRequest("stop strings need text: detokenize=False is not allowed together with stop")
        if self.logit_bias is not None:
            put("logit_bias", self._checked_logit_bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids, 2**20))
            if not self.allowed_token_ids:
                raise _reject("allowed_token_ids", (), "None or a list of at least one token id")

    @staticmethod
    def _checked_texts(name: str, given: Any, limit: int) -> tuple[str, ...]:
        if given is None:
            return ()
        given = (given,) if isinstance(given, str) else given
        if isinstance(given, (bytes, Mapping)) or not isinstance(given, Iterable):
            raise _reject(name, given, "a string or a list of strings")
        texts: list[str] = []
        for i, text in _bounded(name, given, limit):
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
                raise _reject(f"{name}[{i}]", text, f"a string of 1 to {MAX_STOP_STRING_CHARS} characters")
            texts.append(text)
        return tuple(dict.fromkeys(texts))

    @staticmethod
    def _checked_logit_bias(given: Any) -> dict[int, float]:
        if not isinstance(given, Mapping):
            raise _reject("logit_bias", given, "a mapping from token id to a number")
        bias: dict[int, float] = {}
        for _, (key, value) in _bounded("logit_bias", given.items(), MAX_LOGIT_BIAS):
            if isinstance(key, str) and re.fullmatch(r"[0-9]{1,10}", key, re.ASCII):
                key = int(key)  # JSON has only string keys
            token_id = _integer("logit_bias key", key, 0, MAX_TOKEN_ID)
            bias[token_id] = _real(f"logit_bias[{token_id}]", value, -100.0, 100.0)
        return bias

    def _put(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    def check_for_model(self, vocab_size: int, max_logprobs: int) -> None:
        """Checks what only an engine can know: token ids below `vocab_size` and the engine's
        `max_logprobs`."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(self, name) or ():
                if token_id >= vocab_size:
                    raise InvalidRequest(
                        f"{name} holds token id {token_id}; this model's token ids are 0 to {vocab_size - 1}"
                    )
        for name in ("logprobs", "prompt_logprobs"):
            given = getattr(self, name)
            if given is not None and max_logprobs != -1 and not 0 <= given <= max_logprobs:
                raise _reject(name, given, f"in [0, {max_logprobs}] (the engine's max_logprobs)")


@dataclass(frozen=True)
class EngineConfig:
    """How an engine works; one per engine, the same for all requests. `None` means: chosen at start and
    printed."""

    max_num_batched_tokens: int = 512  # tokens of one step; more: throughput, less: steady decodes
    max_num_seqs: int = 128  # requests of one step; never more than max_num_batched_tokens
    max_chunk_tokens: int | None = None  # tokens of one request in one step; None = the whole budget
    block_size: int = 32  # tokens of a KV cache block
    num_blocks: int | None = None  # None = from kv_cache_memory_bytes
    kv_cache_memory_bytes: int | None = None  # None = from free memory
    max_model_len: int | None = None  # None = the model's own limit, or what the cache holds
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    kv_cache_dtype: str = "auto"  # auto, float32, bfloat16, float16
    quantization: str = "auto"  # auto: int4 weights of the checkpoint stay int4; none: written out in dtype
    activation_dtype: str = "auto"  # what int4 and int8 weights are multiplied with: auto, int8, int12, float
    lm_head_dtype: str = "auto"  # auto: as in the checkpoint; int8
    enable_prefix_caching: bool = True
    max_num_queued_requests: int = 4096  # waiting requests; one more is refused with QueueFull
    max_logprobs: int = 20  # largest logprobs a request may ask for; -1 = no limit, the whole vocabulary too
    num_threads: int | None = None  # None = the physical cores
    seed: int = 0  # seeds the requests that bring none
    device: str = "auto"  # auto, cpu, cuda
    exact: bool = True  # the same tokens in any batch, on CUDA too; False: torch's matrix products there
    policy: str = "fcfs"  # who starts first: a module of fastserve.policies
    admission: str = "past_future"  # who may start: a module of fastserve.admission
    batch_order: str = "prefix"  # of LLM.generate: prefix = members of a shared prefix together; arrival = as given

    def __post_init__(self) -> None:
        limits = {
            "max_num_batched_tokens": (1, 2**20),
            "max_num_seqs": (1, 2**16),
            "max_chunk_tokens": (1, 2**20),
            "block_size": (1, 1024),
            "num_blocks": (1, MAX_LENGTH),
            "kv_cache_memory_bytes": (1, 2**63 - 1),
            "max_model_len": (2, MAX_LENGTH),
            "max_num_queued_requests": (1, 2**20),
            "max_logprobs": (-1, MAX_TOKEN_ID),
            "num_threads": (1, 1024),
            "seed": (-(2**63), 2**63 - 1),
        }
        for name, (low, high) in limits.items():
            if getattr(self, name) is not None or getattr(type(self), name) is not None:
                _integer(name, getattr(self, name), low, high)
        choices = {
            "dtype": ("auto", "float32", "bfloat16", "float16"),
            "kv_cache_dtype": ("auto", "float32", "bfloat16", "float16"),
            "quantization": ("auto", "none"),
            "activation_dtype": ("auto", "int8", "int12", "float"),
            "lm_head_dtype": ("auto", "int8"),
            "device": ("auto", "cpu", "cuda"),
            "batch_order": ("prefix", "arrival"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise _reject(name, getattr(self, name), f"one of {', '.join(allowed)}")
        _flag("enable_prefix_caching", self.enable_prefix_caching)
        _flag("exact", self.exact)
        if not isinstance(self.policy, str):
            raise _reject("policy", self.policy, "the name of a policy")
        if not isinstance(self.admission, str):
            raise _reject("admission", self.admission, "the name of an admission")
