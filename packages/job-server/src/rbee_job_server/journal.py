"""The seam to what lasts: what a job server writes down so that it can go on after a crash.

Records become durable in the order in which they are made. What a reader must never see before it is
durable (narration, the first output, the end) waits for that in `Job`; everything else does not wait.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from rbee_contracts.errors import RbeeError
from rbee_contracts.events import Usage
from rbee_contracts.jobs import JobError, JobPage, JobRecord, JobState
from rbee_contracts.operations import Operation
from rbee_contracts.sse import Position
from rbee_contracts.trace import TraceContext

if TYPE_CHECKING:
    from rbee_job_server.jobs import Job, JobPolicy


class JobLost(RbeeError):
    """The job had begun to speak and cannot be continued; it is never run again."""

    title = "Job lost"
    default_code = "job_lost"


class Step(Struct, frozen=True, kw_only=True):
    """One step of a job at a service below. `where` names that service (a hive's id)."""

    step: str
    attempt: int
    where: str
    lower_job_id: str


class Said(Struct, frozen=True, kw_only=True):
    """One stored narration event: its place, its JSON, and its place in the stream below, if from there."""

    position: Position
    body: bytes
    lower_n: int | None


class RestoredJob(Struct, frozen=True, kw_only=True):
    """A job as the journal knows it after a restart. Output is not in it: it is read below again.

    Args:
        had_ended: it had ended below when it was found, and is only read again: not counted and not traced.
    """

    job_id: str
    seq: int
    operation: Operation
    digest: bytes
    correlation_id: str
    idempotency_key: str | None
    policy: "JobPolicy"
    state: JobState
    created_at: str
    started_at: str | None
    finished_at: str | None
    age_s: float
    has_spoken: bool
    error: JobError | None
    usage: Usage | None
    result: object
    said: list[Said]
    steps: list[Step]
    trace: TraceContext | None = None
    had_ended: bool = False


class Journal(Protocol):
    """Keeps records of jobs. Nothing here blocks; `then` and `flushed` tell when records are durable."""

    def accepted(self, job: "Job") -> None: ...

    def started(self, job: "Job") -> None: ...

    def narrated(self, job: "Job", position: Position, body: bytes, lower_n: int | None) -> None: ...

    def stepped(self, job: "Job", step: Step) -> None: ...

    def speaks(self, job: "Job") -> None:
        """The job's first output is about to be passed on."""

    def ended(self, job: "Job", position: Position, body: bytes) -> None: ...

    def then(self, callback: Callable[[], None], *, urgent: bool = True) -> None:
        """Call back, on the loop, once everything recorded so far is durable. Callbacks keep their order.

        What is not `urgent` may wait some milliseconds for more to become durable with it.
        """

    async def flushed(self) -> None:
        """Wait until everything recorded so far is durable."""

    async def find(self, job_id: str) -> JobRecord | None:
        """Give the record of a job that is no longer in memory."""

    async def page(
        self, *, state: JobState | None, operation: str | None, limit: int, before_seq: int | None
    ) -> JobPage:
        """List records, newest first."""
