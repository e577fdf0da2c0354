"""One job: its state, its log, its readers. Exactly one terminal event ends it, whoever comes first."""

import asyncio
import enum
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import anyio
import msgspec
from msgspec import Struct

from rbee_contracts.errors import RbeeError
from rbee_contracts.events import (
    AnyEvent,
    Chunk,
    Error,
    Execute,
    ExecuteCancelled,
    ExecuteComplete,
    ExecuteError,
    ExecuteTimeout,
    InferComplete,
    Narration,
    TerminalEvent,
    Token,
    TokenData,
    Usage,
    event_type,
)
from rbee_contracts.jobs import JobError, JobRecord, JobState
from rbee_contracts.operations import Operation
from rbee_contracts.sse import Position
from rbee_job_server.clock import Clock
from rbee_job_server.event_log import EventLog, LogReader

Publish: TypeAlias = Callable[[AnyEvent, bytes, Position], None]


class CancelReason(enum.StrEnum):
    """Why a job was cancelled: the `code` of its terminal event."""

    REQUESTED = "cancelled"
    NOT_READ = "not_read"
    ABANDONED = "abandoned"


_CANCEL_MESSAGES = {
    CancelReason.REQUESTED: "Cancelled on request.",
    CancelReason.NOT_READ: "Cancelled: nobody read the job's stream in time, so it never started.",
    CancelReason.ABANDONED: "Cancelled: the last reader left and did not come back in time.",
}


class JobPolicy(Struct, frozen=True, kw_only=True):
    """What happens to a job when readers come and go. Times in seconds.

    `resume_window_s` is None for jobs that never stop because readers leave.
    """

    starts_at_once: bool
    resume_window_s: float | None
    timeout_s: float | None


