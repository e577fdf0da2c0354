"""The hive's routes: the job contract, its capabilities and its heartbeats."""

from collections.abc import Callable, Sequence

from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_contracts.nodes import Capabilities
from rbee_hive import VERSION
from rbee_hive.config import HiveConfig
from rbee_hive.metrics import worker_metrics_route
from rbee_hive.models import Models, model_routes
from rbee_hive.presence import Presence
from rbee_hive.supervisor.workers import Workers
from rbee_hive.telemetry import Telemetry
from rbee_job_server import EventStreamResponse, JobServer, build_app
from rbee_job_server.errors import json_response


def build_hive_app(
    config: HiveConfig,
    server: JobServer,
    presence: Presence,
    telemetry: Telemetry,
    models: Models,
    workers: Workers,
    not_ready: Callable[[], str | None] = lambda: None,
    collectors: Sequence[Collector] = (),
) -> Starlette:
    async def capabilities(_: Request) -> Response:
        return json_response(
            Capabilities(hive_id=config.hive_id, version=VERSION, devices=telemetry.devices())
        )

    async def heartbeats(request: Request) -> EventStreamResponse:
        """`?follower=queen` says that a queen follows, so that the hive stops announcing itself."""
        is_queen = request.query_params.get("follower") == "queen"
        presence.queens += is_queen

        def leave() -> None:
            presence.queens -= is_queen

        return EventStreamResponse(presence.beats.reader(), on_close=leave)

    return build_app(
        server,
        name="hive",
        service_id=config.hive_id,
        version=VERSION,
        routes=[
            Route("/v1/capabilities", capabilities),
            Route("/v1/heartbeats/stream", heartbeats),
            worker_metrics_route(workers),
            *(model_routes(models) if config.peers else ()),
        ],
        not_ready=not_ready,
        access=config.access,
        limits=config.limits,
        collectors=collectors,
    )
