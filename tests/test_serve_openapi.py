"""schemathesis asks what the service's own description allows, and what it forbids."""

import json
from collections import Counter
from decimal import Decimal

import httpx
import pytest
from pipelines import make_pipeline
from serving import running

COUNTS = {"fast": 15, "thorough": 150}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pipe = make_pipeline(tmp_path_factory.mktemp("openapi"))
    pipe.model.config.text_config.max_position_embeddings = 200  # so that no answer is long
    with running(pipe, name="tiny", max_wait_ms=0, max_new_tokens=8, max_n=2, request_seconds=20) as (address, _):
        yield address


@pytest.fixture
def same_examples(monkeypatch):
    """hypothesis also draws constants of whatever modules of ours are loaded: every change would be asked otherwise."""
    from hypothesis.internal.conjecture import providers

    monkeypatch.setattr(providers, "_get_local_constants", providers.Constants)


def test_the_description_names_the_model(server):
    description = httpx.get(f"{server}/openapi.json").json()
    schemas = description["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == ["tiny"]
    assert schemas["ImageRequest"]["properties"]["model"]["anyOf"][0]["enum"] == ["tiny"]
    (parameter,) = description["paths"]["/v1/models/{model}"]["get"]["parameters"]
    assert parameter["schema"]["enum"] == ["tiny"]


def test_limits_are_described_exactly(server):
    """To the last digit: as a float the limit of seeds would be written as more than it is."""
    text = httpx.get(f"{server}/openapi.json").text
    seeds = json.loads(text, parse_float=Decimal)["components"]["schemas"]["ChatRequest"]["properties"]["seed"]["anyOf"]
    assert seeds[0] == {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**63}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "red"}], "max_tokens": 1}
    for seed, status in ((2**63 - 1, 200), (2**63, 422)):
        assert httpx.post(f"{server}/v1/chat/completions", json=body | {"seed": seed}).status_code == status


@pytest.mark.parametrize("effort", ["fast", pytest.param("thorough", marks=pytest.mark.slow)])
def test_all_settings_of_the_description_answer_a_question(server, same_examples, effort):
    """As below, but of a conversation that can be answered: whatever temperature, top_p and the like are, it is."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, example, given, seed, settings

    schema = schemathesis.openapi.from_url(f"{server}/openapi.json")
    operation = schema["/v1/chat/completions"]["POST"]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "red"}]}
    statuses: Counter[int] = Counter()

    @seed(0)
    @settings(
        max_examples=2 * COUNTS[effort],
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @example(case=operation.Case(body={"temperature": 1e-300}, media_type="application/json"))
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE))
    def ask(case):
        for name in ("max_tokens", "max_completion_tokens", "n", "stop", "stream_options"):  # have limits of their own
            case.body.pop(name, None)
        case.body |= asked | {"stream": False, "max_tokens": 4}
        response = case.call(timeout=30)
        statuses[response.status_code] += 1
        # For JSON Schema 3.0 is an integer; for us it is none.
        whole = any(isinstance(value, float) and "valid integer" in response.text for value in case.body.values())
        assert response.status_code == (422 if whole else 200), (case.body, response.text)

    ask()
    assert statuses[200] > COUNTS[effort]


@pytest.mark.parametrize("effort", ["fast", pytest.param("thorough", marks=pytest.mark.slow)])
def test_no_request_of_the_description_fails(server, same_examples, effort):
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
                continue  # it could be wrong only in the model's name

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
