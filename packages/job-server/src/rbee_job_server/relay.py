"""The relay: one follower per lower service, which hands each event to the job it belongs to.

The upper job names its step, so it knows the lower job's id before it submits; events of jobs that are
not ours are dropped. Each lower job's `<n>-<i>` is kept, so an event that comes twice is dropped, and
one that is missing is noticed: the lower job's own stream is then read from the last event we had.
"""

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, Protocol

import anyio
import msgspec
import structlog
from anyio.abc import TaskGroup

from rbee_contracts.errors import DeadlineExceeded, RbeeError, Unavailable
from rbee_contracts.events import (
    AnyEvent,
    Error,
    Execute,
    ExecuteCancelled,
    ExecuteComplete,
    ExecuteError,
    ExecuteTimeout,
    Gap,
    InferStart,
    decode_event,
)
from rbee_contracts.ids import hop_job_id, step_key
from rbee_contracts.jobs import JobAccepted, JobRecord
from rbee_contracts.operations import Operation
from rbee_contracts.sse import START, Position, parse_event_id
from rbee_contracts.trace import TraceContext
from rbee_job_server.context import JobContext
from rbee_job_server.jobs import Job
from rbee_job_server.journal import JobLost, Step
from rbee_job_server.metrics.relay import Handed

log = structlog.get_logger(__name__)

CONNECT_TIMEOUT_S = 5.0
RESUME_TIMEOUT_S = 30.0
"""How long a job that goes on after a restart waits for the service below."""

CANCEL_TIMEOUT_S = 5.0
REREADS_AT_ONCE = 8
SENT_AGAIN_AT_MOST = 5
"""How often a step that a lower service has forgotten is sent again; what ends it each time is left alone."""

BEYOND = 10**15 - 1
UNSAYABLE = (ValueError, OverflowError, RecursionError)
"""What encoding an event that could be decoded may raise."""


_plain_output = re.compile(
    rb"""
    \{ "event_id":"([0-9]{1,15})-([0-9]{1,15})",
    (
        "action":"(?:token|(chunk))",
        "message":"[^"\\\x00-\x1f]*+(?:\\(?:["\\bfnrt]|u00[01][0-9a-f])[^"\\\x00-\x1f]*+)*+",
        "actor":"[^"\\\x00-\x1f]*+",
        "job_id":"
    )
    ([^"\\\x00-\x1f]*+)
    (
        ","correlation_id":"[^"\\\x00-\x1f]*+",
        "timestamp":"[^"\\\x00-\x1f]*+",
        "index":(0|[1-9][0-9]{0,14})
        (?(4),"data":[^\n]*)
        \}
    )
    """,
    re.VERBOSE,
).fullmatch
"""Cuts output, as JSON from the firehose, where the id of its job stands.

The cut is at the event's own `job_id` and never at something in a text: all that is before it is matched, and
in a JSON string a quote always has a backslash before it. The texts are as our services write them, so that
encoding them again would give the same bytes. Only a chunk has `data`, which is passed on as it is; a token
with `data`, or an event with any other field, has another form and is decoded.
"""


class LowerService(Protocol):
    """What the relay needs of the service below; `rbee_job_client.JobClient` is one."""

    async def submit(
        self,
        operation: Operation,
        *,
        correlation_id: str | None = None,
        respond_async: bool = False,
        idempotency_key: str | None = None,
        time_left_s: float | None = None,
        trace: TraceContext | None = None,
    ) -> JobAccepted: ...

    async def cancel(self, job_id: str, *, correlation_id: str | None = None) -> bool: ...

    def follow_raw(
        self, *, on_connection: Callable[[bool], None] | None = None
    ) -> AsyncIterator[list[AnyEvent | bytes]]: ...

    def stream_from(
        self, job_id: str, position: Position
    ) -> AsyncGenerator[tuple[Position, AnyEvent], None]: ...

    async def get(self, job_id: str) -> JobRecord: ...


