"""The log: one line of JSON for each event, whatever its facts are."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from rbee_job_server.logs import configure_logging


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    stream, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging(service="queen", stream=stream)
    try:
        yield stream
    finally:
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(level)


class Opaque:
    def __repr__(self) -> str:
        return "<opaque>"


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        ("\u2028é\U0001f980", "\u2028é\U0001f980"),
        ((1, 2), [1, 2]),
        ({1: "x"}, {"1": "x"}),
        (2**80, 2**80),
        (None, None),
        (Opaque(), "<opaque>"),
        (ValueError("x"), "ValueError('x')"),
        ("half \ud83e of one", "half \ud83e of one"),
    ],
)
def test_a_line_is_json_whatever_its_facts_are(lines: io.StringIO, fact: Any, expected: Any) -> None:
    structlog.get_logger("test").info("said", fact=fact)
    line, rest = lines.getvalue().split("\n")
    known = json.loads(line)

    assert known["fact"] == expected
    assert known["event"] == "said"
    assert '"event": "said"' in line
    assert rest == ""
