"""What the OpenAPI document allows, and what it does not, sent to a server of two ranks: never a 5xx, and every answer
as the document says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from ringlm.frontend.server.app import ENDPOINTS
from tests.frontend.server.ring import serving

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def document() -> Iterator[Any]:
    """Of a server whose answers are short."""
    with serving("--context", "48") as (_, url):
        yield schemathesis.openapi.from_url(url.replace("/v1", "/openapi.json"))


# What takes no body can be asked in no wrong way.
ASKED = [(endpoint, mode) for endpoint in ENDPOINTS for mode in GenerationMode if endpoint.takes or mode.is_positive]


@pytest.mark.parametrize(("endpoint", "mode"), ASKED, ids=lambda value: getattr(value, "path", value))
def test_no_request_breaks_the_server(document: Any, endpoint: Any, mode: GenerationMode) -> None:
    operation = document[endpoint.path.replace(":path", "")][endpoint.method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=20, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    ask()
