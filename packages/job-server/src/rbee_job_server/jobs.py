"""One job: its state, its log, its readers. Exactly one terminal event ends it, whoever comes first."""

import asyncio
import enum
import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio
import msgspec
import structlog
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
from rbee_contracts.ids import is_step_key
from rbee_contracts.jobs import JobError, JobRecord, JobState
from rbee_contracts.operations import Operation, operation_digest
from rbee_contracts.sse import START, Position
from rbee_contracts.trace import TraceContext
from rbee_job_server.clock import Clock
from rbee_job_server.event_log import MAX_LOG_BYTES, EventLog, LogReader, OutputTooLarge
from rbee_job_server.journal import Journal, RestoredJob, Said, Step
from rbee_job_server.staging import Staging

if TYPE_CHECKING:
    from rbee_job_server.tracing import JobSpan

log = structlog.get_logger(__name__)

E = TypeVar("E", bound=Event)


class Publisher(Protocol):
    """Who hands a job's events to those who follow all jobs: the firehose."""

    def publish(self, event: AnyEvent, body: bytes, position: Position) -> None: ...

    def publish_output(self, body: bytes, narrations: int, outputs: int) -> None: ...


_TOKEN_HEAD = b'{"action":"token","message":'
_TOKEN_TAIL = b'%b","index":%d}'
_TOKEN = _TOKEN_HEAD + b"%b%b" + _TOKEN_TAIL
"""The JSON of a plain token: its text, what all tokens of its job have in common, its time and its index."""

