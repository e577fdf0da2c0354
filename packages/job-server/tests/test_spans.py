"""Spans by themselves: ids that follow from jobs, a collector that is not there, and one that hangs."""

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import anyio
import msgspec
import pytest
from rbee_collector import collector
from rbee_inprocess import PATIENCE_S
from rbee_ports import HeldPort
from rbee_processes import until
from structlog.testing import capture_logs

from rbee_contracts.errors import RbeeError
from rbee_contracts.events import AnyEvent
from rbee_contracts.ids import new_job_id
from rbee_contracts.operations import Infer, Status
from rbee_contracts.sse import Position
from rbee_contracts.trace import TraceContext
from rbee_job_server import JobContext, JobServer, Submission, spans
from rbee_job_server.jobs import JobPolicy
from rbee_job_server.journal import RestoredJob
from rbee_job_server.spans import SpanTracer
from rbee_job_server.tracing import open_tracer, span_id, trace_above, trace_id

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = TraceContext(f"00-{TRACE}-{SPAN}-01", "vendor=1")


class Published:
    """Takes what a job publishes."""

    def __init__(self) -> None:
        self.outputs = 0

    def publish(self, event: AnyEvent, body: bytes, position: Position) -> None:
        raise NotImplementedError

    def publish_output(self, body: bytes, narrations: int, outputs: int) -> None:
        self.outputs += 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Spans are sent at once, and waited for; the loggers that tracing silences speak again after it."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setattr(spans, "FLUSH_S", PATIENCE_S)
    monkeypatch.setattr(spans, "EXPORT_TIMEOUT_S", PATIENCE_S)
    yield
    for name in spans._SDK_LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)


def tracer(endpoint: str) -> SpanTracer:
    return SpanTracer(endpoint, service="hive", instance="hive/box1", version="1")


def begin(made: SpanTracer, job_id: str, parent: TraceContext | None = None) -> spans.SpanOfJob:
    return made.begin(
        job_id=job_id, operation=Status(), correlation_id="corr-1", parent=parent, publisher=Published()
    )


def test_a_jobs_ids_follow_from_its_id() -> None:
    job_id = new_job_id()
    with collector() as taken:
        made = tracer(taken.url)
        own, called = begin(made, job_id).context, begin(made, job_id, CALLER).context
        made.close()

    assert own.traceparent == f"00-{trace_id(job_id):032x}-{span_id(job_id):016x}-01"
    assert called.traceparent == f"00-{TRACE}-{span_id(job_id):016x}-01"
    assert called.tracestate == "vendor=1"


def test_an_attempt_is_found_again_by_the_job_that_it_was_sent_for() -> None:
    job_id, lower_id = new_job_id(), new_job_id()
    with collector() as taken:
        made = tracer(taken.url)
        with begin(made, job_id, CALLER).attempt("infer", 0, peer="worker w", lower_job_id=lower_id) as sent:
            pass
        made.close()
        (attempt,) = taken.spans()

    assert trace_above(f"00-{TRACE}-{'1' * 16}-01", lower_id) == TraceContext(sent.traceparent)
    assert trace_above(None, lower_id) is None
    assert (attempt.name, attempt.parent) == ("attempt infer", f"{span_id(job_id):016x}")
    assert attempt.attributes["rbee.peer"] == "worker w"


def test_a_failed_attempt_tells_its_code_and_not_its_words() -> None:
    with collector() as taken:
        made = tracer(taken.url)
        with (
            suppress(RbeeError),
            begin(made, new_job_id()).attempt("infer", 1, peer="p", lower_job_id=new_job_id()),
        ):
            raise RbeeError("The prompt 'heffalump' is bad.", code="bad_prompt")
        made.close()
        (attempt,) = taken.spans()

    assert attempt.is_error
    assert attempt.attributes["error.type"] == "bad_prompt"
    assert b"heffalump" not in taken.everything()


def test_a_cancelled_attempt_is_no_error() -> None:
    with collector() as taken:
        made = tracer(taken.url)
        with (
            suppress(asyncio.CancelledError),
            begin(made, new_job_id()).attempt("infer", 0, peer="p", lower_job_id=new_job_id()),
        ):
            raise asyncio.CancelledError
        made.close()
        (attempt,) = taken.spans()

    assert not attempt.is_error
    assert attempt.attributes["rbee.state"] == "cancelled"


async def test_what_goes_on_in_the_next_run_is_sent_only_by_that() -> None:
    async def ask_below(_: Status, context: JobContext) -> None:
        assert context.job.span is not None
        with context.job.span.attempt("status", 0, peer="worker/w", lower_job_id="job-below"):
            asking.set()
            await anyio.sleep_forever()

    asking = anyio.Event()
    with collector() as taken:
        made = tracer(taken.url)
        server = JobServer(service="hive", actor="hive/box1", handlers={Status: ask_below}, tracer=made)
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.run)
            server.submit(Submission(operation=Status(), correlation_id="corr-1", respond_async=True))
            await asking.wait()
            await server.leave()
            tasks.cancel_scope.cancel()
        made.close()

    assert taken.spans() == []


