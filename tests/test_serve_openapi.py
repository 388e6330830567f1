"""schemathesis asks what the service's own description allows, and what it forbids."""

from collections import Counter

import httpx
import pytest
from serving import running
from test_mllm_pipeline import make_pipeline

COUNTS = {"fast": 15, "thorough": 150}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pipe = make_pipeline(tmp_path_factory.mktemp("openapi"))
    pipe.model.config.text_config.max_position_embeddings = 200  # so that no answer is long
    with running(pipe, name="tiny", max_wait_ms=0, max_new_tokens=8, max_n=2, request_seconds=20) as (address, _):
        yield address


@pytest.mark.parametrize("effort", ["fast", pytest.param("thorough", marks=pytest.mark.slow)])
def test_no_request_of_the_description_fails(server, effort):
    """No 5xx, no status, type or body that the description does not promise; what it forbids is refused."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
        negative_data_rejection,
    ]
    schema = schemathesis.openapi.from_url(f"{server}/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:
            if mode.is_negative and not operation.body:
                continue  # nothing that could be wrong: every text may be a model's name

            @seed(0)
            @settings(
                max_examples=COUNTS[effort],
                deadline=None,
                database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case):
                response = case.call_and_validate(checks=checks, timeout=30)
                seen[case.operation.path, response.status_code] += 1

            ask()
    assert {path for path, _ in seen} == set(httpx.get(f"{server}/openapi.json").json()["paths"])
    assert not [status for _, status in seen if status >= 500]
    assert seen["/v1/models", 200] and seen["/v1/chat/completions", 422], seen
    assert httpx.get(f"{server}/health").json()["status"] == "ok"