class LowerJobFailed(RbeeError):
    """The lower job failed; code, message and retryable are its own."""

    title = "Failed below"


class _Sink:
    """The upper job's end of one lower job: takes its events in order, once each."""

    def __init__(self, job: Job, lower_id: str, position: Position) -> None:
        self.lower_id = lower_id
        self._job = job
        self._job_id = job.id.encode()
        self._error: Error | None = None
        self._result: Any = None
        self._failure: RbeeError | None = None
        self._n, self._i = position
        self.ended = anyio.Event()
        self.missed: list[tuple[AnyEvent, Position]] | None = None
        """What the firehose brings while the lower job's own stream is read; None when it is not."""
        self.is_there = False
        """Whether the lower job is known to exist, so that its stream can be read."""
        self.had_gap = False
        """Whether the firehose has lost something since."""
        self.submit: Callable[[], Awaitable[None]] | None = None
        """Submits the lower job, or again under the same key."""
        self.sent_again = 0

    @property
    def may_run_again(self) -> bool:
        """Whether nothing of the lower job's output was passed on, so that running it twice shows nowhere."""
        return self._i == 0 and not self._job.has_spoken and not self._job.is_finished

    @property
    def job(self) -> Job:
        return self._job

    @property
    def position(self) -> Position:
        return Position(self._n, self._i)

    def is_at(self, position: Position) -> bool:
        """Whether everything up to `position` has been taken."""
        return self._n >= position.narrations and self._i >= position.outputs

    def is_next(self, event: AnyEvent, position: Position) -> bool:
        """Whether `event` follows what we have; False where something between is missing."""
        n, i = position
        if event.kind == "output":
            return i <= self._i + 1 and n <= self._n
        return n <= self._n + 1 and i <= self._i

    def take(self, event: AnyEvent, position: Position) -> None:
        """Take an event unless we have it; what the upper hop says itself is consumed."""
        n, i = position
        if event.kind == "output":
            if i <= self._i:
                return
            self._i = i
        else:
            # A job that runs again says less, perhaps, before its end; an end that we had would be no news.
            if n <= self._n and event.kind != "terminal":
                return
            self._n = max(n, self._n)
        match event:
            case Execute() | InferStart():
                pass
            case Error():
                self._error = event
            case ExecuteComplete(data=data):
                self._result = data
                self.ended.set()
            case ExecuteError() | ExecuteTimeout() | ExecuteCancelled():
                self.fail(_failure_of(event, self._error))
            case _:
                self._job.relay(event, n)

    def pass_on(self, n: int, i: int, index: int, before: bytes, after: bytes) -> bool:
        """Take output without decoding it, if it is the very next; False, and nothing is changed, where not.

        Args:
            n, i: its place.
            before, after: its JSON around the id of its job.
        """
        if i != self._i + 1 or n > self._n or self.missed is not None:
            return False
        if not self._job.append_output(b"{%b%b%b" % (before, self._job_id, after), index):
            return False
        self._i = i
        return True

    def catch_up(self) -> bool:
        """Take what the firehose brought meanwhile, if it follows what we have; False while it does not."""
        for event, position in self.missed or ():
            if not self.is_next(event, position):
                return False
            self.take(event, position)
        self.missed = None
        return True

    def fail(self, failure: RbeeError) -> None:
        if not self.ended.is_set():
            self._failure = failure
            self.ended.set()

    def result(self) -> Any:
        """Give the lower job's result, once ended.

        Raises:
            RbeeError: the lower job did not complete.
        """
        if self._failure is not None:
            raise self._failure
        return self._result


