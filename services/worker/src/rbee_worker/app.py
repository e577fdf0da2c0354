"""The worker's routes: the job contract, its status, and the engine's own OpenAI app behind them."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from rbee_contracts.errors import Unavailable
from rbee_job_server import JobServer, build_app
from rbee_job_server.errors import json_response
from rbee_worker import VERSION
from rbee_worker.config import WorkerConfig
from rbee_worker.engine.base import Engine
from rbee_worker.metrics import EngineCollector
from rbee_worker.state import WorkerState


def build_worker_app(
    config: WorkerConfig, server: JobServer, state: WorkerState, engine: Engine
) -> Starlette:
    async def worker(_: Request) -> Response:
        state.heard()
        return json_response(state.status())

    async def probe(_: Request) -> Response:
        """One token from the engine; an error answer where it gives none."""
        await state.probe()
        return json_response(state.status())

    async def sleep(_: Request) -> Response:
        await state.sleep()
        return json_response(state.status())

    async def wake(_: Request) -> Response:
        await state.wake()
        return json_response(state.status())

    async def engine_app(scope: Scope, receive: Receive, send: Send) -> None:
        """Everything that is no route of ours: vLLM's /metrics, /v1/chat/completions and so on."""
        if engine.http_app is None:
            raise Unavailable("The engine's own routes answer once it has loaded.", code="worker_not_ready")
        await engine.http_app(scope, receive, send)

    return build_app(
        server,
        name="worker",
        service_id=config.worker_id,
        version=VERSION,
        routes=[
            Route("/v1/worker", worker),
            Route("/v1/worker/probe", probe, methods=["POST"]),
            Route("/v1/worker/sleep", sleep, methods=["POST"]),
            Route("/v1/worker/wake", wake, methods=["POST"]),
            Mount("/", app=engine_app),
        ],
        not_ready=state.not_ready,
        access=config.access,
        limits=config.limits,
        collectors=[EngineCollector(engine)],
    )
