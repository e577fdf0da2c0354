"""The queen's front door in this process, with a handler of the test's own instead of a fleet."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio.lowlevel
import msgspec
from rbee_inprocess import Running, running
from starlette.applications import Starlette

from rbee_contracts.events import OpenAIHead, OpenAIResult
from rbee_contracts.nodes import HiveInfo, ModelInfo, WorkerInfo, WorkerState
from rbee_contracts.operations import OpenAI
from rbee_job_server import JobContext, JobServer
from rbee_job_server.access import AccessConfig
from rbee_job_server.guards import Limits
from rbee_queen.openai import Aliases, ErrorShapes, OpenAIJobs, openai_routes

SSE = "text/event-stream; charset=utf-8"

Place = Callable[[OpenAI, JobContext], Awaitable[Any]]


def worker(model: str, state: WorkerState = "ready", worker_id: str = "w1", **fields: Any) -> WorkerInfo:
    told: dict[str, Any] = {
        "pid": 100, "port": 9300, "running": 0, "waiting": 0, "kv_cache_usage": 0.0, "worker": "cpu",
        "devices": [], "started_at": "2026-01-01T00:00:00+00:00", "max_model_len": 2048,
    }  # fmt: skip
    return WorkerInfo(worker_id=worker_id, model=model, state=state, **told | fields)


def hive(
    hive_id: str = "h1", *, workers: Sequence[WorkerInfo] = (), models: Sequence[ModelInfo] = ()
) -> HiveInfo:
    return HiveInfo(
        hive_id=hive_id, url="", state="online", version="", workers=list(workers), models=list(models)
    )


def lying(model: str, **fields: Any) -> ModelInfo:
    return ModelInfo(model=model, size=1, files=1, **fields)


ONE_WORKER = (hive(workers=[worker("m")]),)


async def echo(op: OpenAI, context: JobContext) -> OpenAIResult:
    """Answer with the body that came."""
    return answer_json(context, bytes(op.body))


def answer_json(context: JobContext, body: bytes, status: int = 200) -> OpenAIResult:
    head = OpenAIHead(status=status, content_type="application/json")
    context.narrate("openai_response", "Answers.", head)
    context.emit_chunk(msgspec.Raw(body))
    return OpenAIResult(status=status, content_type=head.content_type)


def begin_stream(context: JobContext) -> None:
    head = OpenAIHead(status=200, content_type=SSE, stream=True)
    context.narrate("openai_response", "Answers.", head)


def end_stream(*, done: bool = True) -> OpenAIResult:
    return OpenAIResult(status=200, content_type=SSE, done=done)


@asynccontextmanager
async def front_door(
    place: Place = echo,
    *,
    hives: Sequence[HiveInfo] = ONE_WORKER,
    aliases: Aliases | None = None,
    settled: Callable[[], Awaitable[None]] = anyio.lowlevel.checkpoint,
    access: AccessConfig | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[Running]:
    aliases = aliases or Aliases()
    jobs = OpenAIJobs(place, lambda: list(hives), aliases, settled)

    def extend(server: JobServer, app: Starlette) -> None:
        largest = (limits or Limits()).max_body_bytes
        app.router.routes += openai_routes(server, lambda: list(hives), aliases, max_body_bytes=largest)
        app.add_middleware(ErrorShapes)

    async with running(
        {OpenAI: jobs}, service="queen", actor="queen", access=access, limits=limits, extend=extend
    ) as service:
        yield service
