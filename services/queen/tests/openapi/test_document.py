"""The OpenAPI document tells every route of the queen, and its page needs nothing from elsewhere."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from rbee_contracts.operations import OPERATIONS
from rbee_job_server import JobServer
from rbee_job_server.beats import Beats
from rbee_queen.app import build_queen_app
from rbee_queen.config import parse
from rbee_queen.fleet import Fleet
from rbee_queen.openapi import build_document, render_page


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return build_document("1.2.3")


def methods_of(app: Starlette) -> Iterator[tuple[str, str]]:
    for route in app.routes:
        assert isinstance(route, Route)
        path = route.path.replace(":path}", "}")
        for method in (route.methods or set()) - {"HEAD"}:
            yield path, method.lower()


def test_every_route_is_in_the_document_and_no_other(document: dict[str, Any], tmp_path: Path) -> None:
    config = parse(["--state-dir", str(tmp_path)], {})
    server = JobServer(service="queen", actor="queen", handlers={})
    app = build_queen_app(config, server, Fleet(lambda: 0.0), Beats())

    told = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert told == set(methods_of(app))


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = set(re.findall(r"'#/components/schemas/([^']+)'", repr(document)))

    assert references <= set(document["components"]["schemas"])


def test_every_operation_is_a_shape(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]

    for name, operation in OPERATIONS.items():
        assert schemas[operation.__name__]["properties"]["operation"] == {"enum": [name]}


def test_names_are_plain_and_ids_unique(document: dict[str, Any]) -> None:
    assert [name for name in document["components"]["schemas"] if "." in name] == []
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))


def test_patterns_are_those_of_json_schema(document: dict[str, Any]) -> None:
    assert r"\Z" not in repr(document).replace("\\\\", "\\")


def test_the_page_shows_every_route_and_loads_nothing(document: dict[str, Any]) -> None:
    page = render_page(document)

    for path in document["paths"]:
        assert path in page
    assert "<script" not in page
    assert "`" not in page, "what is code in Markdown is code in the page"
    assert re.findall(r'(?:src|href)="(?!#)([^"]*)"', page) == ["openapi.json"]
    for anchor in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{anchor}"' in page
