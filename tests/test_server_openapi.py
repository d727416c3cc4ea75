# SPDX-License-Identifier: Apache-2.0
"""Random requests: those that the OpenAPI description allows, and combinations of every option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from serving import RunningServer
from tiny_models import make_tiny_checkpoint

QUIET = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    tiny_dir = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=64)
    engine = {"block_size": 16, "num_blocks": 48, "max_num_batched_tokens": 16}
    with RunningServer(tiny_dir, engine, served_model_name=["tiny"]) as running:
        yield running
        assert running.get("/health").status_code == 200
        running.wait_until_empty()


@pytest.fixture(scope="module")
def api(server: RunningServer) -> Any:
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_makes_a_server_error(api: Any, mode: GenerationMode) -> None:
    operations = [result.ok() for result in api.get_all_operations()]
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/metrics"} <= {one.path for one in operations}
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and (operation.method == "get" or operation.path == "/ping"):
            continue  # takes nothing, so nothing can be wrong

        @QUIET
        @given(case=operation.as_strategy(generation_mode=mode))
        def fuzz(case: Any) -> None:
            case.call_and_validate(checks=[not_a_server_error, content_type_conformance, response_schema_conformance])

        fuzz()


OPTIONS = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["The quick", [5, 6, 7], ["a", "b"]])},
    optional={
        "n": st.integers(1, 3),
        "max_tokens": st.integers(1, 12),
        "temperature": st.sampled_from([0, 0.5, 2.0]),
        "top_p": st.sampled_from([0.1, 1.0]),
        "top_k": st.sampled_from([-1, 1, 20]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "presence_penalty": st.sampled_from([-2.0, 1.0]),
        "frequency_penalty": st.sampled_from([-2.0, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.3]),
        "seed": st.integers(-5, 5),
        "stop": st.sampled_from(["e", ["a", "th"]]),
        "stop_token_ids": st.just([40]),
        "include_stop_str_in_output": st.booleans(),
        "ignore_eos": st.booleans(),
        "min_tokens": st.integers(0, 3),
        "skip_special_tokens": st.booleans(),
        "logit_bias": st.just({"40": 5, "41": -100}),
        "allowed_token_ids": st.just([40, 41, 42, 43]),
        "logprobs": st.integers(0, 5),
        "prompt_logprobs": st.integers(0, 2),
        "echo": st.booleans(),
        "stream": st.booleans(),
        "cache_salt": st.sampled_from(["x", "y"]),
        "return_token_ids": st.booleans(),
        "return_tokens_as_token_ids": st.booleans(),
    },
)


@settings(QUIET, max_examples=150)
@given(body=OPTIONS)
def test_every_combination_of_options_is_answered_alike_streamed_or_not(
    server: RunningServer, body: dict[str, Any]
) -> None:
    import json

    if body.get("min_tokens", 0) > body.get("max_tokens", 16):
        body["min_tokens"] = 0
    body.setdefault("seed", 1)
    streamed = server.post("/v1/completions", {**body, "stream": True})
    whole = server.post("/v1/completions", {**body, "stream": False})
    assert whole.status_code == streamed.status_code == 200, (whole.text, streamed.text)
    choices = whole.json()["choices"]
    texts = dict.fromkeys(range(len(choices)), "")
    reasons: dict[int, Any] = {}
    for event in streamed.text.split("\n\n")[:-2]:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = (choice["finish_reason"], choice["stop_reason"])
    assert [texts[i] for i in sorted(texts)] == [choice["text"] for choice in choices]
    assert [reasons[i] for i in sorted(reasons)] == [(c["finish_reason"], c["stop_reason"]) for c in choices]
