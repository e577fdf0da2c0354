"""A small OpenTelemetry collector: takes spans by OTLP over HTTP and keeps them for the tests to look at."""

import gzip
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class SpanSeen(NamedTuple):
    """One span as it arrived; ids in hexadecimal, `parent` empty for a root, `events` by name."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent: str
    attributes: dict[str, Any]
    events: dict[str, dict[str, Any]]
    is_error: bool
    start_ns: int
    end_ns: int


class Collector:
    """What has arrived so far. `url` is its base URL."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[SpanSeen] = []
        self._bodies: list[bytes] = []
        self.url = ""

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        spans = [
            SpanSeen(
                service=_attributes(group.resource.attributes)["service.name"],
                name=span.name,
                trace_id=span.trace_id.hex(),
                span_id=span.span_id.hex(),
                parent=span.parent_span_id.hex(),
                attributes=_attributes(span.attributes),
                events={event.name: _attributes(event.attributes) for event in span.events},
                is_error=span.status.code == 2,
                start_ns=span.start_time_unix_nano,
                end_ns=span.end_time_unix_nano,
            )
            for group in request.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += spans
            self._bodies.append(body)

    def spans(self, correlation_id: str | None = None) -> list[SpanSeen]:
        """Give all spans, or those of the traces in which a job has this correlation id."""
        with self._lock:
            spans = list(self._spans)
        if correlation_id is None:
            return spans
        traces = {s.trace_id for s in spans if s.attributes.get("rbee.correlation_id") == correlation_id}
        return [span for span in spans if span.trace_id in traces]

    def everything(self) -> bytes:
        """Give all that came, as it came: what is not in it was not sent."""
        with self._lock:
            return b"".join(self._bodies)


@contextmanager
def collector(port: int = 0) -> Iterator[Collector]:
    """Run a collector on a port of this machine; 0 takes a free one."""
    taken = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                taken.take(body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is said of a request."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    taken.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _attributes(found: Sequence[Any]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in found}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return None if kind is None else getattr(value, kind)


def tree(spans: Sequence[SpanSeen]) -> list[str]:
    """Draw spans as a tree, one line each: `service: name`, two blanks deeper than its parent's."""
    known = {span.span_id for span in spans}

    def below(parent: str | None, depth: int) -> Iterator[str]:
        children = [s for s in spans if (s.parent == parent if parent else s.parent not in known)]
        for span in sorted(children, key=lambda s: s.start_ns):
            yield f"{'  ' * depth}{span.service}: {span.name}"
            yield from below(span.span_id, depth + 1)

    return list(below(None, 0))