def restored() -> RestoredJob:
    return RestoredJob(
        job_id=new_job_id(),
        seq=1,
        operation=Infer(model="m", prompt="heffalump"),
        digest=b"",
        correlation_id="corr-1",
        idempotency_key=None,
        policy=JobPolicy(starts_at_once=True, resume_window_s=None, timeout_s=None),
        state="running",
        created_at="2026-01-02T03:04:05.678901Z",
        started_at=None,
        finished_at=None,
        age_s=0,
        has_spoken=False,
        error=None,
        usage=None,
        result=None,
        said=[],
        steps=[],
        trace=CALLER,
    )


def test_a_restored_job_goes_on_with_its_span() -> None:
    stored = restored()
    with collector() as taken:
        made = tracer(taken.url)
        assert made.resume(stored, Published()).context == begin(made, stored.job_id, CALLER).context
        made.close()


@pytest.mark.parametrize(
    ("changes", "is_traced"),
    [({}, True), ({"had_ended": True}, False), ({"state": "completed", "finished_at": "2026"}, False)],
    ids=["runs", "ended below", "ended here"],
)
def test_what_had_ended_in_the_run_before_is_not_traced_again(
    changes: dict[str, Any], is_traced: bool
) -> None:
    with collector() as taken:
        made = tracer(taken.url)
        server = JobServer(service="hive", actor="hive/box1", handlers={}, tracer=made)
        stored = msgspec.structs.replace(restored(), **changes)
        server.restore(stored)
        job = server.registry.get(stored.job_id)
        made.close()

    assert (job.span is not None) is is_traced
    assert job.trace is not None, "what it sends below stays in its caller's trace"


def test_only_the_first_output_is_looked_at() -> None:
    published = Published()
    with collector() as taken:
        made = tracer(taken.url)
        span = made.begin(
            job_id=new_job_id(), operation=Status(), correlation_id="c", parent=None, publisher=published
        )
        for _ in range(3):
            span.publish_output(b"{}", 0, 1)
        made.close()

    assert published.outputs == 3
    assert span.publish_output == published.publish_output


@pytest.mark.parametrize("sampler", ["always_off", "parentbased_always_off", "traceidratio"])
def test_what_is_not_sampled_is_carried_on_as_such(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.0")
    with collector() as taken:
        made = tracer(taken.url)
        context = begin(made, new_job_id()).context
        made.close()

    assert context.traceparent.endswith("-00")
    assert taken.spans() == []


def export(made: SpanTracer) -> None:
    """Have one span sent, now."""
    with begin(made, new_job_id()).attempt("infer", 0, peer="p", lower_job_id=new_job_id()):
        pass
    made._provider.force_flush()


def test_a_collector_that_is_not_there_is_told_once_and_again_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spans, "EXPORT_TIMEOUT_S", 0.5)  # less than the wait before a repetition
    with HeldPort() as port, capture_logs() as logs:
        made = tracer(port.url)
        for _ in range(3):
            export(made)

        def is_back() -> bool:
            export(made)
            return any(log["event"] == "traces_exported_again" for log in logs)

        with collector(port.number):
            until(is_back, "it is told that the collector is back")
        made.close()

    told = [log for log in logs if log["event"].startswith("traces_")]
    assert [log["event"] for log in told] == ["traces_not_exported", "traces_exported_again"]
    assert told[0]["spans_lost"] == 1
    assert told[1]["spans_lost"] >= 3
    assert "collector" in told[0]["remedy"]


def last_senders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rbee-last-spans"]


def test_a_collector_that_hangs_holds_up_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop is over though the last spans are still being sent."""
    monkeypatch.setattr(spans, "FLUSH_S", 0.2)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        made = tracer(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with begin(made, new_job_id()).attempt("infer", 0, peer="p", lower_job_id=new_job_id()):
            pass
        made.close()
        sending = last_senders()
        made._exporter.shutdown()  # what hangs ends with the socket, and is not tried again

    assert sending, "the stop waited for the collector"
    until(lambda: not last_senders(), "nothing goes on behind the next test", PATIENCE_S)


def test_without_an_endpoint_opentelemetry_is_not_imported() -> None:
    assert open_tracer(None, service="queen", instance="queen", version="1") is None
    script = (
        "import sys, json, rbee_queen.main, rbee_hive.main, rbee_worker.main\n"
        "print(json.dumps([name for name in sys.modules if name.startswith('opentelemetry')]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded: list[Any] = json.loads(done.stdout)

    assert loaded == []
