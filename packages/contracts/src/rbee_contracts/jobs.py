"""Answers of the job routes."""

from typing import Any, Literal, TypeAlias

from msgspec import Struct

from rbee_contracts.events import Usage
from rbee_contracts.ids import JobId

JobState: TypeAlias = Literal["pending", "running", "completed", "failed", "cancelled"]

DONE = "[DONE]"


class JobAccepted(Struct, frozen=True, kw_only=True):
    """Answer of `POST /v1/jobs`. Read `sse_url` or the job never starts (unless `Prefer: respond-async`)."""

    job_id: JobId
    sse_url: str


class JobError(Struct, frozen=True, kw_only=True):
    code: str
    message: str
    retryable: bool


class JobRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Answer of `GET /v1/jobs/{id}`. Times are RFC 3339 in UTC.

    `position` is the id of the newest event of its stream, while that is kept. A job that the hop above
    has sent names its step as `idempotency_key`, and its operation's SHA-256 in hexadecimal as `digest`:
    what a hop that lost its memory needs to know its jobs again, with the `traceparent` it had sent. `result`
    is of a completed job; a service that has to keep too much drops those of the oldest.
    """

    job_id: JobId
    operation: str
    state: JobState
    correlation_id: str
    created_at: str
    started_at: str | None = None
    finished_at: str | None = None
    model: str | None = None
    error: JobError | None = None
    usage: Usage | None = None
    result: Any = None
    children: list[str] = []
    position: str | None = None
    idempotency_key: str | None = None
    digest: str | None = None
    time_left_s: float | None = None
    traceparent: str | None = None


class JobPage(Struct, frozen=True, kw_only=True):
    """Answer of `GET /v1/jobs`, newest first. `next_cursor` is null on the last page."""

    jobs: list[JobRecord]
    next_cursor: str | None


class JobCancelled(Struct, frozen=True, kw_only=True):
    """Answer of `DELETE /v1/jobs/{id}`."""

    job_id: JobId
    status: Literal["cancelled"] = "cancelled"


class JobTicket(Struct, frozen=True, kw_only=True):
    """Answer of `POST /v1/jobs/{id}/ticket`: open `url` within `expires_in` seconds, without a token."""

    url: str
    expires_in: int
