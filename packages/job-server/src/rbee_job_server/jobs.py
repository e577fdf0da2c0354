"""One job: its state, its log, its readers. Exactly one terminal event ends it, whoever comes first."""

import asyncio
import enum
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

import anyio
import msgspec
from msgspec import Struct

from rbee_contracts.errors import RbeeError
from rbee_contracts.events import (
    AnyEvent,
    Chunk,
    Error,
    Event,
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
    decode_event,
    encode_event,
    event_type,
)
from rbee_contracts.jobs import JobError, JobRecord, JobState
from rbee_contracts.operations import Operation, operation_digest
from rbee_contracts.sse import START, Position
from rbee_job_server.clock import Clock
from rbee_job_server.event_log import MAX_LOG_BYTES, EventLog, LogReader, OutputTooLarge
from rbee_job_server.journal import Journal, RestoredJob, Said, Step
from rbee_job_server.staging import Staging

E = TypeVar("E", bound=Event)

Publish: TypeAlias = Callable[[AnyEvent, bytes, Position], None]


class CancelReason(enum.StrEnum):
    """Why a job was cancelled: the `code` of its terminal event."""

    REQUESTED = "cancelled"
    NOT_READ = "not_read"
    ABANDONED = "abandoned"
    OWNER_GONE = "owner_gone"


