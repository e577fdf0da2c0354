"""HTTP requests in numbers: by route, method and status, as the answer begins."""

import time
from collections.abc import Iterator

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rbee_job_server.metrics.spec import OTHER, ByLabels, Metric

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Methods that are told by name."""

UNMATCHED = "unmatched"
"""The route of a request that came to none: unknown, or refused before."""

CLIENT_GONE = 499
"""The status of a request whose client left before there was an answer, as nginx has it."""

REQUESTS = Metric(
    name="rbee_http_requests_total",
    kind="counter",
    help="HTTP requests by the template of their route, counted as their answer begins. `unmatched` is a "
    "path that no route has, or a request that was refused before it came to one; status 499 a client "
    "that left first.",
    labels=("route", "method", "status"),
)
ANSWER_BEGINS = Metric(
    name="rbee_http_response_start_seconds",
    kind="histogram",
    help="From a request's head until the head of its answer; what follows in a stream is not counted.",
    labels=("route",),
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
UNDER_WAY = Metric(
    name="rbee_http_requests_in_progress",
    kind="gauge",
    help="HTTP requests whose answer has not ended; open streams are most of them.",
)

REQUEST_METRICS = (REQUESTS, ANSWER_BEGINS, UNDER_WAY)


class RequestMetrics(Collector):
    """What `CountRequests` has counted."""

    def __init__(self) -> None:
        self._requests = ByLabels(REQUESTS.counter())
        self._answer_begins = ByLabels(ANSWER_BEGINS.histogram())
        self.under_way = 0

    def answered(self, scope: Scope, status: int, took_s: float) -> None:
        """The answer to a request begins."""
        route = str(getattr(scope.get("route"), "path", UNMATCHED)) or "/"  # what is mounted there
        method = scope["method"] if scope["method"] in METHODS else OTHER
        self._requests[route, method, str(status)].inc()
        self._answer_begins[route,].observe(took_s)

    def collect(self) -> Iterator[Family]:
        yield from self._requests.metric.collect()
        yield from self._answer_begins.metric.collect()
        yield UNDER_WAY.is_value(self.under_way)


class CountRequests:
    """Counts every request, whatever answers it."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, begun, has_begun = self._metrics, time.perf_counter(), False

        async def send_counted(message: Message) -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                metrics.answered(scope, message["status"], time.perf_counter() - begun)
            await send(message)

        metrics.under_way += 1
        status = CLIENT_GONE
        try:
            await self._app(scope, receive, send_counted)
        except Exception:
            status = 500  # Starlette's outermost middleware makes it of this
            raise
        finally:
            metrics.under_way -= 1
            if not has_begun:
                metrics.answered(scope, status, time.perf_counter() - begun)
