"""Tracing as the rest of the package sees it. Only `spans` imports OpenTelemetry, and only where it is on.

A job carries the trace context that its caller sent, and hands it to the hop below. Where tracing is on, it
has a span besides, which stands between the job and who publishes its events, and so sees them all.
"""

import argparse
import hashlib
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from starlette.requests import HTTPConnection

from rbee_contracts.operations import Operation
from rbee_contracts.trace import TRACEPARENT, TRACESTATE, TraceContext, parse_trace
from rbee_job_server.correlation import header
from rbee_job_server.jobs import Publisher
from rbee_job_server.options import refuse

if TYPE_CHECKING:
    from rbee_job_server.journal import RestoredJob

ENDPOINT_VARIABLE = "RBEE_OTLP_ENDPOINT"
STANDARD_ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""OpenTelemetry's own name for it, which stands in where rbee's is not set."""

ENDPOINT_PATTERN = r"^https?://[^/?#\s@]+(/[^?#\s]*)?\Z"
ENDPOINT_WORDS = "an http:// or https:// URL without a user, as http://127.0.0.1:4318"
ENDPOINT_HELP = "where an OpenTelemetry collector takes traces, by OTLP over HTTP (default: none, no tracing)"

_is_endpoint = re.compile(ENDPOINT_PATTERN).match
_TRACEPARENT = TRACEPARENT.encode()
_TRACESTATE = TRACESTATE.encode()


class JobSpan(Publisher, Protocol):
    """The span of one job. The job's terminal event ends it."""

    @property
    def context(self) -> TraceContext:
        """What the hop below is told: this span is the parent there."""

    def attempt(
        self, operation: str, attempt: int, *, peer: str, lower_job_id: str
    ) -> AbstractContextManager[TraceContext]:
        """Span one try at a service below, counted from 0; gives what that service is told."""

    def leave(self) -> None:
        """Send neither this span nor those of its tries: the next run of the service goes on with them."""


class Tracer(Protocol):
    """Makes the spans of one service, and sends them to the collector."""

    def begin(
        self,
        *,
        job_id: str,
        operation: Operation,
        correlation_id: str,
        parent: TraceContext | None,
        publisher: Publisher,
    ) -> JobSpan:
        """Begin the span of a new job, below its caller's, or a trace of its own."""

    def resume(self, stored: "RestoredJob", publisher: Publisher) -> JobSpan:
        """Begin the span of a restored job: the same span, as nothing of it was sent before."""

    def close(self) -> None:
        """Send what is left. Bounded, see `spans.FLUSH_S`; at once where the collector does not answer."""


def trace_of(connection: HTTPConnection) -> TraceContext | None:
    """Give the caller's place in its trace; None where it names none, or none that can be read."""
    given = header(connection.scope, _TRACEPARENT)
    return None if given is None else parse_trace(given, header(connection.scope, _TRACESTATE))


def trace_above(traceparent: str | None, job_id: str) -> TraceContext | None:
    """Give what the hop above had sent with a job, of what was sent below for it: the trace is the same."""
    below = None if traceparent is None else parse_trace(traceparent)
    if below is None:
        return None
    version, in_trace, _, flags = below.traceparent.split("-")
    return TraceContext(f"{version}-{in_trace}-{span_id(attempt_name(job_id)):016x}-{flags}")


def open_tracer(endpoint: str | None, *, service: str, instance: str, version: str) -> Tracer | None:
    """Start tracing; None without an endpoint, and then OpenTelemetry is not even imported.

    Args:
        endpoint: the collector's base URL.
        service: `queen`, `hive` or `worker`.
        instance: which one, e.g. `hive/box1`.
    """
    if endpoint is None:
        return None
    from rbee_job_server.spans import SpanTracer

    return SpanTracer(endpoint, service=service, instance=instance, version=version)


def span_id(name: str) -> int:
    """Give the span id that follows from a name; never 0."""
    return int.from_bytes(hashlib.sha256(b"span:" + name.encode()).digest()[:8], "big") or 1


def trace_id(name: str) -> int:
    """Give the trace id that follows from a name; never 0."""
    return int.from_bytes(hashlib.sha256(b"trace:" + name.encode()).digest()[:16], "big") or 1


def attempt_name(lower_job_id: str) -> str:
    """Name the try that a job below was sent for, as `span_id` takes it."""
    return f"attempt/{lower_job_id}"


def traces_url(endpoint: str) -> str:
    """Give the address that takes traces, of a collector's base URL."""
    return f"{endpoint.rstrip('/')}/v1/traces"


def add_tracing_option(parser: argparse.ArgumentParser) -> None:
    """Add `--otlp-endpoint`; `read_tracing_option` reads it."""
    parser.add_argument("--otlp-endpoint", metavar="URL", help=ENDPOINT_HELP)


def read_tracing_option(
    parser: argparse.ArgumentParser, args: argparse.Namespace, environ: Mapping[str, str]
) -> str | None:
    """Give the collector's base URL by the flag, or by the environment; None where tracing is off.

    Raises:
        SystemExit: with status 2 and one clear line, when it is no URL.
    """
    for source, given in (
        ("--otlp-endpoint", args.otlp_endpoint),
        (ENDPOINT_VARIABLE, environ.get(ENDPOINT_VARIABLE)),
        (STANDARD_ENDPOINT_VARIABLE, environ.get(STANDARD_ENDPOINT_VARIABLE)),
    ):
        if not given:
            continue
        if _is_endpoint(given) is None:
            # It may hold a password, so it is not told.
            refuse(parser, f"{source} must be {ENDPOINT_WORDS}; headers go into OTEL_EXPORTER_OTLP_HEADERS")
        return str(given)
    return None
