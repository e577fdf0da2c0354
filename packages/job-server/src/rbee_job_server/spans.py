"""Tracing with OpenTelemetry: a span for each job, one for each try of a step below, sent by OTLP over HTTP.

A job's ids follow from its job id: the span's, and the trace's where no caller has begun one. A service
that restarts and goes on with a job therefore goes on with its span, and the spans of the hops below still
find their parent. Spans hold ids, codes, times and counts, and nothing of what was asked or said.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from threading import Thread
from typing import Any, TypeAlias

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from rbee_contracts.errors import RbeeError
from rbee_contracts.events import (
    AnyEvent,
    Decision,
    ExecuteCancelled,
    ExecuteComplete,
    ExecuteError,
    ExecuteTimeout,
    InferComplete,
    InferRetry,
    InferSchedule,
    InferWorker,
    ModelDownloadProgress,
    OpenAIResponse,
    TerminalEvent,
)
from rbee_contracts.operations import Operation
from rbee_contracts.sse import Position
from rbee_contracts.trace import TraceContext
from rbee_job_server.jobs import Publisher
from rbee_job_server.journal import RestoredJob
from rbee_job_server.tracing import attempt_name, span_id, trace_id, traces_url

log = structlog.get_logger(__name__)

Attributes: TypeAlias = dict[str, Any]

FLUSH_S = 2.0
"""How long a stop waits at most for the last spans to be sent."""

EXPORT_TIMEOUT_S = 5.0
"""For one batch, with its repetitions. Nobody waits for it; after that its spans are dropped."""

TELL_EVERY_S = 300.0
"""Seconds between two warnings that the collector does not take the spans."""

MAX_REJECTED = 32
"""Candidates that were not chosen, named in the span of a request."""

_SDK_LOGGERS = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.sdk._shared_internal",
)
"""What says the same as our one warning, for each batch and each repetition of it."""


class SpanTracer:
    """A `Tracer` that sends what it makes to one collector, from a thread of its own.

    Standard variables of OpenTelemetry hold beside the endpoint: `OTEL_TRACES_SAMPLER` and its `_ARG` (all
    are sampled by default, and a caller's decision is followed), `OTEL_RESOURCE_ATTRIBUTES`,
    `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_BSP_*`.
    """

    def __init__(self, endpoint: str, *, service: str, instance: str, version: str) -> None:
        for name in _SDK_LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._instance = instance
        self._ids = _Ids()
        self._exporter = _Exporter(endpoint)
        self._provider = TracerProvider(
            resource=Resource.create(
                {
                    "service.name": f"rbee-{service}",
                    "service.instance.id": instance,
                    "service.version": version,
                }
            ),
            id_generator=self._ids,
            shutdown_on_exit=False,  # `close` does it, and no longer than it may take
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("rbee", version)

    def begin(
        self,
        *,
        job_id: str,
        operation: Operation,
        correlation_id: str,
        parent: TraceContext | None,
        publisher: Publisher,
        begun_at: str | None = None,
    ) -> "SpanOfJob":
        """Begin a job's span; see `Tracer.begin`.

        Args:
            begun_at: RFC 3339; now by default.
        """
        kind, _, which = self._instance.partition("/")
        attributes: Attributes = {
            "rbee.job_id": job_id,
            "rbee.correlation_id": correlation_id,
            "rbee.operation": operation.name,
        }
        if which:
            attributes[f"rbee.{kind}_id"] = which
        for name in ("model", "hive_id", "worker_id"):
            value = getattr(operation, name, None)
            if value is not None:
                attributes.setdefault(f"rbee.{name}", value)
        span = self.start(
            f"job {operation.name}",
            job_id,
            parent=None if parent is None else _span_context(parent),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=None if begun_at is None else int(datetime.fromisoformat(begun_at).timestamp() * 1e9),
        )
        state = None if parent is None else parent.tracestate
        return SpanOfJob(self, span, publisher, actor=self._instance, tracestate=state)

    def resume(self, stored: RestoredJob, publisher: Publisher) -> "SpanOfJob":
        """Begin the span of a restored job; see `Tracer.resume`."""
        span = self.begin(
            job_id=stored.job_id,
            operation=stored.operation,
            correlation_id=stored.correlation_id,
            parent=stored.trace,
            publisher=publisher,
            begun_at=stored.created_at,
        )
        span.note("restored")
        return span

    def start(
        self,
        name: str,
        id_from: str,
        *,
        parent: SpanContext | None,
        kind: SpanKind,
        attributes: Attributes,
        start_time: int | None = None,
    ) -> Span:
        """Start a span whose ids follow from `id_from`. Called on the event loop only."""
        self._ids.span_id, self._ids.trace_id = span_id(id_from), trace_id(id_from)
        # An empty context: what else in this process traces is none of our parents.
        context = Context()
        if parent is not None:
            context = set_span_in_context(NonRecordingSpan(parent), context)
        return self._tracer.start_span(
            name, context=context, kind=kind, attributes=attributes, start_time=start_time
        )

    def close(self) -> None:
        """Send what is left; see `Tracer.close`."""
        if self._exporter.is_failing:
            self._exporter.shutdown()
        closing = Thread(target=self._provider.shutdown, name="rbee-last-spans", daemon=True)
        closing.start()
        closing.join(FLUSH_S)


class SpanOfJob:
    """A `JobSpan`. Stands before the job's publisher, and notes what passes."""

    __slots__ = (
        "_actor",
        "_is_left",
        "_publisher",
        "_span",
        "_span_context",
        "_tracer",
        "context",
        "publish_output",
    )

    def __init__(
        self, tracer: SpanTracer, span: Span, publisher: Publisher, *, actor: str, tracestate: str | None
    ) -> None:
        self._tracer = tracer
        self._span: Span | None = span
        """None once it has ended: thousands of ended jobs are kept."""
        self._span_context = span.get_span_context()
        self._is_left = False
        self._publisher = publisher
        self._actor = actor
        self.context = _trace_context(self._span_context, tracestate)
        self.publish_output = self._publish_first_output

    def note(self, name: str, attributes: Attributes | None = None) -> None:
        """Add an event to the span."""
        if self._span is not None:
            self._span.add_event(name, attributes)

    def publish(self, event: AnyEvent, body: bytes, position: Position) -> None:
        """Pass an event on, and note it where this service has said it."""
        if event.kind == "output":
            self._note_first_output()
        elif isinstance(event, ExecuteComplete | ExecuteError | ExecuteCancelled | ExecuteTimeout):
            self._end(event)
        elif event.actor == self._actor:
            self._note_narration(event)
        self._publisher.publish(event, body, position)

    def _publish_first_output(self, body: bytes, narrations: int, outputs: int) -> None:
        self._note_first_output()
        self._publisher.publish_output(body, narrations, outputs)

    def _note_first_output(self) -> None:
        if self.publish_output != self._publisher.publish_output:
            self.note("first_output")
            self.publish_output = self._publisher.publish_output  # the rest passes by

    def _note_narration(self, event: AnyEvent) -> None:
        match event:
            case InferSchedule(data=decision):
                self._set({"rbee.hive_id": decision.hive_id, "rbee.worker_id": decision.worker_id})
                self.note(event.action, _decided(decision))
            case InferWorker(data=place):
                self._set({"rbee.worker_id": place.worker_id})
                self.note(event.action, {"rbee.worker_id": place.worker_id})
            case InferRetry(data=data):
                self.note(event.action, {"error.type": str(data.get("cause", ""))})
            case InferComplete(data=result):
                self._set(
                    {
                        "gen_ai.usage.prompt_tokens": result.usage.prompt_tokens,
                        "gen_ai.usage.completion_tokens": result.usage.completion_tokens,
                    }
                )
                self.note(event.action)
            case OpenAIResponse(data=head):
                self.note(event.action, {"http.response.status_code": head.status})
            case ModelDownloadProgress():
                pass
            case _:
                self.note(event.action)

    def _set(self, attributes: Attributes) -> None:
        if self._span is not None:
            self._span.set_attributes(attributes)

    def _end(self, event: TerminalEvent) -> None:
        span, self._span = self._span, None
        if span is None:
            return
        match event:
            case ExecuteComplete():
                span.set_attribute("rbee.state", "completed")
            case ExecuteCancelled():
                span.set_attributes({"rbee.state": "cancelled", "rbee.code": event.code})
            case _:
                span.set_attributes({"rbee.state": "failed", "error.type": event.code})
                span.set_status(StatusCode.ERROR, event.code)
        span.end()

    def leave(self) -> None:
        """Send no more of this job; see `JobSpan.leave`."""
        self._span, self._is_left = None, True

    @contextmanager
    def attempt(
        self, operation: str, attempt: int, *, peer: str, lower_job_id: str
    ) -> Iterator[TraceContext]:
        """Span one try at a service below; see `JobSpan.attempt`."""
        span = self._tracer.start(
            f"attempt {operation}",
            attempt_name(lower_job_id),
            parent=self._span_context,
            kind=SpanKind.CLIENT,
            attributes={"rbee.peer": peer, "rbee.attempt": attempt, "rbee.lower_job_id": lower_job_id},
        )
        try:
            yield _trace_context(span.get_span_context(), self.context.tracestate)
        except RbeeError as exc:
            span.set_attribute("error.type", exc.code)
            span.set_status(StatusCode.ERROR, exc.code)
            raise
        except asyncio.CancelledError:
            span.set_attribute("rbee.state", "cancelled")
            raise
        finally:
            if not self._is_left:
                span.end()


class _Ids(IdGenerator):
    """Gives the ids that the next span is to have."""

    def __init__(self) -> None:
        self.span_id = self.trace_id = 1

    def generate_span_id(self) -> int:
        return self.span_id

    def generate_trace_id(self) -> int:
        return self.trace_id


class _Exporter(SpanExporter):
    """Sends batches, and says now and then that they do not arrive. One thread uses it, but to `shutdown`."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._sender = OTLPSpanExporter(endpoint=traces_url(endpoint), timeout=EXPORT_TIMEOUT_S)
        self.is_failing = False
        self._is_shut = False
        self._lost = 0
        self._told: float | None = None

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._is_shut:
            return SpanExportResult.FAILURE
        result = self._sender.export(spans)
        if result is SpanExportResult.SUCCESS:
            if self.is_failing:
                log.info("traces_exported_again", endpoint=self._endpoint, spans_lost=self._lost)
            self.is_failing, self._lost, self._told = False, 0, None
        elif not self._is_shut:
            self._fail(len(spans))
        return result

    def _fail(self, spans: int) -> None:
        self.is_failing = True
        self._lost += spans
        now = time.monotonic()
        if self._told is None or now - self._told >= TELL_EVERY_S:
            self._told = now
            log.warning(
                "traces_not_exported",
                endpoint=self._endpoint,
                spans_lost=self._lost,
                remedy="start a collector there that takes OTLP over HTTP, or set another --otlp-endpoint",
            )

    def shutdown(self) -> None:
        if not self._is_shut:
            self._is_shut = True
            self._sender.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


def _decided(decision: Decision) -> Attributes:
    """Tell a decision: what was chosen and why, and why not the others."""
    others = [c for c in decision.candidates if (c.hive_id, c.worker_id) != _chosen(decision)]
    return {
        "rbee.hive_id": decision.hive_id,
        "rbee.worker_id": decision.worker_id,
        "rbee.reason": decision.reason,
        "rbee.candidates": len(decision.candidates),
        "rbee.others": [f"{c.worker_id} on {c.hive_id}: {c.reason}" for c in others[:MAX_REJECTED]],
    }


def _chosen(decision: Decision) -> tuple[str, str]:
    return decision.hive_id, decision.worker_id


def _span_context(trace: TraceContext) -> SpanContext:
    _, in_trace, in_span, flags = trace.traceparent.split("-")
    return SpanContext(
        int(in_trace, 16), int(in_span, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16))
    )


def _trace_context(span: SpanContext, tracestate: str | None) -> TraceContext:
    return TraceContext(f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}", tracestate)
