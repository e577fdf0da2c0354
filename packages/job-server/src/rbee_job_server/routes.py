"""The job routes: decode, call the job server, encode. The same in every service."""

from typing import Any, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_contracts.errors import Conflict, InvalidRequest
from rbee_contracts.ids import is_idempotency_key, is_step_key
from rbee_contracts.jobs import JobAccepted, JobCancelled, JobState, JobTicket
from rbee_contracts.operations import decode_operation, unknown_fields
from rbee_contracts.sse import START, parse_event_id, parse_firehose_id
from rbee_job_server.access import TICKET_S, Tickets
from rbee_job_server.correlation import correlation_id_of
from rbee_job_server.errors import NotJson, json_response
from rbee_job_server.jobs import CancelReason
from rbee_job_server.registry import MAX_PAGE
from rbee_job_server.server import JobServer, Submission
from rbee_job_server.streams import STREAM_HEADERS, EventStreamResponse
from rbee_job_server.tracing import trace_of

RETRY_FRAME = b"retry: 500\n\n"
DEFAULT_PAGE = 50


def job_routes(server: JobServer, tickets: Tickets) -> list[Route]:
    """Give the routes of one job server."""
    handlers = _JobRoutes(server, tickets)
    return [
        Route("/v1/jobs", handlers.submit, methods=["POST"]),
        Route("/v1/jobs", handlers.list_jobs, methods=["GET"]),
        Route("/v1/jobs/{job_id}", handlers.get, methods=["GET"]),
        Route("/v1/jobs/{job_id}", handlers.cancel, methods=["DELETE"]),
        Route("/v1/jobs/{job_id}/stream", handlers.stream, methods=["GET"]),
        Route("/v1/jobs/{job_id}/ticket", handlers.ticket, methods=["POST"]),
        Route("/v1/events", handlers.events, methods=["GET"]),
    ]


class _JobRoutes:
    def __init__(self, server: JobServer, tickets: Tickets) -> None:
        self._server = server
        self._tickets = tickets

    async def submit(self, request: Request) -> Response:
        _require_json(request.headers.get("Content-Type", ""))
        body = await request.body()
        operation = decode_operation(body)
        key = request.headers.get("Idempotency-Key")
        if key is not None and not is_idempotency_key(key):
            raise InvalidRequest(
                "Idempotency-Key must be 1 to 128 characters of A-Z a-z 0-9 . _ : / -",
                code="invalid_idempotency_key",
            )
        respond_async = _prefers_async(request)
        from_hop = key is not None and is_step_key(key)
        job = self._server.submit(
            Submission(
                operation=operation,
                correlation_id=correlation_id_of(request),
                respond_async=respond_async,
                idempotency_key=key,
                time_left_s=time_left_s(request),
                unknown_fields={} if from_hop else unknown_fields(body, operation),
                trace=trace_of(request),
            )
        )
        await self._server.durable()
        accepted = JobAccepted(job_id=job.id, sse_url=f"/v1/jobs/{job.id}/stream")
        if respond_async:
            return json_response(accepted, 202, {"Preference-Applied": "respond-async"})
        return json_response(accepted)

    async def list_jobs(self, request: Request) -> Response:
        query = request.query_params
        state = query.get("state")
        if state is not None and state not in get_args(JobState):
            raise InvalidRequest(f"state {state[:40]!r} is none of {', '.join(get_args(JobState))}.")
        page = await self._server.page(
            state=msgspec.convert(state, JobState) if state else None,
            operation=query.get("operation"),
            limit=_limit(query.get("limit")),
            cursor=query.get("cursor"),
        )
        return json_response(page)

    async def get(self, request: Request) -> Response:
        return json_response(await self._server.find(request.path_params["job_id"]))

    async def cancel(self, request: Request) -> Response:
        job = self._server.registry.get(request.path_params["job_id"])
        if not job.cancel(CancelReason.REQUESTED) and job.state != "cancelled":
            raise Conflict(
                f"{job.id} has already {job.state}; only a job that has not ended can be cancelled.",
                code="job_finished",
            )
        await self._server.durable()
        return json_response(JobCancelled(job_id=job.id))

    async def stream(self, request: Request) -> Any:
        position = START
        last_event_id = request.headers.get("Last-Event-ID", "")
        if last_event_id:
            try:
                position = parse_event_id(last_event_id)
            except ValueError as exc:
                raise InvalidRequest(f"Last-Event-ID: {exc}", code="invalid_last_event_id") from exc
        job = await self._server.readable(request.path_params["job_id"])
        if job.log is not None and last_event_id and job.log.is_seen(position):
            return Response(status_code=204)
        if request.method == "HEAD":
            return _head()
        reader = self._server.attach(job, position)
        return EventStreamResponse(
            reader, head=RETRY_FRAME, on_close=lambda: self._server.detach(job), job_id=job.id
        )

    async def ticket(self, request: Request) -> Response:
        job_id = request.path_params["job_id"]
        await self._server.find(job_id)
        url = f"/v1/jobs/{job_id}/stream?ticket={self._tickets.issue(job_id)}"
        return json_response(JobTicket(url=url, expires_in=TICKET_S))

    async def events(self, request: Request) -> Any:
        after = None
        last_event_id = request.headers.get("Last-Event-ID", "")
        if last_event_id:
            try:
                after = parse_firehose_id(last_event_id)
            except ValueError as exc:
                raise InvalidRequest(f"Last-Event-ID: {exc}", code="invalid_last_event_id") from exc
        if request.method == "HEAD":
            return _head()
        follower = self._server.firehose.follow(after, output=request.query_params.get("output") == "1")
        return EventStreamResponse(follower, on_close=follower.close)


def _head() -> Response:
    """What a stream would begin with: who asks for that alone starts no job, and is no reader."""
    response = Response()
    response.raw_headers = list(STREAM_HEADERS)
    return response


def _require_json(content_type: str) -> None:
    """Refuse what is not JSON by its own account; without one it is taken for JSON.

    So is what `curl -d` says of everything that it sends.

    Raises:
        NotJson: say so.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    is_json = media_type in ("application/json", "application/x-www-form-urlencoded") or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
    if media_type and not is_json:
        raise NotJson(f"An operation is sent as application/json, not as {media_type[:80]!r}.")


def _prefers_async(request: Request) -> bool:
    preferences = ",".join(request.headers.getlist("Prefer")).split(",")
    return any(p.split(";")[0].strip().lower() == "respond-async" for p in preferences)


def time_left_s(request: Request) -> float | None:
    """Give the seconds that the caller has left for its request; None where it does not say.

    Raises:
        InvalidRequest: it does not say it in milliseconds.
    """
    given = request.headers.get("X-Deadline-Ms")
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= 12):
        raise InvalidRequest("X-Deadline-Ms must be the milliseconds left, a whole number.")
    return int(given) / 1000


def _limit(given: str | None) -> int:
    if given is None:
        return DEFAULT_PAGE
    if not (given.isascii() and given.isdigit() and 1 <= int(given[:9]) <= MAX_PAGE and len(given) <= 9):
        raise InvalidRequest(f"limit must be a whole number from 1 to {MAX_PAGE}.")
    return int(given)
