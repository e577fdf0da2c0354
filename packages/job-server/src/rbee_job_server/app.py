"""The Starlette app that every service has: job routes, health, info, errors, correlation, access, limits."""

import time
from collections.abc import Callable, Sequence
from typing import Literal

from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from rbee_contracts.nodes import ServiceInfo
from rbee_job_server.access import Access, AccessConfig, AccessMiddleware
from rbee_job_server.correlation import CorrelationMiddleware
from rbee_job_server.errors import EXCEPTION_HANDLERS, RETRY_AFTER_S, json_response
from rbee_job_server.guards import BodyLimit, Limits
from rbee_job_server.metrics import CountRequests, RequestMetrics, build_registry, metrics_route
from rbee_job_server.routes import job_routes
from rbee_job_server.server import JobServer


def build_app(
    server: JobServer,
    *,
    name: Literal["queen", "hive", "worker"],
    service_id: str,
    version: str,
    routes: Sequence[BaseRoute] = (),
    not_ready: Callable[[], str | None] = lambda: None,
    access: AccessConfig | None = None,
    limits: Limits | None = None,
    collectors: Sequence[Collector] = (),
) -> Starlette:
    """Build a service's app.

    Args:
        routes: the service's own, after the common ones.
        not_ready: why the service cannot take work now, or None.
        access: who may speak to it; by default whoever does so under a loopback name.
        collectors: what the service tells at `/metrics` besides its jobs and its requests.
    """
    gate = Access(access)
    max_body_bytes = (limits or Limits()).max_body_bytes
    started = time.monotonic()
    requests = RequestMetrics()
    registry = build_registry(server, version, [requests, *collectors])

    async def health(_: Request) -> Response:
        return json_response({"status": "ok"})

    async def ready(_: Request) -> Response:
        reason = "stopping" if server.stopping else not_ready()
        if reason is None:
            return json_response({"ready": True})
        return json_response({"ready": False, "reason": reason}, 503, {"Retry-After": str(RETRY_AFTER_S)})

    async def info(_: Request) -> Response:
        uptime_s = round(time.monotonic() - started, 3)
        return json_response(
            ServiceInfo(name=name, id=service_id, version=version, boot=server.boot, uptime_s=uptime_s)
        )

    app = Starlette(
        routes=[
            *job_routes(server, gate.tickets),  # first: a router tries one after the other
            Route("/health", health),
            Route("/ready", ready),
            Route("/v1/info", info),
            Route("/metrics", metrics_route(registry)),
            *routes,
        ],
        middleware=[
            Middleware(CountRequests, metrics=requests),
            Middleware(CorrelationMiddleware),
            Middleware(AccessMiddleware, access=gate),
            Middleware(BodyLimit, max_body_bytes=max_body_bytes),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.router.redirect_slashes = False  # a path with one more slash is another path: 404
    return app
