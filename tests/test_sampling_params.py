# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters and engine options: defaults, and what bad values are told."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from fastserve.config import EngineConfig, RequestOutputKind, SamplingParams
from fastserve.errors import FastserveError, InvalidRequest
from fastserve.policies import get_policy, policy_names


def test_defaults_are_those_users_know():
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "include_stop_str_in_output": False,
        "output_kind": RequestOutputKind.CUMULATIVE,
        "logit_bias": None,
        "allowed_token_ids": None,
        "structured_outputs": None,
        "bad_words": (),
    }


NUMBERS = ["presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p"]
INTEGERS = ["n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"]
FLAGS = ["ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"]
BAD = [
    *itertools.product(NUMBERS, [math.nan, math.inf, -math.inf, -2.01, 1e30, 10**400, "1", None, True, [1], 1j]),
    *itertools.product(INTEGERS, [math.nan, math.inf, -(2**63) - 1, 2**63, 1.0, "1", True, [1]]),
    *itertools.product(["n", "max_tokens"], [0, -1]),
    *itertools.product(["top_k", "logprobs", "prompt_logprobs"], [-2, 2**31]),
    *itertools.product(FLAGS, [None, 1, "true"]),
    ("n", 65),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("top_p", 0.0),
    ("top_p", 1.0001),
    ("min_p", -0.1),
    ("temperature", -0.1),
    ("temperature", 100.1),
    ("repetition_penalty", 0.0),
    ("spaces_between_special_tokens", False),
    ("output_kind", 3),
    ("output_kind", "DELTA"),
    ("stop", [""]),
    ("stop", ""),
    ("stop", "x" * 257),
    ("stop", ["x"] * 17),
    ("stop", itertools.repeat("x")),
    ("stop", [1]),
    ("stop", 7),
    ("stop", b"x"),
    ("stop", {"x": 1}),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [2**31]),
    ("stop_token_ids", [1.5]),
    ("stop_token_ids", "12"),
    ("stop_token_ids", range(257)),
    ("stop_token_ids", 5),
    ("allowed_token_ids", []),
    ("allowed_token_ids", ["a"]),
    ("allowed_token_ids", itertools.count()),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"a": 1.0}),
    ("logit_bias", {"\u0661": 1.0}),
    ("logit_bias", {1.5: 1.0}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: 100.5}),
    ("logit_bias", {1: "1"}),
    ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ("logit_bias", [(1, 1.0)]),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: repr(value)[:20])
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(InvalidRequest, match=name) as raised:
        SamplingParams(**{name: value})
    assert isinstance(raised.value, FastserveError)
    assert isinstance(raised.value, ValueError)
    assert len(str(raised.value)) < 250, "an error must not echo its input at length"


def test_message_says_what_was_given_and_what_is_allowed():
    with pytest.raises(InvalidRequest, match=r"top_p=1\.5 is not allowed: top_p must be a number in \(0, 1\]"):
        SamplingParams(top_p=1.5)
    with pytest.raises(InvalidRequest, match=r"stop\[1\]=0 is not allowed: .* a string of 1 to 256 characters"):
        SamplingParams(stop=["a", 0])


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def test_values_at_the_bounds_are_taken():
    for name, value in [
        ("temperature", 0), ("temperature", 100), ("top_p", 1), ("top_k", 2**31 - 1), ("min_p", 1), ("n", 64),
        ("presence_penalty", -2), ("frequency_penalty", 2), ("repetition_penalty", 100), ("seed", -(2**63)),
        ("seed", 2**63 - 1), ("max_tokens", None), ("max_tokens", 2**31 - 1), ("logprobs", 0),
        ("logprobs", -1), ("min_tokens", 16), ("stop", ["x" * 256] * 16), ("stop_token_ids", None),
        ("stop_token_ids", range(256)), ("logit_bias", dict.fromkeys(range(1024), -100)),
        ("allowed_token_ids", [0]),
    ]:  # fmt: skip
        SamplingParams(**{name: value})


def test_values_are_stored_in_one_form():
    params = SamplingParams(
        stop="END",
        stop_token_ids=np.array([3, 3, 1]),
        logit_bias={"5": 1, 6: np.float32(2)},
        top_k=-1,
        temperature=np.float64(0.5),
        n=np.int64(2),
        output_kind=1,
    )
    assert params.stop == ("END",)
    assert params.stop_token_ids == (3, 1)
    assert params.logit_bias == {5: 1.0, 6: 2.0}
    assert params.top_k == 0
    assert type(params.n) is int
    assert params.output_kind is RequestOutputKind.DELTA
    assert dataclasses.replace(params, n=1).stop == ("END",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 3


def test_a_caller_cannot_change_params_afterwards():
    bias = {1: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[2] = math.nan
    assert params.logit_bias == {1: 1.0}


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1e-5, False), (0.009, False)])
def test_greedy_begins_below_1e_5(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_stop_strings_need_text():
    with pytest.raises(InvalidRequest, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_token_ids_must_be_the_models(name):
    params = SamplingParams(**{name: {99: 1.0} if name == "logit_bias" else [99]})
    params.check_for_model(vocab_size=100, max_logprobs=20)
    with pytest.raises(InvalidRequest, match=f"{name} holds token id 99.* 0 to 98"):
        params.check_for_model(vocab_size=99, max_logprobs=20)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_logprobs_end_at_the_engines_limit(name):
    SamplingParams(**{name: 20}).check_for_model(100, max_logprobs=20)
    SamplingParams(**{name: -1}).check_for_model(100, max_logprobs=-1)
    for refused in (21, -1):
        with pytest.raises(InvalidRequest, match=rf"{name}={refused} .*\[0, 20\]"):
            SamplingParams(**{name: refused}).check_for_model(100, max_logprobs=20)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_batched_tokens", 0),
        ("max_num_seqs", -1),
        ("max_num_seqs", None),
        ("max_chunk_tokens", 0),
        ("block_size", 2.0),
        ("num_blocks", 0),
        ("max_model_len", 1),
        ("seed", "x"),
        ("dtype", "int8"),
        ("kv_cache_dtype", None),
        ("device", "tpu"),
        ("enable_prefix_caching", 1),
        ("policy", 3),
    ],
)
def test_bad_engine_options_are_refused(name, value):
    with pytest.raises(InvalidRequest, match=name):
        EngineConfig(**{name: value})


def test_policies_are_found_by_name():
    assert policy_names() == ["fcfs", "priority"]
    for bad in ("nobody", "fcfs.py", "../config", ""):
        with pytest.raises(InvalidRequest, match="known policies: fcfs, priority"):
            get_policy(bad)
