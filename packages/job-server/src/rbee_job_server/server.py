"""The job server: takes operations, runs their handlers as jobs, and ends each exactly once.

One instance per service owns the registry, the firehose and the task group that handlers run in.
"""

import asyncio
import math
import secrets
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import anyio
import structlog
from anyio.abc import TaskGroup
from msgspec import Struct

from rbee_contracts.errors import DeadlineExceeded, NotFound, NotImplementedHere, RbeeError, Unavailable
from rbee_contracts.events import AnyEvent
from rbee_contracts.ids import hop_job_id, is_hop_job_id, is_step_key, new_job_id
from rbee_contracts.jobs import JobPage, JobRecord, JobState
from rbee_contracts.operations import Infer, OpenAI, Operation, WorkerSpawn
from rbee_contracts.sse import START, Position
from rbee_contracts.trace import TraceContext
from rbee_job_server.clock import Clock, SystemClock
from rbee_job_server.context import JobContext, enter
from rbee_job_server.event_log import LogReader
from rbee_job_server.firehose import Firehose
from rbee_job_server.jobs import CancelReason, Job, JobPolicy
from rbee_job_server.journal import Journal, RestoredJob
from rbee_job_server.metrics.jobs import JobMetrics
from rbee_job_server.registry import JobRegistry, output_expired, parse_cursor
from rbee_job_server.tracing import JobSpan, Tracer

log = structlog.get_logger(__name__)

Handler: TypeAlias = Callable[[Any, JobContext], Awaitable[Any]]
Handlers: TypeAlias = Mapping[type[Operation], Handler]
ReadOutput: TypeAlias = Callable[[Job], Awaitable[list[AnyEvent]]]
Admit: TypeAlias = Callable[[Operation], None]

SWEEP_EVERY_S = 1.0

RETURN_WINDOW_S = 15.0
"""After a restart readers have at least this long to come back; their own waits between tries grow to 5 s."""

OWN_WORDS = frozenset(
    {
        "cancelled_below",
        "draining",
        "hive_lost",
        "hive_unreachable",
        "job_lost",
        "no_hive",
        "no_worker",
        "shutting_down",
        "unreachable",
        "worker_not_found",
        "worker_not_ready",
    }
)
"""Failures of inferences that are explained by rbee itself; what an engine says may quote the request."""

DEFAULT_TIMEOUTS_S: dict[type[Operation], float] = {WorkerSpawn: 1800.0}
"""Limits of operations whose request names none; what is not here has no limit."""


class JobServerConfig(Struct, frozen=True, kw_only=True):
    """Times in seconds.

    Args:
        unread_timeout_s: a job that nobody reads is cancelled after this long (`not_read`).
        orphan_timeout_s: an inference that the hop above sent is cancelled when nobody has followed this
            service for this long (`owner_gone`).
    """

    unread_timeout_s: float = 60.0
    orphan_timeout_s: float = 60.0


class Submission(Struct, frozen=True, kw_only=True):
    """What comes with an operation. `time_left_s` is what the hop above has left for it."""

    operation: Operation
    correlation_id: str
    respond_async: bool = False
    idempotency_key: str | None = None
    time_left_s: float | None = None
    unknown_fields: dict[str, str | None] = {}
    trace: TraceContext | None = None


