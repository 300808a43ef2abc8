"""Requests that schemathesis makes of the OpenAPI document: no 5xx (503 among them), no answer that is not documented.

It is no requirement of the tests: `make test-api` installs it and makes 40 requests to each operation, in
about two minutes. They are the same ones each time; with EXPLORE=1 they are others.
"""

import os

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="not installed: pip install schemathesis")
pytest.importorskip("llguidance", reason="structured replies need the extra serve")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis import checks  # noqa: E402
from schemathesis.specs.openapi import checks as openapi_checks  # noqa: E402

CHECKS = [
    checks.not_a_server_error, openapi_checks.status_code_conformance, openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]  # fmt: skip
EXAMPLES = int(os.environ.get("EXAMPLES", "15"))
"""Requests to each operation."""
EXPLORE = bool(os.environ.get("EXPLORE"))
MAX_REPLY_SECONDS = 0.2
"""Most requests set no length: their replies are ended, which is documented, too."""


@pytest.fixture(scope="module")
def schema(generator, tmp_path_factory):
    from hybrimoe.server.app import create_app
    from hybrimoe.server.served import Served
    from hybrimoe.server.slots import SlotFiles

    files = SlotFiles(tmp_path_factory.mktemp("slots"), "this model", "tiny")
    served = Served("tiny", parallel=2, max_reply_s=MAX_REPLY_SECONDS, slot_files=files)
    served.open(generator)
    app = create_app(served)

    async def without_lifespan(scope, receive, send):
        """schemathesis ends the application after each request."""
        if scope["type"] == "http":
            await app(scope, receive, send)

    yield schemathesis.openapi.from_asgi("/openapi.json", without_lifespan)
    served.close()


def operations(schema):
    return {f"{one.method.upper()} {one.path}": one for one in (result.ok() for result in schema.get_all_operations())}


def try_out(operation):
    """Sends EXAMPLES requests; raises what schemathesis finds."""

    @settings(
        max_examples=EXAMPLES, derandomize=not EXPLORE, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def once(data):
        data.draw(operation.as_strategy()).call_and_validate(checks=CHECKS)

    once()


def test_no_request_is_a_failure_of_the_server_and_every_answer_is_documented(schema):
    found = operations(schema)
    assert len(found) > 20
    failures = {}
    for name, operation in found.items():
        try:
            try_out(operation)
        except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001  # all are tried, and told together
            failures[name] = str(error)[:2000]
    assert not failures, "\n\n".join(f"{name}:\n{text}" for name, text in failures.items())