encode_json = msgspec.json.Encoder().encode


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

    Every way to end it goes through `_end`, which lets only the first one win. Thousands of finished ones are
    kept, so what only an unfinished one needs is dropped at its end.
    """

    __slots__ = (
        "_clock",
        "_journal",
        "_publisher",
        "_said_before",
        "_staging",
        "_token_fields",
        "_unknown_fields",
        "actor",
        "caller_trace",
        "correlation_id",
        "created",
        "created_at",
        "deadline_timer",
        "digest",
        "end_code",
        "error",
        "finished",
        "finished_at",
        "had_ended",
        "has_spoken",
        "id",
        "idempotency_key",
        "log",
        "lower_n",
        "operation",
        "policy",
        "readers",
        "result",
        "said",
        "scope",
        "seq",
        "span",
        "spoke_at",
        "started",
        "started_at",
        "state",
        "steps",
        "timer",
        "usage",
    )

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
        publisher: Publisher,
        journal: Journal | None = None,
        digest: bytes | None = None,
        caller_trace: TraceContext | None = None,
        span: "JobSpan | None" = None,
    ) -> None:
        self.id = job_id
        self.caller_trace = caller_trace
        self.span = span
        self.seq = seq
        self.operation = operation
        self.digest = digest or operation_digest(operation)
        self.correlation_id = correlation_id
        self.idempotency_key = idempotency_key
        self.policy = policy
        self._unknown_fields: Mapping[str, str | None] | None = unknown_fields or None
        self.actor = actor
        self.state: JobState = "pending"
        self.log: EventLog | None = EventLog()
        self.readers = 0
        self.error: JobError | None = None
        self.usage: Usage | None = None
        self.result: msgspec.Raw | None = None
        """As JSON, so that it takes as much as it is counted as; None also once it is no longer kept."""
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
        self.spoke_at: float | None = None
        """When its first output came, in this process."""
        self.end_code = ""
        """How it ended, in this process: the code of its terminal event, or `ok`."""
        self.had_ended = False
        """Whether it ended in the run before, here or below."""
        self.lower_n = 0
        """The place, in the stream below, of the last narration a restored job had relayed from there."""
        self.said: deque[Said] | None = None
        """Stored narration of a restored job that is not back in its log yet."""
        self._token_fields = b""
        """What all plain tokens of this job have in common, as JSON; made for the first one."""
        self._clock = clock
        self._publisher: Publisher = span or publisher
        self._journal = journal
        self._staging = Staging(self, journal, self._release) if journal is not None else None
        self._said_before: list[AnyEvent] | None = None

    @classmethod
    def restored(
        cls,
        stored: RestoredJob,
        *,
        actor: str,
        clock: Clock,
        publisher: Publisher,
        journal: Journal | None,
        span: "JobSpan | None" = None,
    ) -> "Job":
        """Make a job again from what the journal knows, or without one from what the service below knows.

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
            publisher=publisher,
            journal=journal,
            digest=stored.digest,
            caller_trace=stored.trace,
            span=span,
        )
        now = clock.monotonic()
        job.state = stored.state
        job.created_at = stored.created_at
        job.started_at = stored.started_at
        job.started = now - stored.age_s if stored.started_at is not None else None
        job.finished_at = stored.finished_at
        job.finished = now - stored.age_s if stored.finished_at is not None else None
        job.error, job.usage, job.result = stored.error, stored.usage, _as_json(stored.result)
        job.has_spoken = stored.has_spoken
        job.had_ended = stored.had_ended or job.is_finished
        job.steps = list(stored.steps)
        job.lower_n = max((said.lower_n for said in stored.said if said.lower_n is not None), default=0)
        job.said = deque(stored.said)
        job._said_before = [decode_event(said.body) for said in stored.said if said.lower_n is None]
        last = stored.said[-1].position if stored.said else START
        if journal is not None and not job.is_finished:
            job._staging = Staging(job, journal, job._release, last)
        else:
            job._staging = None
        if job.is_finished and job.has_spoken:
            job.log = None
        else:
            job._insert_said(math.inf if not job.has_spoken else 0)
        return job

    @property
    def is_finished(self) -> bool:
        return self.finished is not None

    @property
    def trace(self) -> TraceContext | None:
        """What the service below is told: this job's own span, or without tracing the caller's."""
        return self.caller_trace if self.span is None else self.span.context

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
            if event.kind == "output" and not self.has_spoken:
                self.speak()
            self._release(event, body)
        elif not self._staging.closed:
            self._staging.add(event, body, lower_n)

    def append_output(self, body: bytes, index: int) -> bool:
        """Add output of which there is nothing but its JSON, exactly as `append` would have encoded it.

        False, and nothing is changed, where output must come through `append`: `index` is not its next one,
        it would be held back, other events belong before it, or it does not fit.
        """
        log = self.log
        if log is None or log.closed or log.outputs != index or self.said or not log.has_room(body):
            return False
        if self._staging is None:
            if not self.has_spoken:
                self.speak()
        elif not self._staging.pass_output():
            return False
        log.append_output(body)
        self._publisher.publish_output(body, log.narrations, log.outputs)
        return True

    def _release(self, event: AnyEvent, body: bytes) -> None:
        """Let readers see an event."""
        log = self.log
        if log is None:
            return
        if self.said:
            self._insert_said(log.outputs if event.kind == "output" else math.inf)
        log.append(event, body)
        self._publisher.publish(event, body, log.position)

    def speak(self) -> None:
        """Its first output is there."""
        self.has_spoken = True
        self.spoke_at = self._clock.monotonic()

    def settle(self) -> None:
        """All that was said is out: what held it back is no longer needed."""
        self._staging = None

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
        said, log = self.said or deque(), EventLog()
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
        return next((event for event in self._said_before or () if isinstance(event, kind)), None)

    def find_step(self, step: str, attempt: int) -> Step | None:
        return next((known for known in self.steps if (known.step, known.attempt) == (step, attempt)), None)

    async def take_step(self, step: Step) -> None:
        """Record a step, durably, before it is submitted."""
        self.steps.append(step)
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
        said = self._said_before or []
        for index, event in enumerate(said):
            if event.action == action:
                del said[index]
                return True
        return False

    def emit_token(self, text: str, data: TokenData | None = None) -> None:
        """Add one item of output.

        A plain token costs the encoding of its text: the rest of its JSON is the same for all of a job's.
        """
        if self.log is None or self.log.closed:
            return
        timestamp, index = self._clock.timestamp(), self.outputs
        if data is None:
            if not self._token_fields:
                self._token_fields = _token_fields(self._token("", "", 0))
            body = _TOKEN % (encode_json(text), self._token_fields, timestamp.encode(), index)
            if self.append_output(body, index):
                return
        self.append(self._token(text, timestamp, index, data))

    def _token(self, text: str, timestamp: str, index: int, data: TokenData | None = None) -> Token:
        return Token(
            message=text,
            actor=self.actor,
            job_id=self.id,
            correlation_id=self.correlation_id,
            timestamp=timestamp,
            index=index,
            data=data,
        )

    def emit_chunk(self, data: msgspec.Raw, event: str = "") -> None:
        """Add one chunk of output: JSON as it stands. `event` names its server-sent event."""
        if self.log is None:
            return
        self.append(
            Chunk(
                message=event,
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
        for name, meant in (self._unknown_fields or {}).items():
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
        self.result = _as_json(result)
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
        if not self.is_finished:
            log.info("job_cancelled", job_id=self.id, correlation_id=self.correlation_id, reason=reason.value)
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
        self.end_code = getattr(event, "code", "ok")
        self.disarm()
        if self.deadline_timer is not None:
            self.deadline_timer.cancel()
            self.deadline_timer = None
        self.append(event)
        self._said_before = None
        self._token_fields = b""
        self._unknown_fields = None
        return True

    def let_go(self) -> None:
        """Stop what runs for the job in this process; it has not ended."""
        self.disarm()
        if self.span is not None:
            self.span.leave()
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
            children=[step.lower_job_id for step in self.steps],
            position=str(self.log.position) if self.log is not None else None,
            **self._for_hop_above(),
        )

    def _for_hop_above(self) -> dict[str, Any]:
        """What the hop that sent this job needs to know it again, should it lose its memory."""
        if self.idempotency_key is None or not is_step_key(self.idempotency_key):
            return {}
        deadline = None if self.is_finished else self.deadline
        return {
            "idempotency_key": self.idempotency_key,
            "digest": self.digest.hex(),
            "time_left_s": None if deadline is None else max(0.0, deadline - self._clock.monotonic()),
            "traceparent": None if self.caller_trace is None else self.caller_trace.traceparent,
        }

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


def _as_json(result: object) -> msgspec.Raw | None:
    return None if result is None else msgspec.Raw(encode_json(result))


def _token_fields(token: Token) -> bytes:
    """Cut out of an empty token's JSON what stands between its text and its time."""
    return encode_event(token).removeprefix(_TOKEN_HEAD + b'""').removesuffix(_TOKEN_TAIL % (b"", 0))


def _as_output_of(job: Job, event: AnyEvent, index: int) -> AnyEvent:
    assert isinstance(event, Token | Chunk)
    changed: AnyEvent = msgspec.structs.replace(event, job_id=job.id, event_id=None, index=index)
    return changed