_CANCEL_MESSAGES = {
    CancelReason.REQUESTED: "Cancelled on request.",
    CancelReason.NOT_READ: "Cancelled: nobody read the job's stream in time, so it never started.",
    CancelReason.ABANDONED: "Cancelled: the last reader left and did not come back in time.",
    CancelReason.OWNER_GONE: "Cancelled: the service that sent the job has not been heard of for too long.",
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
        journal: Journal | None = None,
        digest: bytes | None = None,
    ) -> None:
        self.id = job_id
        self.seq = seq
        self.operation = operation
        self.digest = digest or operation_digest(operation)
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
        self.steps: list[Step] = []
        self.has_spoken = False
        self.lower_n = 0
        """The place, in the stream below, of the last narration a restored job had relayed from there."""
        self.rebuilding = anyio.Lock()
        self.said: deque[Said] = deque()
        """Stored narration of a restored job that is not back in its log yet."""
        self._clock = clock
        self._publish = publish
        self._journal = journal
        self._staging = Staging(self, journal, self._release) if journal is not None else None
        self._said_before: list[AnyEvent] = []

    @classmethod
    def restored(
        cls, stored: RestoredJob, *, actor: str, clock: Clock, publish: Publish, journal: Journal
    ) -> "Job":
        """Make a job again from what the journal knows.

        What it said is in its log as far as no output belongs before it; the rest follows as the output is
        read below again. A finished job that has spoken has no log until `rebuild`.
        """
        job = cls(
            job_id=stored.job_id,
            seq=stored.seq,
            operation=stored.operation,
            correlation_id=stored.correlation_id,
            idempotency_key=stored.idempotency_key,
            policy=stored.policy,
            unknown_fields={},
            actor=actor,
            clock=clock,
            publish=publish,
            journal=journal,
            digest=stored.digest,
        )
        now = clock.monotonic()
        job.state = stored.state
        job.created_at = stored.created_at
        job.started_at = stored.started_at
        job.started = now - stored.age_s if stored.started_at is not None else None
        job.finished_at = stored.finished_at
        job.finished = now - stored.age_s if stored.finished_at is not None else None
        job.error, job.usage, job.result = stored.error, stored.usage, stored.result
        job.has_spoken = stored.has_spoken
        job.steps = list(stored.steps)
        job.children = [step.lower_job_id for step in stored.steps]
        job.lower_n = max((said.lower_n for said in stored.said if said.lower_n is not None), default=0)
        job.said = deque(stored.said)
        job._said_before = [decode_event(said.body) for said in stored.said if said.lower_n is None]
        last = stored.said[-1].position if stored.said else START
        job._staging = Staging(job, journal, job._release, last)
        if job.is_finished and job.has_spoken:
            job.log = None
        else:
            job._insert_said(math.inf if not job.has_spoken else 0)
        return job

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

    @property
    def outputs(self) -> int:
        """Output items said so far."""
        if self._staging is not None:
            return self._staging.outputs
        return self.log.outputs if self.log is not None else 0

    def append(self, event: AnyEvent, lower_n: int | None = None) -> None:
        """Add an event of this job; ignored once the job has ended."""
        log = self.log
        if log is None or log.closed:
            return
        body = encode_event(event)  # may raise: before anything is changed
        if event.kind != "terminal" and not isinstance(event, Error) and not log.has_room(body):
            self.abort(self._too_large())
            return
        if isinstance(event, InferComplete):
            self.usage = event.data.usage
        if self._staging is None:
            self.has_spoken = self.has_spoken or event.kind == "output"
            self._release(event, body)
        elif not self._staging.closed:
            self._staging.add(event, body, lower_n)

    def _release(self, event: AnyEvent, body: bytes) -> None:
        """Let readers see an event."""
        log = self.log
        if log is None:
            return
        if self.said:
            self._insert_said(log.outputs if event.kind == "output" else math.inf)
        log.append(event, body)
        self._publish(event, body, log.position)

    def _insert_said(self, outputs: float) -> None:
        """Put stored narration back into the log, where at most `outputs` output items came before it."""
        assert self.log is not None
        while self.said and self.said[0].position.outputs <= outputs:
            self.log.append(decode_event(self.said.popleft().body))

    @property
    def needs_rebuild(self) -> bool:
        return self.log is None and bool(self.said)

    def rebuild(self, output: Iterable[AnyEvent]) -> bool:
        """Make a finished, restored job's log again from its whole output; False when some is missing."""
        said, log = self.said, EventLog()
        self.said, self.log = deque(said), log
        for event in output:
            self._insert_said(log.outputs)
            log.append(_as_output_of(self, event, log.outputs))
        if log.outputs < said[-1].position.outputs:
            self.said, self.log = said, None
            return False
        self._insert_said(math.inf)
        return True

    def earlier(self, kind: type[E]) -> E | None:
        """Give what this job said of one kind before a restart; None when it did not."""
        return next((event for event in self._said_before if isinstance(event, kind)), None)

    def find_step(self, step: str, attempt: int) -> Step | None:
        return next((known for known in self.steps if (known.step, known.attempt) == (step, attempt)), None)

    async def take_step(self, step: Step) -> None:
        """Record a step, durably, before it is submitted."""
        self.steps.append(step)
        self.children.append(step.lower_job_id)
        if self._journal is not None:
            self._journal.stepped(self, step)
            await self._journal.flushed()

    def narrate(self, action: str, message: str, data: dict[str, Any] | Struct | None = None) -> None:
        """Narrate; `data` must fit the action's struct where the contracts have one.

        Raises:
            msgspec.ValidationError: it does not fit.
            ValueError: the action is output or ends a job.
        """
        fields: dict[str, Any] = self._common(message) | {"formatted": self._formatted(message)}
        if self._was_said(action):
            return
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

    def _was_said(self, action: str) -> bool:
        """Whether a handler that runs again after a restart has said this already."""
        for index, event in enumerate(self._said_before):
            if event.action == action:
                del self._said_before[index]
                return True
        return False

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
                index=self.outputs,
                data=data,
            )
        )

    def relay(self, event: AnyEvent, lower_n: int) -> None:
        """Add an event of a lower hop's job as this job's own; its actor stays."""
        if event.kind == "output":
            self.append(_as_output_of(self, event, self.outputs))
        else:
            self.append(msgspec.structs.replace(event, job_id=self.id, event_id=None), lower_n)

    # --- life ------------------------------------------------------------------------------------------

    def start(self) -> bool:
        """Go from pending to running; False when it is past that."""
        if self.state != "pending":
            return False
        self.state = "running"
        self.started = self._clock.monotonic()
        self.started_at = self._clock.timestamp()
        message = f"Executing {self.operation.name}."
        if self._journal is not None:
            self._journal.started(self)
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
        event = ExecuteComplete(data=result, formatted=self._formatted(message), **self._common(message))
        body = encode_event(event)  # may raise, for some results: then the job has not ended
        if self.log is not None and not self.log.has_room(body):
            raise self._too_large()
        self.result = result
        return self._end("completed", event)

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
        self.state = state
        self.finished = self._clock.monotonic()
        self.finished_at = self._clock.timestamp()
        self.disarm()
        if self.deadline_timer is not None:
            self.deadline_timer.cancel()
        self.append(event)
        return True

    def let_go(self) -> None:
        """Stop what runs for the job in this process; it has not ended."""
        self.disarm()
        self._stop_handler()

    def _too_large(self) -> OutputTooLarge:
        return OutputTooLarge(f"{self.operation.name} said more than the {MAX_LOG_BYTES >> 20} MiB of a job.")

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
            position=str(self.log.position) if self.log is not None else None,
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


def _as_output_of(job: Job, event: AnyEvent, index: int) -> AnyEvent:
    assert isinstance(event, Token | Chunk)
    changed: AnyEvent = msgspec.structs.replace(event, job_id=job.id, event_id=None, index=index)
    return changed
