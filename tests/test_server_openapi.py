# SPDX-License-Identifier: Apache-2.0
"""Random requests, within what the OpenAPI description allows and beyond it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from serving import RunningServer
from tiny_models import make_tiny_checkpoint

QUIET = settings(
    max_examples=40,
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
    batch_dir = str(tmp_path_factory.mktemp("store"))
    with RunningServer(tiny_dir, engine, served_model_name=["tiny"], batch_dir=batch_dir) as running:
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
        if mode is GenerationMode.NEGATIVE and not list(operation.body):
            continue  # takes a name at most, so nothing can be wrong

        @QUIET
        @given(case=operation.as_strategy(generation_mode=mode))
        def fuzz(case: Any) -> None:
            case.call_and_validate(checks=[not_a_server_error, content_type_conformance, response_schema_conformance])

        fuzz()
