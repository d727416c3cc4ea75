# SPDX-License-Identifier: Apache-2.0
"""The forms in which a user may give prompts and sampling parameters, brought to one form and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastserve.config import SamplingParams
from fastserve.errors import InvalidRequest

if TYPE_CHECKING:
    from fastserve.tokenizer import Tokenizer

# A character gives at most a few tokens, so a text far beyond this cannot fit any context. The bound keeps a huge
# text from being tokenised only to be refused.
MAX_TEXT_CHARS = 16 * 2**20

FORMS = "a string, a list of token ids, {'prompt': str} or {'prompt_token_ids': list}"


@dataclass(frozen=True)
class Prompt:
    """One prompt as the engine takes it; `text` is None where token ids were given."""

    text: str | None
    token_ids: list[int]


def as_prompt(given: Any, tokenizer: Tokenizer | None, vocab_size: int, *, add_special_tokens: bool = True) -> Prompt:
    """Raises InvalidRequest saying what was given and what is allowed."""
    if isinstance(given, Mapping):
        known = {"prompt", "prompt_token_ids"}
        if len(given.keys() & known) != 1 or given.keys() - known:
            raise InvalidRequest(f"a prompt dict has the keys {sorted(map(str, given))}; expected {FORMS}")
        given = given["prompt"] if "prompt" in given else _id_list(given["prompt_token_ids"])
    if isinstance(given, str):
        if tokenizer is None:
            raise InvalidRequest("a text prompt needs a tokenizer; this engine has none: give prompt_token_ids")
        if len(given) > MAX_TEXT_CHARS:
            raise InvalidRequest(f"the prompt has {len(given)} characters; at most {MAX_TEXT_CHARS} are allowed")
        ids = tokenizer.encode(given, add_special_tokens)
        if not ids:
            raise InvalidRequest("the prompt is empty: its text gives no token; at least one is needed")
        return Prompt(given, ids)
    ids = _id_list(given)
    if not ids:
        raise InvalidRequest("the prompt is empty: an empty list of token ids; at least one is needed")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise InvalidRequest(
            f"the prompt holds token id {bad} at position {ids.index(bad)}; this model's ids are 0 to {vocab_size - 1}"
        )
    return Prompt(None, ids)


def _id_list(given: Any) -> list[int]:
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence):
        raise InvalidRequest(f"a prompt of type {type(given).__name__} is not allowed; expected {FORMS}")
    for position, token_id in enumerate(given):
        if type(token_id) is not int:
            raise InvalidRequest(
                f"position {position} of the prompt is a {type(token_id).__name__}; token ids are integers"
            )
    return list(given)


def as_prompt_list(given: Any) -> list[Any]:
    """One prompt or a list of prompts, as a list. A list of integers is one prompt."""
    if isinstance(given, (str, Mapping)):
        return [given]
    if isinstance(given, Sequence) and not isinstance(given, bytes):
        if given and type(given[0]) is int:
            return [given]
        return list(given)
    raise InvalidRequest(
        f"prompts of type {type(given).__name__} are not allowed; expected {FORMS}, or a list of those"
    )


def as_params_list(
    given: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int, default: SamplingParams
) -> list[SamplingParams]:
    """One SamplingParams for all prompts, or one for each."""
    if given is None:
        return [default] * num_prompts
    if isinstance(given, SamplingParams):
        return [given] * num_prompts
    if not isinstance(given, Sequence) or not all(isinstance(params, SamplingParams) for params in given):
        raise InvalidRequest("sampling_params must be a SamplingParams, a list with one for each prompt, or None")
    if len(given) != num_prompts:
        raise InvalidRequest(f"{len(given)} sampling_params for {num_prompts} prompts; give one, or one for each")
    return list(given)


def is_conversation(messages: Any) -> bool:
    """Whether `messages` is one conversation (a list of message dicts) and not a list of conversations."""
    return isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], Mapping)
