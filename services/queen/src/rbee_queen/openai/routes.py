"""The front door's routes: decode, submit a job, answer with what it says."""

from collections.abc import Callable
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_contracts.errors import NotFound
from rbee_contracts.nodes import HiveInfo
from rbee_job_server import JobServer, Submission
from rbee_job_server.correlation import correlation_id_of
from rbee_job_server.errors import json_response
from rbee_job_server.routes import time_left_s
from rbee_job_server.tracing import trace_of
from rbee_queen.openai.aliases import Aliases
from rbee_queen.openai.answer import Answer
from rbee_queen.openai.endpoints import ENDPOINTS, MODELS, PREFIXES, Dialect
from rbee_queen.openai.models import list_models, not_found
from rbee_queen.openai.request import operation_of
from rbee_queen.openai.responses import JobResponse


def openai_routes(
    server: JobServer, hives: Callable[[], list[HiveInfo]], aliases: Aliases, *, max_body_bytes: int
) -> list[Route]:
    """Give the front door's routes, under each of its prefixes."""
    door = _FrontDoor(server, hives, aliases, max_body_bytes)
    routes = []
    for prefix in PREFIXES:
        routes += [
            Route(prefix + endpoint, door.endpoint(endpoint, dialect), methods=["POST"])
            for endpoint, dialect in ENDPOINTS.items()
        ]
        routes += [
            Route(prefix + MODELS, door.models, methods=["GET"]),
            Route(prefix + MODELS + "/{model_id:path}", door.model, methods=["GET"]),
        ]
    return routes


class _FrontDoor:
    def __init__(
        self,
        server: JobServer,
        hives: Callable[[], list[HiveInfo]],
        aliases: Aliases,
        max_body_bytes: int,
    ) -> None:
        self._server = server
        self._hives = hives
        self._aliases = aliases
        self._max_body_bytes = max_body_bytes

    def endpoint(self, path: str, dialect: Dialect) -> "Callable[[Request], object]":
        """Make the handler of one endpoint."""

        async def handle(request: Request) -> JobResponse:
            content_type = request.headers.get("Content-Type", "")
            correlation_id = correlation_id_of(request)
            operation = operation_of(path, content_type, await request.body(), self._max_body_bytes)
            job = self._server.submit(
                Submission(
                    operation=operation,
                    correlation_id=correlation_id,
                    time_left_s=time_left_s(request),
                    trace=trace_of(request),
                )
            )
            return JobResponse(self._server, job, Answer(dialect, correlation_id))

        return handle

    async def models(self, _: Request) -> Response:
        return json_response(list_models(self._hives(), self._aliases))

    async def model(self, request: Request) -> Response:
        model_id = unquote(request.path_params["model_id"])
        models = list_models(self._hives(), self._aliases)
        found = next((model for model in models.data if model.id == model_id), None)
        if found is None:
            raise NotFound(not_found(model_id, models), code="model_not_found", title="Model not found")
        return json_response(found)
