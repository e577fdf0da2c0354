"""What a handler knows of the job it runs for, and `narrate`, which needs no ids from its caller."""

from contextvars import ContextVar
from typing import Any

from msgspec import Raw, Struct

from rbee_contracts.events import TokenData
from rbee_job_server.clock import Clock
from rbee_job_server.jobs import Job

_current: ContextVar["JobContext"] = ContextVar("rbee_job")


class JobContext:
    """Handed to every handler; also found by `narrate` in whatever the handler calls."""

    __slots__ = ("_clock", "_job")

    def __init__(self, job: Job, clock: Clock) -> None:
        self._job = job
        self._clock = clock

    @property
    def job(self) -> Job:
        return self._job

    @property
    def job_id(self) -> str:
        return self._job.id

    @property
    def correlation_id(self) -> str:
        return self._job.correlation_id

    @property
    def actor(self) -> str:
        return self._job.actor

    @property
    def time_left_s(self) -> float | None:
        """Seconds until the job times out; None without a limit; never below 0."""
        deadline = self._job.deadline
        return None if deadline is None else max(0.0, deadline - self._clock.monotonic())

    def narrate(self, action: str, message: str, data: Struct | None = None, **facts: Any) -> None:
        """Say what happens, as an event of this job. `data` or `facts` become the event's `data`."""
        self._job.narrate(action, message, data if data is not None else facts)

    def emit_token(self, text: str, data: TokenData | None = None) -> None:
        self._job.emit_token(text, data)

    def emit_chunk(self, data: Raw, event: str = "") -> None:
        self._job.emit_chunk(data, event)


def enter(context: JobContext) -> None:
    """Make `context` the current one for the running task and what it starts."""
    _current.set(context)


def current_job() -> JobContext:
    """Give the context of the running job.

    Raises:
        LookupError: called outside a job's handler.
    """
    return _current.get()


def narrate(action: str, message: str, data: Struct | None = None, **facts: Any) -> None:
    """Say what happens, as an event of the running job, e.g. `narrate("worker_spawn_start", "Spawning…")`.

    Raises:
        LookupError: called outside a job's handler.
        msgspec.ValidationError: the action has a struct in the contracts and the data do not fit it.
    """
    current_job().narrate(action, message, data, **facts)