class Relay:
    """All steps that this service runs on one lower service. `run` must be running.

    Args:
        service: the lower service's kind; lower job ids are derived from it.
        peer: the lower service's id; it stands in a job's recorded steps.
    """

    def __init__(self, *, service: str, peer: str, client: LowerService) -> None:
        self._service = service
        self._peer = peer
        self._name = f"{service} {peer}"
        self._client = client
        self._sinks: dict[bytes, _Sink] = {}
        """By the lower job's id as it stands in JSON."""
        self._lost: RbeeError | None = None
        self._leaving = False
        self._connected = anyio.Event()
        self._disconnected = anyio.Event()
        self._disconnected.set()
        self._rereads = anyio.CapacityLimiter(REREADS_AT_ONCE)
        self._tasks: TaskGroup | None = None
        self.handed = Handed()

    @property
    def steps(self) -> int:
        """How many steps are under way."""
        return len(self._sinks)

    @property
    def is_connected(self) -> bool:
        """Whether the lower service is followed now."""
        return not self._disconnected.is_set()

    async def run(self) -> NoReturn:
        """Follow the lower service until cancelled."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            async for events in self._client.follow_raw(on_connection=self._on_connection):
                read_at = time.perf_counter()
                for event in events:
                    if isinstance(event, bytes):
                        self._pass_on(event)
                    else:
                        self._dispatch(event)
                self.handed.pieces += 1
                self.handed.seconds += time.perf_counter() - read_at
        raise RuntimeError(f"the follower of {self._name} has ended")

    async def perform(self, context: JobContext, operation: Operation, *, step: str, attempt: int = 0) -> Any:
        """Run `operation` below as a step of the running job; its events become the job's.

        A step that was recorded before a restart is taken up where it is: the lower job is submitted again
        under the same key only if nothing of its output was passed on, and else only read. A lower service
        that was restarted and has forgotten the job gets it again on the same condition.
        Leaving (cancelled, timed out) cancels the lower job.

        Raises:
            JobLost: the lower job had begun to speak and is gone.
            RbeeError: the lower job failed, or the lower service is lost.
        """
        job = context.job
        key = step_key(job.id, step, attempt)
        job_id = hop_job_id(self._service, key)
        if job.span is None:
            return await self._perform(context, operation, step, attempt, key, job_id, job.trace)
        with job.span.attempt(operation.name, attempt, peer=self._name, lower_job_id=job_id) as trace:
            return await self._perform(context, operation, step, attempt, key, job_id, trace)

    async def _perform(
        self,
        context: JobContext,
        operation: Operation,
        step: str,
        attempt: int,
        key: str,
        job_id: str,
        trace: TraceContext | None,
    ) -> Any:
        job = context.job
        is_recorded = job.find_step(step, attempt) is not None
        sink = _Sink(job, job_id, Position(job.lower_n, 0) if is_recorded else START)
        self._sinks[job_id.encode()] = sink
        may_run_below = is_recorded

        async def submit() -> None:
            await self._client.submit(
                operation,
                correlation_id=context.correlation_id,
                respond_async=True,
                idempotency_key=key,
                time_left_s=context.time_left_s,
                trace=trace,
            )

        sink.submit = submit
        try:
            await self._wait_for(job, is_recorded)
            if not is_recorded:
                await job.take_step(Step(step=step, attempt=attempt, where=self._peer, lower_job_id=job_id))
            if sink.ended.is_set():
                return sink.result()
            may_run_below = True
            if not (is_recorded and job.has_spoken):
                await submit()
            sink.is_there = True
            if is_recorded or sink.had_gap:
                self._reread(sink)
            await sink.ended.wait()
            return sink.result()
        finally:
            del self._sinks[job_id.encode()]
            if may_run_below and not sink.ended.is_set():
                await self._cancel_below(job_id, context.correlation_id)

    async def _wait_for(self, job: Job, is_recorded: bool) -> None:
        """Wait until the lower service is followed; longer for a job that goes on after a restart."""
        try:
            await self._wait_connected(RESUME_TIMEOUT_S if is_recorded else CONNECT_TIMEOUT_S)
        except RbeeError as exc:
            if is_recorded and job.has_spoken:
                raise self._job_lost(f"has not come back: {exc.details}") from exc
            raise

    async def read_output(self, lower_job_id: str) -> list[AnyEvent]:
        """Read the whole output of a lower job that has ended.

        Raises:
            RbeeError: it is not kept there any more, or the service cannot be reached.
        """
        await self._wait_connected(RESUME_TIMEOUT_S)
        # Beyond every narration: output only.
        stream = self._client.stream_from(lower_job_id, Position(BEYOND, 0))
        return [event async for _, event in stream if event.kind == "output"]

    async def lose(self, error: RbeeError, grace_s: float = 1.0) -> None:
        """The lower service is gone for good: what it has still said is taken, then its steps fail."""
        with anyio.move_on_after(grace_s):
            await self._disconnected.wait()
        self._lost = error
        self._connected.set()
        self.fail_steps(error)

    def leave(self) -> None:
        """From now on steps that are left go on below: this service takes them up again after its restart."""
        self._leaving = True

    def fail_steps(self, error: RbeeError) -> None:
        """Fail what is under way; new steps may still be tried."""
        for sink in self._sinks.values():
            sink.fail(error)

    async def _wait_connected(self, timeout_s: float) -> None:
        if not self._connected.is_set():
            with anyio.move_on_after(timeout_s):
                await self._connected.wait()
        if self._lost is not None:
            raise self._lost
        if not self._connected.is_set():
            raise Unavailable(
                f"{self._name} cannot be reached; try again when it is back.", code="unreachable"
            )

    async def _cancel_below(self, job_id: str, correlation_id: str) -> None:
        if self._lost is not None or self._leaving:
            return
        with anyio.move_on_after(CANCEL_TIMEOUT_S, shield=True) as limit:
            try:
                await self._client.cancel(job_id, correlation_id=correlation_id)
            except RbeeError as exc:
                log.warning("cancel_below_failed", lower_job_id=job_id, peer=self._name, details=exc.details)
        if limit.cancelled_caught:
            log.warning("cancel_below_timed_out", lower_job_id=job_id, peer=self._name)

    def _on_connection(self, is_connected: bool) -> None:
        if is_connected:
            self._connected.set()
            self._disconnected = anyio.Event()
        else:
            self._disconnected.set()
            if self._lost is None and self._connected.is_set():
                self._connected = anyio.Event()

    def _pass_on(self, body: bytes) -> None:
        """Hand output to its job as the bytes it is, with the job's own id; decode it only if it must be."""
        found = _plain_output(body)
        if found is not None and (body.isascii() or _is_utf8(body)):
            n, i, before, _, lower_id, after, index = found.groups()
            sink = self._sinks.get(lower_id)
            if sink is None or sink.pass_on(int(n), int(i), int(index), before, after):
                return
        try:
            event = decode_event(body)
        except msgspec.DecodeError:
            return  # no event: passed over, and missed by its job if it was one of its
        self._dispatch(event)

    def _dispatch(self, event: AnyEvent) -> None:
        sink = self._sinks.get(event.job_id.encode(errors="replace"))
        if sink is not None:
            try:
                position = parse_event_id(event.event_id or "")
            except ValueError:
                log.warning("event_without_place", peer=self._name, action=event.action)
                return
            if sink.missed is not None:
                sink.missed.append((event, position))
            elif sink.is_next(event, position):
                try:
                    sink.take(event, position)
                except UNSAYABLE as exc:
                    self._fail_unsayable(sink, exc)
            else:
                self._reread(sink, (event, position))
        elif isinstance(event, Gap):
            self.handed.gaps += 1
            log.warning("firehose_gap", peer=self._name, steps=len(self._sinks))
            for owned in self._sinks.values():
                self._reread(owned)

    def _reread(self, sink: _Sink, *missed: tuple[AnyEvent, Position]) -> None:
        """Read a lower job's own stream from what we have, until the firehose can be taken again."""
        if not sink.is_there or sink.missed is not None:
            sink.had_gap = True  # it is read as soon as it is submitted, or once more
        elif self._tasks is not None:
            sink.missed = list(missed)
            self.handed.rereads += 1
            self._tasks.start_soon(self._catch_up, sink)

    async def _catch_up(self, sink: _Sink) -> None:
        try:
            async with self._rereads:
                while not await self._read_below(sink):
                    pass
        except StopAsyncIteration:
            sink.fail(self._job_lost("has no more of it than it had told"))
        except RbeeError as exc:
            is_gone = exc.code in ("job_not_found", "output_expired")
            sink.fail(self._job_lost(f"does not know it any more ({exc.code})") if is_gone else exc)
        except UNSAYABLE as exc:
            self._fail_unsayable(sink, exc)

    async def _read_below(self, sink: _Sink) -> bool:
        """Read a lower job's own stream until the firehose can be taken again.

        False where that must be done once more: the firehose has lost something meanwhile, or the job is
        forgotten and was sent again.

        Raises:
            StopAsyncIteration: the stream has ended, and the job with it, without an end.
            RbeeError: the job is gone, or cannot be read.
        """
        sink.had_gap = False
        try:
            # What comes after this record comes on the firehose too, which is being followed.
            record = await self._client.get(sink.lower_id)
            there = parse_event_id(record.position or "0-0")
            is_over = record.state not in ("pending", "running")
            # One that runs again may have ended before it came to where the first run was.
            is_behind = there.narrations < sink.position.narrations and sink.may_run_again
            begin = START if is_behind else sink.position
            async with aclosing(self._client.stream_from(sink.lower_id, begin)) as events:
                while not sink.ended.is_set():
                    if sink.is_at(there) and not is_over:
                        if sink.had_gap:
                            return False
                        if sink.catch_up():
                            break
                    position, event = await anext(events)
                    sink.take(event, position)
        except RbeeError as exc:
            if exc.code != "job_not_found" or not sink.may_run_again:
                raise
            await self._send_again(sink)
            return False
        return True

    async def _send_again(self, sink: _Sink) -> None:
        """Submit a lower job again that is forgotten, though it had said nothing that shows that it ran.

        Raises:
            JobLost: that was done too often.
            RbeeError: it cannot be submitted.
        """
        sink.sent_again += 1
        if sink.submit is None or sink.sent_again > SENT_AGAIN_AT_MOST:
            raise self._job_lost(f"has forgotten it {sink.sent_again} times")
        log.warning("step_sent_again", lower_job_id=sink.lower_id, peer=self._name)
        if sink.sent_again == 1:
            sink.job.narrate(
                "warning", f"{self._name} had forgotten this job before it said anything; it was sent again."
            )
        await sink.submit()
        if sink.missed is not None:
            sink.missed.clear()  # of the run that is forgotten; the new one is read from its stream

    def _fail_unsayable(self, sink: _Sink, exc: Exception) -> None:
        """Fail one job for an event that cannot be said again, instead of all with the relay."""
        sink.fail(LowerJobFailed(f"{self._name} said what cannot be passed on ({type(exc).__name__})."))
        if self._tasks is not None:
            self._tasks.start_soon(self._cancel_below, sink.lower_id, sink.job.correlation_id)

    def _job_lost(self, reason: str) -> JobLost:
        return JobLost(f"The job was lost: {self._name} {reason}. Submit it again if it may run twice.")


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def _failure_of(event: ExecuteError | ExecuteTimeout | ExecuteCancelled, error: Error | None) -> RbeeError:
    match event:
        case ExecuteTimeout():
            return DeadlineExceeded(event.message)
        case ExecuteCancelled():
            return LowerJobFailed(
                f"The job was cancelled at {event.actor}, and not from here: {event.message}",
                code="cancelled_below",
            )
        case ExecuteError() if error is not None:
            failure = LowerJobFailed(error.message, code=error.code, retryable=error.retryable)
            failure.actor = error.actor
            return failure
        case _:
            return LowerJobFailed(event.message, code=event.code)
