"""The journal on the store: what is recorded close together is one commit, made off the loop."""

import asyncio
import datetime
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import NoReturn, TypeVar

import anyio
import anyio.to_thread
import msgspec
import structlog

from rbee_contracts.jobs import JobPage, JobRecord, JobState
from rbee_contracts.operations import encode_operation
from rbee_contracts.sse import Position
from rbee_job_server import ServiceFailed
from rbee_job_server.jobs import Job
from rbee_job_server.journal import Step
from rbee_queen.metrics.measures import StoreMeasures
from rbee_queen.store import (
    FirstOutput,
    HiveForgotten,
    HiveSeen,
    JobAccepted,
    JobEnded,
    JobStarted,
    JobStore,
    Narrated,
    Record,
    StepTaken,
    StoreFailed,
    StoreState,
)

log = structlog.get_logger(__name__)

T = TypeVar("T")

FORGET_EVERY_S = 60.0
FIRST_FORGET_S = 30.0

LINGER_S = 0.005
"""How long a record may wait for others to be committed with it, while nothing urgent waits for it: what is
told about a job (placed, taken by a worker, answered) comes in pieces that are this close together."""


class StoreJournal:
    """Writes to the store in the order of the calls. `run` must be running.

    Args:
        keep_s: seconds after their end for which jobs stay in the history.
        keep_jobs: how many ended jobs stay in it at most.
        linger_s: how many seconds a record waits for others, while nothing urgent waits for it.
    """

    def __init__(self, store: JobStore, *, keep_s: float, keep_jobs: int, linger_s: float = LINGER_S) -> None:
        self._store = store
        self._keep_s = keep_s
        self._keep_jobs = keep_jobs
        self._linger_s = linger_s
        self._records: list[Record] = []
        self._callbacks: list[Callable[[], None]] = []
        self._wake = anyio.Event()
        self._linger: asyncio.TimerHandle | None = None
        self._in_use = anyio.Lock()
        self._is_writing = False
        self.measures = StoreMeasures()

    @property
    def backlog(self) -> int:
        """Records that wait for the next commit."""
        return len(self._records)

    async def run(self) -> NoReturn:
        """Write what is recorded, for ever.

        Raises:
            ServiceFailed: the store cannot be written; nothing after that would be durable.
        """
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            self._end_linger()
            records, self._records = self._records, []
            callbacks, self._callbacks = self._callbacks, []
            self._is_writing = True
            begun = perf_counter()
            try:
                await self._use(self._store.write, records)
            except StoreFailed as exc:
                raise ServiceFailed(f"the store cannot be written: {exc}") from exc
            finally:
                self._is_writing = False
            if records:
                self.measures.committed(len(records), perf_counter() - begun)
            for callback in callbacks:
                callback()

    async def forget(self) -> NoReturn:
        """Delete what is older than the history keeps, now and then, for ever."""
        await anyio.sleep(FIRST_FORGET_S)
        while True:
            before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=self._keep_s)
            forget = partial(self._store.forget, finished_before=_timestamp(before), keep=self._keep_jobs)
            try:
                while await self._use(forget):
                    pass
            except StoreFailed as exc:
                log.warning("history_not_pruned", reason=str(exc))
            await anyio.sleep(FORGET_EVERY_S)

    # --- the Journal of the job server -----------------------------------------------------------------

    def accepted(self, job: Job) -> None:
        policy = job.policy
        self._record(
            JobAccepted(
                job_id=job.id,
                seq=job.seq,
                name=job.operation.name,
                operation=encode_operation(job.operation),
                digest=job.digest,
                model=getattr(job.operation, "model", None),
                correlation_id=job.correlation_id,
                idempotency_key=job.idempotency_key,
                starts_at_once=policy.starts_at_once,
                resume_window_s=policy.resume_window_s,
                timeout_s=policy.timeout_s,
                created_at=job.created_at,
                traceparent=None if job.caller_trace is None else job.caller_trace.traceparent,
            )
        )

    def started(self, job: Job) -> None:
        self._record(JobStarted(job_id=job.id, started_at=job.started_at or job.created_at))

    def narrated(self, job: Job, position: Position, body: bytes, lower_n: int | None) -> None:
        n, i = position
        self._record(Narrated(job_id=job.id, n=n, i=i, body=body, lower_n=lower_n))

    def stepped(self, job: Job, step: Step) -> None:
        self._record(
            StepTaken(
                job_id=job.id,
                step=step.step,
                attempt=step.attempt,
                hive_id=step.where,
                lower_job_id=step.lower_job_id,
            )
        )

    def speaks(self, job: Job) -> None:
        self._record(FirstOutput(job_id=job.id))

    def ended(self, job: Job, position: Position, body: bytes) -> None:
        n, i = position
        self._record(
            JobEnded(
                job_id=job.id,
                state=job.state,
                finished_at=job.finished_at or job.created_at,
                n=n,
                i=i,
                body=body,
                error=_json(job.error),
                usage=_json(job.usage),
                result=_json(job.result),
            )
        )

    def then(self, callback: Callable[[], None], *, urgent: bool = True) -> None:
        if not self._records and not self._is_writing:
            callback()
            return
        self._callbacks.append(callback)
        if urgent:
            self._wake.set()
        else:
            self._wake_soon()

    async def flushed(self) -> None:
        done = anyio.Event()
        self.then(done.set)
        await done.wait()

    async def find(self, job_id: str) -> JobRecord | None:
        return await self._use(self._store.get, job_id)

    async def page(
        self, *, state: JobState | None, operation: str | None, limit: int, before_seq: int | None
    ) -> JobPage:
        page = partial(self._store.page, state=state, operation=operation, limit=limit, before_seq=before_seq)
        return await self._use(page)

    async def check(self) -> StoreState:
        """Write something and give what the database is.

        Raises:
            StoreFailed: it cannot be used.
        """
        return await self._use(self._store.check)

    # --- the fleet's part ------------------------------------------------------------------------------

    def hive_seen(self, hive_id: str, url: str, boot: str) -> None:
        self._record(HiveSeen(hive_id=hive_id, url=url, boot=boot))

    def hive_forgotten(self, hive_id: str) -> None:
        self._record(HiveForgotten(hive_id=hive_id))

    def _record(self, record: Record) -> None:
        self._records.append(record)
        self._wake_soon()

    def _wake_soon(self) -> None:
        if self._linger is None:
            self._linger = asyncio.get_running_loop().call_later(self._linger_s, self._lingered)

    def _lingered(self) -> None:
        self._linger = None
        self._wake.set()

    def _end_linger(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None

    async def _use(self, function: Callable[..., T], *args: object) -> T:
        """Use the store off the loop, one use at a time. A write that has begun is never left half-known."""
        async with self._in_use:
            return await anyio.to_thread.run_sync(function, *args)


def _json(value: object) -> bytes | None:
    return None if value is None else msgspec.json.encode(value)


def _timestamp(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
