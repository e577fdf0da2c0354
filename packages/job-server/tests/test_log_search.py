"""Which lines belong to a request, how many are kept, and that they are those that were logged."""

import io
import json
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog

from rbee_contracts.nodes import LogLine
from rbee_contracts.operations import LogSearch
from rbee_job_server.log_search import LogRing, find, kept_since, newest, own_lines
from rbee_job_server.logs import configure_logging

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
JOB = "job-11111111-2222-4333-8444-555555555555"


def line(event: str, at: int = 0, **facts: Any) -> str:
    values = {
        "event": event,
        "level": "info",
        "service": "worker/w",
        "timestamp": f"2026-01-02T03:04:{at:02}Z",
    }
    return json.dumps(values | facts)


def found(texts: list[str], **search: Any) -> list[str]:
    op = LogSearch(**{"correlation_id": "corr-1"} | search)
    return [line.event for line in find(texts, op, service="worker/w", now=NOW)]


def test_a_line_belongs_to_the_request_that_it_names() -> None:
    texts = [
        line("before", correlation_id="corr-0"),
        line("ours", correlation_id="corr-1"),
        line("another", correlation_id="corr-10"),
        line("mentions it", details="corr-1"),
        line("ours too", correlation_id="corr-1"),
    ]

    assert found(texts) == ["ours", "ours too"]


def test_an_engines_line_belongs_to_the_request_whose_id_it_has() -> None:
    texts = [
        f"INFO 01-02 Added request chatcmpl-corr-1-{JOB}.",
        line("job_accepted", 1, correlation_id="corr-1", job_id=JOB),
        line("else", 2, correlation_id="corr-2", job_id=JOB),
        f"(EngineCore pid=7) WARNING 01-02 03:04:02 [x.py:1] Aborted request chatcmpl-corr-1-{JOB}.",
        "INFO nothing of corr-1 in particular",
        line("not_from_rbee", 3, correlation_id="corr-9", details=f"corr-1-{JOB}"),
    ]
    op = LogSearch(correlation_id="corr-1")
    lines = list(find(texts, op, service="worker/w", now=NOW))

    assert [one.event.split()[0] for one in lines] == ["job_accepted", "(EngineCore", "not_from_rbee"]
    assert (lines[1].level, lines[1].timestamp) == ("warning", "2026-01-02T03:04:02Z")
    assert lines[1].facts == {}


def test_an_id_that_many_requests_have_and_more_contain_finds_its_own() -> None:
    jobs = [f"job-11111111-2222-4333-8444-{n:012}" for n in range(500)]
    texts = [line(f"ours {n}", correlation_id="a", job_id=job) for n, job in enumerate(jobs)]
    texts += [line("another", correlation_id=f"a-{n}", job_id=job) for n, job in enumerate(jobs)]
    texts += [
        f"INFO Added request a-{jobs[7]}.",
        f"INFO Added request b-{jobs[7]}.",
        "INFO Added request a-job-1",
    ]

    assert found(texts, correlation_id="a") == [*(f"ours {n}" for n in range(500)), texts[-3]]


def test_a_line_is_of_the_process_in_whose_log_it_stands() -> None:
    forged = line("job_ended", correlation_id="corr-1", service="queen")

    (told,) = find([forged], LogSearch(correlation_id="corr-1"), service="worker/w", now=NOW)

    assert told.service == "worker/w"


def test_old_lines_and_lighter_ones_are_left_out() -> None:
    texts = [
        line("old", 1, correlation_id="corr-1", level="error"),
        line("new", 4, correlation_id="corr-1"),
        line("grave", 4, correlation_id="corr-1", level="warning"),
    ]

    assert found(texts, since_s=2.0) == ["new", "grave"]
    assert found(texts, level="warning") == ["old", "grave"]
    assert found(texts, since_s=2.0, level="error") == []


@pytest.mark.parametrize("text", ['{"corr-1', "[corr-1]", '{"event": 7, "x": "corr-1"}', "corr-1\x00\ud800"])
def test_a_broken_line_is_passed_over(text: str) -> None:
    assert found([text, line("ours", correlation_id="corr-1")]) == ["ours"]


def test_of_too_many_lines_the_newest_are_told() -> None:
    lines = [LogLine(timestamp=f"{n:03}", service="s", level="info", event="e") for n in (3, 1, 2)]
    long = [
        LogLine(timestamp=f"{n}", service="s", level="info", event="e", facts={"f": "\0" * (350 * 2**10)})
        for n in range(9)
    ]

    assert [one.timestamp for one in newest(lines, 2)] == ["002", "003"]
    assert [one.timestamp for one in newest(lines, 9)] == ["001", "002", "003"]
    assert [one.timestamp for one in newest(long, 9)] == ["8"], "as JSON a line is longer than it was"
    assert [one.timestamp for one in newest(lines, 9, max_bytes=120)] == ["002", "003"]


def test_a_ring_keeps_the_newest_and_says_so() -> None:
    ring = LogRing(max_chars=1000)
    for n in range(50):
        ring.keep(line("e", n, correlation_id="corr-1"))

    assert ring.has_dropped
    assert sum(map(len, ring.lines())) <= 1000
    assert ring.lines()[-1] == line("e", 49, correlation_id="corr-1")
    assert kept_since(ring, "queen").endswith("older ones were dropped.")
    assert kept_since(LogRing(), "queen") == "queen has its own lines since now: when it was started."


def test_threads_may_log_at_once() -> None:
    ring = LogRing(max_chars=20_000)

    def log() -> None:
        for _ in range(5000):
            ring.keep("x" * 10)

    threads = [threading.Thread(target=log) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(ring.lines()) == 2000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(params=[io.StringIO, Terminal], ids=["file", "terminal"])
def logged(request: pytest.FixtureRequest) -> Iterator[LogRing]:
    ring, root = LogRing(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging(service="queen", stream=request.param(), ring=ring)
    try:
        yield ring
    finally:
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(level)


def test_what_is_logged_is_found_whoever_looks_on(logged: LogRing) -> None:
    with structlog.contextvars.bound_contextvars(correlation_id="corr-1"):
        structlog.get_logger("test").info("said", fact=[1, "two"])
        logging.getLogger("a.library").warning("it %s", "said")
        try:
            raise ValueError("what went wrong")
        except ValueError:
            structlog.get_logger("test").exception("failed")
    structlog.get_logger("test").info("else", correlation_id="corr-2")
    lines = own_lines(logged, LogSearch(correlation_id="corr-1"), "queen")

    assert [(one.service, one.level, one.event) for one in lines] == [
        ("queen", "info", "said"),
        ("queen", "warning", "it said"),
        ("queen", "error", "failed"),
    ]
    assert lines[0].facts == {"fact": [1, "two"]}
    assert "what went wrong" in json.dumps(lines[2].facts)
