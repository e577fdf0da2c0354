"""The queen's routes: the job contract, hives' announcements, the cluster's heartbeats."""

from collections.abc import Sequence

import msgspec
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_contracts.errors import InvalidRequest
from rbee_contracts.nodes import HiveReady
from rbee_job_server import EventStreamResponse, JobServer, build_app
from rbee_job_server.beats import Beats
from rbee_job_server.errors import json_response
from rbee_queen import VERSION
from rbee_queen.config import QueenConfig
from rbee_queen.fleet import Fleet
from rbee_queen.metrics.targets import targets
from rbee_queen.openai import ErrorShapes, openai_routes
from rbee_queen.openapi import docs_routes

_ready_decoder = msgspec.json.Decoder(HiveReady)


def build_queen_app(
    config: QueenConfig,
    server: JobServer,
    fleet: Fleet,
    beats: Beats,
    collectors: Sequence[Collector] = (),
) -> Starlette:
    async def hive_ready(request: Request) -> Response:
        try:
            ready = _ready_decoder.decode(await request.body())
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise InvalidRequest(f"The body is no announcement of a hive: {exc}") from exc
        peer = request.client.host if request.client else "127.0.0.1"
        await fleet.announce(ready, peer)
        return json_response({"status": "ok"})

    async def heartbeats(_: Request) -> EventStreamResponse:
        return EventStreamResponse(beats.reader(), on_close=lambda: None)

    async def metrics_targets(request: Request) -> Response:
        asked = request.headers.get("Host") or f"{config.host}:{config.port}"
        return json_response(targets(asked, fleet.infos()))

    app = build_app(
        server,
        name="queen",
        service_id="queen",
        version=VERSION,
        routes=[
            Route("/v1/hive/ready", hive_ready, methods=["POST"]),
            Route("/v1/heartbeats/stream", heartbeats),
            Route("/v1/metrics/targets", metrics_targets),
            *docs_routes(VERSION),
            *openai_routes(server, fleet.infos, config.aliases, max_body_bytes=config.limits.max_body_bytes),
        ],
        access=config.access,
        limits=config.limits,
        collectors=collectors,
    )
    app.add_middleware(ErrorShapes)
    return app