class JobServer:
    """Runs jobs.

    Args:
        service: the kind of service; hop jobs' ids are derived from it.
        actor: who narrates, e.g. `hive/box1`.
        handlers: what executes each operation; an operation without one is 501.
        admit: called before a job is made; what it raises is the answer to the submit.
        journal: what makes jobs outlive the process; without it they end with it.
        read_output: reads a finished job's output below again, for one that was restored.
        tracer: makes a span of each job; None where tracing is off.
    """

    def __init__(
        self,
        *,
        service: str,
        actor: str,
        handlers: Handlers,
        admit: Admit = lambda _: None,
        config: JobServerConfig | None = None,
        clock: Clock | None = None,
        journal: Journal | None = None,
        read_output: ReadOutput | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.service = service
        self.actor = actor
        self.boot = secrets.token_hex(8)
        self.clock = clock or SystemClock()
        self.metrics = JobMetrics()
        self.registry = JobRegistry(self.metrics.ended)
        self.firehose = Firehose(self.boot, actor, self.clock)
        self.stopping = False
        self.keeps_jobs = False
        """Whether a stop lets go of jobs instead of ending them: what runs below goes on for the next run."""
        self._journal = journal
        self._read_output = read_output
        self._tracer = tracer
        self._restored: list[Job] = []
        self._rebuilding: dict[str, anyio.Lock] = {}
        self._handlers = handlers
        self._admit = admit
        self._config = config or JobServerConfig()
        self._tasks: TaskGroup | None = None
        self._running: set[Job] = set()
        self.last_round = math.inf
        """When `run` has last gone through the jobs, by the loop's clock."""
        self._ended: set[asyncio.Event] = set()
        """Set when a job's handler has ended, for those who wait for that."""

    # --- the service's side ------------------------------------------------------------------------------

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks of all jobs, until cancelled."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            for job in self._restored:
                self._resume(job)
            self._restored.clear()
            task_status.started()
            while True:
                await self.metrics.sleep(SWEEP_EVERY_S)
                self.last_round = anyio.current_time()
                self._sweep()

    def restore(self, stored: RestoredJob) -> None:
        """Take a job over from the run before; called before `run`."""
        has_ended = stored.finished_at is not None or stored.had_ended
        tracer = None if has_ended else self._tracer  # the run before has sent its span
        job = Job.restored(
            stored,
            actor=self.actor,
            clock=self.clock,
            publisher=self.firehose,
            journal=self._journal,
            span=None if tracer is None else tracer.resume(stored, self.firehose),
        )
        self.registry.add(job)
        if not job.is_finished:
            self._restored.append(job)

    @property
    def running(self) -> int:
        """How many jobs run now."""
        return len(self._running)

    async def durable(self) -> None:
        """Wait until everything that was decided so far outlives the process."""
        if self._journal is not None:
            await self._journal.flushed()

    async def drain(self, timeout_s: float) -> None:
        """Take no more jobs, and wait until running inferences have ended or the time is over.

        Other operations (a spawn, a download) have no reader who loses a text, and may take an hour.
        """
        self.stopping = True
        await self._wait_until(
            lambda: not any(isinstance(job.operation, Infer | OpenAI) for job in self._running), timeout_s
        )

    async def end_all(self, error: RbeeError, grace_s: float = 5.0) -> None:
        """End every job that has not ended with `error`, and let its handler clean up for `grace_s`."""
        self.stopping = True
        for job in self.registry:
            job.abort(error)
        await self._wait_until(lambda: not self._running, grace_s)

    async def leave(self, grace_s: float = 5.0) -> None:
        """Let go of every job that has not ended, without ending it: the next run takes them up again."""
        self.stopping = True
        for job in self._running:
            job.let_go()
        await self._wait_until(lambda: not self._running, grace_s)

    @property
    def is_durable(self) -> bool:
        """Whether jobs outlive the process."""
        return self._journal is not None or self.keeps_jobs

    async def _wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        ended = asyncio.Event()
        self._ended.add(ended)
        try:
            with anyio.move_on_after(timeout_s):
                while not condition():
                    ended.clear()
                    await ended.wait()
        finally:
            self._ended.discard(ended)

    # --- the routes' side --------------------------------------------------------------------------------

    def submit(self, submission: Submission) -> Job:
        """Take an operation and give its job: a new one, or the one already submitted under its key.

        Raises:
            NotImplementedHere: no handler executes this operation.
            Conflict: the key was used for another operation.
            Unavailable: the service is stopping.
            RbeeError: what `admit` raises.
        """
        operation, key = submission.operation, submission.idempotency_key
        if type(operation) not in self._handlers:
            raise NotImplementedHere(
                f"{operation.name} is known, but the {self.service} of this version cannot execute it."
            )
        hop_id = hop_job_id(self.service, key) if key and is_step_key(key) else None
        if key is not None and (known := self.registry.find_submitted(key, operation, hop_id)) is not None:
            if submission.respond_async and known.state == "pending" and self._tasks is not None:
                self._start(known)
            return known
        if self.stopping:
            raise Unavailable("The service is stopping; submit again in a moment.", code="shutting_down")
        if self._tasks is None:
            raise Unavailable("The service is starting; submit again in a moment.")
        self._admit(operation)
        job_id = hop_id or new_job_id()
        job = Job(
            job_id=job_id,
            seq=self.registry.take_seq(),
            operation=operation,
            correlation_id=submission.correlation_id,
            idempotency_key=key,
            policy=_policy(submission),
            unknown_fields=submission.unknown_fields,
            actor=self.actor,
            clock=self.clock,
            publisher=self.firehose,
            journal=self._journal,
            caller_trace=submission.trace,
            span=None if self._tracer is None else self._begin_span(self._tracer, job_id, submission),
        )
        self.registry.add(job)
        self.metrics.submitted(job)
        if self._journal is not None:
            self._journal.accepted(job)
        log.info("job_accepted", job_id=job.id, operation=operation.name, correlation_id=job.correlation_id)
        if job.policy.starts_at_once:
            self._start(job)
        else:
            self._await_reader(job, self._config.unread_timeout_s, CancelReason.NOT_READ)
        return job

    def _begin_span(self, tracer: Tracer, job_id: str, submission: Submission) -> JobSpan:
        return tracer.begin(
            job_id=job_id,
            operation=submission.operation,
            correlation_id=submission.correlation_id,
            parent=submission.trace,
            publisher=self.firehose,
        )

    async def find(self, job_id: str) -> JobRecord:
        """Give a job's record, also when it is no longer in memory; what it tells outlives the process.

        Raises:
            NotFound: no such job.
        """
        try:
            record = self.registry.get(job_id).record()
        except NotFound:
            stored = await self._journal.find(job_id) if self._journal is not None else None
            if stored is None:
                raise
            return stored
        await self.durable()
        return record

    async def page(
        self, *, state: JobState | None, operation: str | None, limit: int, cursor: str | None
    ) -> JobPage:
        """List records, newest first: from the journal where there is one, else from memory.

        Raises:
            InvalidRequest: the cursor is not one of ours.
        """
        before_seq = parse_cursor(cursor)
        if self._journal is None:
            return self.registry.page(state=state, operation=operation, limit=limit, before_seq=before_seq)
        await self._journal.flushed()
        return await self._journal.page(state=state, operation=operation, limit=limit, before_seq=before_seq)

    async def readable(self, job_id: str) -> Job:
        """Give a job with its log, which a restored one may have to read below again.

        Raises:
            NotFound: no such job.
            Gone: its output is no longer kept, here or below.
        """
        if job_id not in self.registry and self._journal is not None:
            await self.find(job_id)
            raise output_expired(job_id)
        job = self.registry.get(job_id)
        if self._read_output is not None and job.needs_rebuild:
            await self._rebuild(job, self._read_output)
        return self.registry.get_readable(job_id)

    async def _rebuild(self, job: Job, read_output: ReadOutput) -> None:
        lock = self._rebuilding.setdefault(job.id, anyio.Lock())
        try:
            async with lock:
                if job.needs_rebuild:
                    if not job.rebuild(await read_output(job)):
                        raise output_expired(job.id)
                    self.registry.keep_log(job)
        finally:
            if not (lock.locked() or lock.statistics().tasks_waiting):
                self._rebuilding.pop(job.id, None)

    def attach(self, job: Job, position: Position = START) -> LogReader:
        """Read a job's stream from `position`; the first reader starts the job. Pair with `detach`."""
        reader = job.reader(position)
        job.readers += 1
        if job.state == "pending":
            self._start(job)
        elif not job.is_finished:
            job.disarm()
        return reader

    def detach(self, job: Job) -> None:
        """A reader has left; the last one's leaving may cancel the job, after its resume window."""
        job.readers -= 1
        window = job.policy.resume_window_s
        if job.readers == 0 and window is not None and not job.is_finished:
            self._await_reader(job, window, CancelReason.ABANDONED)

    def _await_reader(self, job: Job, timeout_s: float, reason: CancelReason) -> None:
        job.disarm()
        job.timer = asyncio.get_running_loop().call_later(timeout_s, job.cancel, reason)

    # --- running -----------------------------------------------------------------------------------------

    def _start(self, job: Job) -> None:
        assert self._tasks is not None  # or `submit` had refused it
        job.disarm()
        if job.start() and not job.is_finished:  # what it says first may be too much already
            self._run_handler(job)

    def _resume(self, job: Job) -> None:
        """Go on with a restored job: its handler runs again, and what it has said or sent is not repeated."""
        if job.state == "pending" and not job.policy.starts_at_once:
            self._await_reader(job, self._config.unread_timeout_s, CancelReason.NOT_READ)
        elif job.state == "pending":
            self._start(job)
        else:
            window = job.policy.resume_window_s
            if window is not None:
                self._await_reader(job, max(window, RETURN_WINDOW_S), CancelReason.ABANDONED)
            self._run_handler(job)

    def _run_handler(self, job: Job) -> None:
        assert self._tasks is not None
        job.scope = anyio.CancelScope()
        self._running.add(job)
        if job.deadline is not None:
            left_s = max(0.0, job.deadline - self.clock.monotonic())
            job.deadline_timer = asyncio.get_running_loop().call_later(left_s, job.time_out)
        self._tasks.start_soon(self._execute, job, job.scope, name=f"job {job.id}")

    def _sweep(self) -> None:
        now = self.clock.monotonic()
        self.registry.sweep(now)
        unfollowed_s = self.firehose.unfollowed_s()
        for job in self._running.copy():
            if is_hop_job_id(job.id) and isinstance(job.operation, Infer | OpenAI) and not job.readers:
                since_start = now - (job.started or now)
                if min(unfollowed_s, since_start) > self._config.orphan_timeout_s:
                    job.cancel(CancelReason.OWNER_GONE)

    async def _execute(self, job: Job, scope: anyio.CancelScope) -> None:
        context = JobContext(job, self.clock)
        enter(context)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(job_id=job.id, correlation_id=job.correlation_id)
        try:
            with scope:
                await self._handle(job, context)
        finally:
            self._running.discard(job)
            job.scope = None
            for ended in self._ended:
                ended.set()
            log.info(
                "job_ended",
                operation=job.operation.name,
                state=job.state,
                code=job.end_code or None,
                first_output_s=_passed(job.started, job.spoke_at),
                duration_s=None if job.had_ended else _passed(job.created, job.finished),
            )

    async def _handle(self, job: Job, context: JobContext) -> None:
        handler = self._handlers[type(job.operation)]
        try:
            job.complete(await handler(job.operation, context))
        except asyncio.CancelledError as exc:
            if _is_being_cancelled():
                raise
            # Something that the handler awaited was cancelled; let through, it would end all jobs.
            self._fail(job, exc)
        except Exception as exc:
            self._fail(job, exc)

    def _fail(self, job: Job, exc: BaseException) -> None:
        while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
            exc = exc.exceptions[0]
        # What is wrong with an inference may quote the prompt.
        is_private = isinstance(job.operation, Infer | OpenAI)
        if isinstance(exc, DeadlineExceeded) and job.policy.timeout_s is not None:
            job.time_out()
            return
        if isinstance(exc, RbeeError):
            is_told = not is_private or exc.code in OWN_WORDS
            log.warning("job_failed", code=exc.code, details=exc.details if is_told else None)
            try:
                job.fail(exc)
            except UnicodeError as unsayable:
                exc = unsayable
            else:
                return
        if is_private:
            log.error("job_crashed", error=type(exc).__name__, frames=traceback.format_tb(exc.__traceback__))
        else:
            log.error("job_crashed", exc_info=exc)
        job.fail(
            RbeeError(
                f"{type(exc).__name__} in the {self.service}. This is a fault of rbee: "
                f"its log has the cause under correlation id {job.correlation_id}."
            )
        )


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return anyio.current_effective_deadline() == -math.inf or (task is not None and task.cancelling() > 0)


def _passed(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else round(end - begin, 3)


def _policy(submission: Submission) -> JobPolicy:
    operation = submission.operation
    limits = [
        operation.timeout_s if operation.timeout_s is not None else DEFAULT_TIMEOUTS_S.get(type(operation)),
        submission.time_left_s,
    ]
    known = [limit for limit in limits if limit is not None]
    resume_window_s = None
    if not submission.respond_async:
        match operation:
            case Infer():
                resume_window_s = operation.resume_window_s
            case OpenAI():
                resume_window_s = 0.0
    return JobPolicy(
        starts_at_once=submission.respond_async,
        resume_window_s=resume_window_s,
        timeout_s=min(known) if known else None,
    )
