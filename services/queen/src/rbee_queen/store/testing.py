"""A store in memory, for tests of what stands on the store."""

from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from rbee_contracts.events import Usage
from rbee_contracts.jobs import JobError, JobPage, JobRecord, JobState
from rbee_queen.store.base import FORGET_AT_ONCE, RESTORED_BYTES, StoreFailed, StoreState
from rbee_queen.store.payloads import split
from rbee_queen.store.records import (
    FirstOutput,
    HiveForgotten,
    HiveSeen,
    JobAccepted,
    JobEnded,
    JobStarted,
    Narrated,
    Record,
    StepTaken,
    StoredEvent,
    StoredHive,
    StoredJob,
    StoredStep,
)
from rbee_queen.store.schema import REVISION


class MemoryStore:
    """A `JobStore` that lasts as long as the object; closed and opened again, it is a restarted queen's.

    `failure`, once set, is what every use ends with.
    """

    def __init__(self, *, store_payloads: bool = False) -> None:
        self.failure: StoreFailed | None = None
        self._store_payloads = store_payloads
        self._is_open = False
        self._jobs: dict[str, StoredJob] = {}
        self._hives: dict[str, StoredHive] = {}
        self._last_seq = 0

    def open(self) -> None:
        self._is_open = True
        self._use()

    def write(self, records: Sequence[Record]) -> None:
        self._use()
        before = dict(self._jobs), dict(self._hives)
        try:
            for record in records:
                self._write(record)
        except StoreFailed:
            self._jobs, self._hives = before
            raise
        self._last_seq = max([self._last_seq, *(job.accepted.seq for job in self._jobs.values())])

    def hives(self) -> list[StoredHive]:
        self._use()
        return [self._hives[hive_id] for hive_id in sorted(self._hives)]

    def unfinished(self) -> list[StoredJob]:
        return [job for job in self._by_seq() if job.finished_at is None]

    def finished_since(self, finished_at: str, *, max_bytes: int = RESTORED_BYTES) -> list[StoredJob]:
        ended = [
            (job.finished_at, job.accepted.seq, job)
            for job in self._by_seq()
            if job.finished_at is not None and job.finished_at >= finished_at
        ]
        found = []
        for *_, job in sorted(ended, key=lambda each: each[:2], reverse=True):
            max_bytes -= sum(len(event.body) for event in job.events) + len(job.result or b"")
            if max_bytes < 0:
                break
            found.append(job)
        return sorted(found, key=lambda job: job.accepted.seq)

    def last_seq(self) -> int:
        self._use()
        return self._last_seq

    def get(self, job_id: str) -> JobRecord | None:
        self._use()
        job = self._jobs.get(job_id)
        return None if job is None else _record(job)

    def page(
        self, *, state: JobState | None, operation: str | None, limit: int, before_seq: int | None
    ) -> JobPage:
        found = [
            job
            for job in reversed(self._by_seq())
            if (state is None or job.state == state)
            and (operation is None or job.accepted.name == operation)
            and (before_seq is None or job.accepted.seq < before_seq)
        ]
        cursor = str(found[limit - 1].accepted.seq) if 0 < limit < len(found) else None
        return JobPage(jobs=[_record(job) for job in found[:limit]], next_cursor=cursor)

    def forget(self, *, finished_before: str, keep: int) -> int:
        ended = [(job.finished_at, job.accepted.seq, job) for job in self._by_seq() if job.finished_at]
        ended.sort(key=lambda each: each[:2])
        past = [
            job
            for place, (finished_at, _, job) in enumerate(ended)
            if finished_at < finished_before or place < len(ended) - keep
        ][:FORGET_AT_ONCE]
        for job in past:
            del self._jobs[job.accepted.job_id]
        return len(past)

    def check(self) -> StoreState:
        self._use()
        return StoreState(kind="memory", version="1", revision=REVISION, newest=REVISION, folder=None)

    def close(self) -> None:
        self._is_open = False

    def _use(self) -> None:
        if self.failure is not None:
            raise self.failure
        if not self._is_open:
            raise StoreFailed("the database is not open.")

    def _by_seq(self) -> list[StoredJob]:
        self._use()
        return sorted(self._jobs.values(), key=lambda job: job.accepted.seq)

    def _write(self, record: Record) -> None:
        if isinstance(record, HiveSeen):
            hive = StoredHive(hive_id=record.hive_id, url=record.url, boot=record.boot)
            self._hives[record.hive_id] = hive
            return
        if isinstance(record, HiveForgotten):
            self._hives.pop(record.hive_id, None)
            return
        job = self._jobs.get(record.job_id)
        if job is None and isinstance(record, JobAccepted):
            self._jobs[record.job_id] = self._accept(record)
        elif job is not None and job.finished_at is None:
            self._jobs[record.job_id] = _changed(job, record, self._store_payloads)

    def _accept(self, record: JobAccepted) -> StoredJob:
        if any(job.accepted.seq == record.seq for job in self._jobs.values()):
            raise StoreFailed(f"two jobs have the seq {record.seq}.")
        if record.idempotency_key is None:
            record = replace(record, digest=b"")
        return StoredJob(
            accepted=record,
            state="pending",
            started_at=None,
            has_spoken=False,
            finished_at=None,
            error=None,
            usage=None,
            result=None,
            events=[],
            steps=[],
        )


def _changed(job: StoredJob, record: Record, store_payloads: bool) -> StoredJob:
    match record:
        case JobStarted() if job.started_at is None:
            return replace(job, state="running", started_at=record.started_at)
        case Narrated():
            return replace(job, events=_with_event(job, record, record.lower_n))
        case StepTaken():
            step = StoredStep(
                step=record.step,
                attempt=record.attempt,
                hive_id=record.hive_id,
                lower_job_id=record.lower_job_id,
            )
            if any((s.attempt, s.step) == (step.attempt, step.step) for s in job.steps):
                return job
            return replace(job, steps=sorted([*job.steps, step], key=lambda s: (s.attempt, s.step)))
        case FirstOutput():
            return replace(job, has_spoken=True)
        case JobEnded():
            accepted = job.accepted
            if not store_payloads:
                accepted = replace(accepted, operation=split(accepted.operation)[0])
            return replace(
                job,
                accepted=accepted,
                state=record.state,
                finished_at=record.finished_at,
                error=record.error,
                usage=record.usage,
                result=record.result,
                events=_with_event(job, record, None),
            )
        case _:
            return job


def _with_event(job: StoredJob, record: Narrated | JobEnded, lower_n: int | None) -> list[StoredEvent]:
    if any(event.n == record.n for event in job.events):
        return job.events
    event = StoredEvent(n=record.n, i=record.i, body=record.body, lower_n=lower_n)
    return sorted([*job.events, event], key=lambda each: each.n)


def _record(job: StoredJob) -> JobRecord:
    accepted = job.accepted
    return JobRecord(
        job_id=accepted.job_id,
        operation=accepted.name,
        state=job.state,
        correlation_id=accepted.correlation_id,
        created_at=accepted.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        model=accepted.model,
        error=None if job.error is None else msgspec.json.decode(job.error, type=JobError),
        usage=None if job.usage is None else msgspec.json.decode(job.usage, type=Usage),
        result=None if job.result is None else msgspec.json.decode(job.result),
        children=[step.lower_job_id for step in job.steps],
    )
