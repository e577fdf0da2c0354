"""The relay: one follower per lower service, which hands each event to the job it belongs to.

The upper job names its step, so it knows the lower job's id before it submits; events of jobs that are
not ours are dropped. Each lower job's `<n>-<i>` is kept, so an event that comes twice is dropped, and
one that is missing is noticed: the lower job's own stream is then read from the last event we had.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn, Protocol

import anyio
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
)
from rbee_contracts.ids import hop_job_id, step_key
from rbee_contracts.jobs import JobAccepted
from rbee_contracts.operations import Operation
from rbee_contracts.sse import START, Position, parse_event_id
from rbee_job_server.context import JobContext

log = structlog.get_logger(__name__)

CONNECT_TIMEOUT_S = 5.0
CANCEL_TIMEOUT_S = 5.0


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
    ) -> JobAccepted: ...

    async def cancel(self, job_id: str, *, correlation_id: str | None = None) -> bool: ...

    def follow(
        self, *, output: bool = False, on_connection: Callable[[bool], None] | None = None
    ) -> AsyncIterator[list[AnyEvent]]: ...

    def stream_from(self, job_id: str, position: Position) -> AsyncIterator[tuple[Position, AnyEvent]]: ...


class LowerJobFailed(RbeeError):
    """The lower job failed; code, message and retryable are its own."""

    title = "Failed below"


class _Sink:
    """The upper job's end of one lower job: takes its events in order, once each."""

    def __init__(self, context: JobContext) -> None:
        self._job = context.job
        self._error: Error | None = None
        self._result: Any = None
        self._failure: RbeeError | None = None
        self._n, self._i = START
        self.ended = anyio.Event()
        self.rereading = False

    @property
    def position(self) -> Position:
        return Position(self._n, self._i)

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
            if n <= self._n:
                return
            self._n = n
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
                self._job.relay(event)

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
        name: how logs and errors call it, e.g. `worker w1`.
    """

    def __init__(self, *, service: str, name: str, client: LowerService) -> None:
        self._service = service
        self._name = name
        self._client = client
        self._sinks: dict[str, _Sink] = {}
        self._lost: RbeeError | None = None
        self._connected = anyio.Event()
        self._disconnected = anyio.Event()
        self._disconnected.set()

    @property
    def steps(self) -> int:
        """How many steps are under way."""
        return len(self._sinks)

    async def run(self) -> NoReturn:
        """Follow the lower service until cancelled."""
        async with anyio.create_task_group() as tasks:
            async for events in self._client.follow(output=True, on_connection=self._on_connection):
                for event in events:
                    self._dispatch(event, tasks)
        raise RuntimeError(f"the follower of {self._name} has ended")

    async def perform(self, context: JobContext, operation: Operation, *, step: str, attempt: int = 0) -> Any:
        """Run `operation` below as a step of the running job; its events become the job's.

        Leaving (cancelled, timed out) cancels the lower job.

        Raises:
            RbeeError: the lower job failed, or the lower service is lost.
        """
        key = step_key(context.job_id, step, attempt)
        job_id = hop_job_id(self._service, key)
        sink = _Sink(context)
        await self._wait_connected()
        self._sinks[job_id] = sink
        context.job.children.append(job_id)
        try:
            await self._client.submit(
                operation,
                correlation_id=context.correlation_id,
                respond_async=True,
                idempotency_key=key,
                time_left_s=context.time_left_s,
            )
            await sink.ended.wait()
            return sink.result()
        finally:
            del self._sinks[job_id]
            if not sink.ended.is_set():
                await self._cancel_below(job_id, context.correlation_id)

    async def lose(self, error: RbeeError, grace_s: float = 1.0) -> None:
        """The lower service is gone for good: what it has still said is taken, then its steps fail."""
        with anyio.move_on_after(grace_s):
            await self._disconnected.wait()
        self._lost = error
        self._connected.set()
        self.fail_steps(error)

    def fail_steps(self, error: RbeeError) -> None:
        """Fail what is under way; new steps may still be tried."""
        for sink in self._sinks.values():
            sink.fail(error)

    async def _wait_connected(self) -> None:
        with anyio.move_on_after(CONNECT_TIMEOUT_S):
            await self._connected.wait()
        if self._lost is not None:
            raise self._lost
        if not self._connected.is_set():
            raise Unavailable(
                f"{self._name} cannot be reached; try again when it is back.", code="unreachable"
            )

    async def _cancel_below(self, job_id: str, correlation_id: str) -> None:
        if self._lost is not None:
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

    def _dispatch(self, event: AnyEvent, tasks: TaskGroup) -> None:
        sink = self._sinks.get(event.job_id)
        if sink is not None:
            if sink.rereading:
                return
            position = parse_event_id(event.event_id or "")
            if sink.is_next(event, position):
                sink.take(event, position)
            else:
                self._reread(event.job_id, sink, tasks)
        elif isinstance(event, Gap):
            log.warning("firehose_gap", peer=self._name, steps=len(self._sinks))
            for job_id, owned in self._sinks.items():
                self._reread(job_id, owned, tasks)

    def _reread(self, job_id: str, sink: _Sink, tasks: TaskGroup) -> None:
        if not sink.rereading:
            sink.rereading = True
            tasks.start_soon(self._read_to_end, job_id, sink)

    async def _read_to_end(self, job_id: str, sink: _Sink) -> None:
        """Read the lower job's own stream instead of the firehose, from what we have to its end."""
        try:
            async for position, event in self._client.stream_from(job_id, sink.position):
                sink.take(event, position)
                if sink.ended.is_set():
                    return
        except RbeeError as exc:
            sink.fail(exc)


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