class Job:
    """State machine pending → running → completed | failed | cancelled, and the job's only writer.

    Every way to end it goes through `_end`, which lets only the first one win.
    """

    def __init__(
        self,
        *,
        job_id: str,
        seq: int,
        operation: Operation,
        correlation_id: str,
        idempotency_key: str | None,
        policy: JobPolicy,
        unknown_fields: Mapping[str, str | None],
        actor: str,
        clock: Clock,
        publish: Publish,
    ) -> None:
        self.id = job_id
        self.seq = seq
        self.operation = operation
        self.correlation_id = correlation_id
        self.idempotency_key = idempotency_key
        self.policy = policy
        self._unknown_fields = unknown_fields
        self.actor = actor
        self.state: JobState = "pending"
        self.log: EventLog | None = EventLog()
        self.readers = 0
        self.children: list[str] = []
        self.error: JobError | None = None
        self.usage: Usage | None = None
        self.result: Any = None
        self.created_at = clock.timestamp()
        self.created = clock.monotonic()
        self.started_at: str | None = None
        self.started: float | None = None
        self.finished_at: str | None = None
        self.finished: float | None = None
        self.scope: anyio.CancelScope | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.deadline_timer: asyncio.TimerHandle | None = None
        self._clock = clock
        self._publish = publish

    @property
    def is_finished(self) -> bool:
        return self.finished is not None

    @property
    def deadline(self) -> float | None:
        """Monotonic time at which the job times out; None while it has no limit or has not started."""
        if self.policy.timeout_s is None or self.started is None:
            return None
        return self.started + self.policy.timeout_s

    # --- saying things ---------------------------------------------------------------------------------

    def append(self, event: AnyEvent) -> None:
        """Add an event of this job; ignored once the job has ended."""
        log = self.log
        if log is None or log.closed:
            return
        body = log.append(event)
        if isinstance(event, InferComplete):
            self.usage = event.data.usage
        self._publish(event, body, log.position)

    def narrate(self, action: str, message: str, data: dict[str, Any] | Struct | None = None) -> None:
        """Narrate; `data` must fit the action's struct where the contracts have one.

        Raises:
            msgspec.ValidationError: it does not fit.
            ValueError: the action is output or ends a job.
        """
        fields: dict[str, Any] = self._common(message) | {"formatted": self._formatted(message)}
        kind = event_type(action)
        if kind is not None and kind.kind != "narration":
            raise ValueError(f"{action} cannot be narrated")
        if data:
            fields["data"] = data
        if kind is None:
            self.append(Narration(action=action, **fields))
        else:
            known: Any = msgspec.convert(fields | {"action": action}, kind, from_attributes=True)
            self.append(known)

    def emit_token(self, text: str, data: TokenData | None = None) -> None:
        """Add one item of output."""
        if self.log is None:
            return
        self.append(
            Token(
                message=text,
                actor=self.actor,
                job_id=self.id,
                correlation_id=self.correlation_id,
                timestamp=self._clock.timestamp(),
                index=self.log.outputs,
                data=data,
            )
        )

    def relay(self, event: AnyEvent) -> None:
        """Add an event of a lower hop's job as this job's own; its actor stays."""
        log = self.log
        if log is None:
            return
        if isinstance(event, Token | Chunk):
            changed: Any = msgspec.structs.replace(event, job_id=self.id, event_id=None, index=log.outputs)
        else:
            changed = msgspec.structs.replace(event, job_id=self.id, event_id=None)
        self.append(changed)

    # --- life ------------------------------------------------------------------------------------------

    def start(self) -> bool:
        """Go from pending to running; False when it is past that."""
        if self.state != "pending":
            return False
        self.state = "running"
        self.started = self._clock.monotonic()
        self.started_at = self._clock.timestamp()
        message = f"Executing {self.operation.name}."
        self.append(Execute(formatted=self._formatted(message), **self._common(message)))
        for name, meant in self._unknown_fields.items():
            hint = f" Did you mean {meant}?" if meant else ""
            self.narrate(
                "warning", f"{self.operation.name} has no field {name[:100]!r}; it was ignored.{hint}"
            )
        return True

    def complete(self, result: Any) -> bool:
        if self.is_finished:
            return False
        message = f"{self.operation.name} completed."
        ended = self._end(
            "completed",
            ExecuteComplete(data=result, formatted=self._formatted(message), **self._common(message)),
        )
        self.result = result
        return ended

    def fail(self, error: RbeeError) -> bool:
        """End as failed: an `error` event, then the terminal one."""
        if self.is_finished:
            return False
        self.error = JobError(code=error.code, message=error.details, retryable=error.retryable)
        actor = error.actor or self.actor
        self.append(
            Error(
                code=error.code,
                retryable=error.retryable,
                formatted=f"[{actor}] {error.details}",
                **self._common(error.details) | {"actor": actor},
            )
        )
        message = f"{self.operation.name} failed ({error.code})."
        return self._end(
            "failed",
            ExecuteError(code=error.code, formatted=self._formatted(message), **self._common(message)),
        )

    def time_out(self) -> bool:
        message = f"{self.operation.name} ran out of its {self.policy.timeout_s:g} s."
        if self.is_finished:
            return False
        self.error = JobError(code="timeout", message=message, retryable=True)
        ended = self._end(
            "failed",
            ExecuteTimeout(code="timeout", formatted=self._formatted(message), **self._common(message)),
        )
        self._stop_handler()
        return ended

    def abort(self, error: RbeeError) -> bool:
        """End as failed from outside its handler, which is told to stop."""
        ended = self.fail(error)
        self._stop_handler()
        return ended

    def cancel(self, reason: CancelReason) -> bool:
        """End as cancelled, at once; what runs for it is told to stop and cleans up after that."""
        message = _CANCEL_MESSAGES[reason]
        event = ExecuteCancelled(
            code=reason.value, formatted=self._formatted(message), **self._common(message)
        )
        ended = self._end("cancelled", event)
        self._stop_handler()
        return ended

    def _end(self, state: JobState, event: TerminalEvent) -> bool:
        if self.is_finished:
            return False
        self.append(event)  # may raise, for a result that cannot be encoded: then the job has not ended
        self.state = state
        self.finished = self._clock.monotonic()
        self.finished_at = self._clock.timestamp()
        self.disarm()
        if self.deadline_timer is not None:
            self.deadline_timer.cancel()
        return True

    def _stop_handler(self) -> None:
        if self.scope is not None:
            self.scope.cancel()

    def disarm(self) -> None:
        """Forget the timer that waits for a reader."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    # --- reading ---------------------------------------------------------------------------------------

    def reader(self, position: Position) -> LogReader:
        if self.log is None:
            raise RuntimeError(f"the log of {self.id} is no longer kept")
        return self.log.reader(position)

    def record(self) -> JobRecord:
        return JobRecord(
            job_id=self.id,
            operation=self.operation.name,
            state=self.state,
            correlation_id=self.correlation_id,
            created_at=self.created_at,
            started_at=self.started_at,
            finished_at=self.finished_at,
            model=getattr(self.operation, "model", None),
            error=self.error,
            usage=self.usage,
            result=self.result,
            children=list(self.children),
        )

    def _common(self, message: str) -> dict[str, Any]:
        return {
            "message": message,
            "actor": self.actor,
            "job_id": self.id,
            "correlation_id": self.correlation_id,
            "timestamp": self._clock.timestamp(),
        }

    def _formatted(self, message: str) -> str:
        return f"[{self.actor}] {message}"
