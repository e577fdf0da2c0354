"""`GET /metrics` of a service: one registry of its own, put together where the app is."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from rbee_job_server.metrics.jobs import CURRENT
from rbee_job_server.metrics.relay import firehose_families
from rbee_job_server.metrics.spec import Metric

if TYPE_CHECKING:
    from rbee_job_server.server import JobServer

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

BUILD_INFO = Metric(
    name="rbee_build_info",
    kind="gauge",
    help="1, with the version of rbee that runs here.",
    labels=("version",),
)

SERVICE_METRICS = (BUILD_INFO,)

INFERENCES = frozenset({"infer", "openai"})
"""Operations whose jobs are told also when there are none."""


class _Only(Collector):
    """One family, for what writes those of a collector."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def collect(self) -> list[Family]:
        return [self._family]


class _BuildCollector(Collector):
    def __init__(self, version: str) -> None:
        self._version = version

    def collect(self) -> Iterator[Family]:
        yield BUILD_INFO.told([((self._version,), 1)])


class _JobCollector(Collector):
    """The jobs of a service as they are now, and what was counted of them."""

    def __init__(self, server: "JobServer") -> None:
        self._server = server

    def collect(self) -> Iterator[Family]:
        server = self._server
        server.registry.sweep(server.clock.monotonic())
        yield from server.metrics.collect()
        now = Counter((job.operation.name, job.state) for job in server.registry.unfinished())
        yield CURRENT.told(
            ((operation, state), now[operation, state])
            for operation in sorted({operation for operation, _ in now} | INFERENCES)
            for state in ("pending", "running")
        )
        yield from firehose_families(server.firehose)


def build_registry(server: "JobServer", version: str, collectors: Iterable[Collector]) -> CollectorRegistry:
    """Put together what a service tells at a scrape.

    The collectors of state read it as it stands, on the event loop: each state has its one owner.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series, and Prometheus does not read them from this format
    registry = CollectorRegistry()
    for collector in (_BuildCollector(version), _JobCollector(server), *collectors):
        registry.register(collector)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def metrics_route(registry: CollectorRegistry) -> Callable[[Request], Awaitable[Response]]:
    """Give the handler of `GET /metrics`."""

    async def metrics(_: Request) -> Response:
        parts = []
        for family in registry.collect():
            parts.append(generate_latest(_Only(family)))
            await asyncio.sleep(0)  # a fleet has thousands of series, and tokens do not wait for all of them
        return metrics_response(b"".join(parts))

    return metrics


def metrics_response(text: bytes) -> Response:
    """Answer with metrics in Prometheus' text format."""
    return Response(text, headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})
