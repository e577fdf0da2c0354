"""schemathesis asks every route of the queen what it likes: no 500, and no answer that is not documented."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rbee_processes import MODELS, Cluster
from schemathesis import Case
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from rbee_queen.openapi import build_document

pytestmark = pytest.mark.timeout(900)

ENDLESS = {"/v1/events", "/v1/heartbeats/stream"}
"""Streams that end when the queen does."""

CHECKS = [content_type_conformance, response_schema_conformance, status_code_conformance]

SCHEMA = schemathesis.openapi.from_dict(build_document("0"))
ROUTES = [
    (path, method.upper())
    for path, methods in build_document("0")["paths"].items()
    for method in methods
    if path not in ENDLESS
]

of_schemathesis = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("schemathesis")
    models = folder / "models"
    shutil.copytree(MODELS / "rbee-tiny", models / "rbee-tiny")
    with Cluster(folder, engine="sim", models=models) as cluster:
        cluster.spawn("rbee-tiny")
        yield cluster.queen.url


def check(case: "Case[Any]", url: str) -> None:
    response = case.call(base_url=url, timeout=120)

    assert response.status_code != 500, response.text
    case.validate_response(response, checks=CHECKS)


@pytest.mark.parametrize(("path", "method"), ROUTES, ids=lambda value: value)
def test_no_500_and_no_answer_that_is_not_documented(url: str, path: str, method: str) -> None:
    operation = SCHEMA[path][method]

    @of_schemathesis
    @given(case=operation.as_strategy())
    def ask(case: "Case[Any]") -> None:
        case.headers.pop("Prefer", None)  # what starts at once would change the cluster for the next one
        check(case, url)

    ask()


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/embeddings": {"input": "Hi"},
}


@pytest.mark.parametrize("path", BODIES)
def test_a_model_that_is_served_answers_as_documented_too(url: str, path: str) -> None:
    operation = SCHEMA[path]["POST"]

    @of_schemathesis
    @given(case=operation.as_strategy(), stream=st.booleans())
    def ask(case: "Case[Any]", stream: bool) -> None:
        case.body = {**BODIES[path], "model": "rbee-tiny", "stream": stream}
        check(case, url)

    ask()
