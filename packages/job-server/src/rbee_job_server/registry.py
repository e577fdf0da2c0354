"""The table of jobs: who is in it, under which id and key, in which order, and for how long."""

from collections.abc import Iterator

from rbee_contracts.errors import Conflict, Gone, InvalidRequest, NotFound
from rbee_contracts.jobs import JobPage, JobState
from rbee_contracts.operations import Operation, operation_digest
from rbee_job_server.jobs import Job

LOG_RETENTION_S = 600.0
"""How long the log of a finished job can still be read."""

LOG_RETENTION_BYTES = 64 * 2**20
"""Bytes of finished logs kept per service; beyond it the oldest finished go first."""

RECORDS_KEPT = 10_000
"""Records of finished jobs kept; beyond it the oldest finished are forgotten."""

MAX_PAGE = 1000


def output_expired(job_id: str) -> Gone:
    return Gone(
        f"The output of {job_id} is no longer kept ({LOG_RETENTION_S:g} s after the end, "
        f"or less where much is said). Its record is at /v1/jobs/{job_id}.",
        code="output_expired",
        title="Output expired",
    )


def parse_cursor(cursor: str | None) -> int | None:
    """Read a `next_cursor` that came back.

    Raises:
        InvalidRequest: it is not one of ours.
    """
    if cursor is None:
        return None
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise InvalidRequest(f"cursor {cursor[:40]!r} is not a `next_cursor` of this list.")
    return int(cursor)


class JobRegistry:
    """Jobs by id, newest last. Only the job server adds; only `sweep` takes away."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._by_key: dict[str, Job] = {}
        self._next_seq = 1

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def start_seq(self, last_seq: int) -> None:
        """Go on counting after `last_seq`."""
        self._next_seq = max(self._next_seq, last_seq + 1)

    def take_seq(self) -> int:
        seq = self._next_seq
        self._next_seq += 1
        return seq

    def add(self, job: Job) -> None:
        self._jobs[job.id] = job
        if job.idempotency_key is not None:
            self._by_key[job.idempotency_key] = job

    def get(self, job_id: str) -> Job:
        """Give a job.

        Raises:
            NotFound: no job has this id, or it is forgotten.
        """
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFound(
                f"No job {job_id[:60]!r} here: it was never submitted to this service, or ended long ago.",
                code="job_not_found",
                title="Job not found",
            )
        return job

    def get_readable(self, job_id: str) -> Job:
        """Give a job whose log is kept.

        Raises:
            NotFound: no such job.
            Gone: its output is no longer kept.
        """
        job = self.get(job_id)
        if job.log is None:
            raise output_expired(job_id)
        return job

    def find_submitted(self, key: str, operation: Operation) -> Job | None:
        """Give the job that was submitted under this Idempotency-Key, if any.

        Raises:
            Conflict: the key belongs to another operation.
        """
        job = self._by_key.get(key)
        if job is not None and job.digest != operation_digest(operation):
            raise Conflict(
                f"Idempotency-Key {key!r} was used for another operation ({job.id}). "
                "Use a new key for new work.",
                code="idempotency_conflict",
            )
        return job

    def page(
        self, *, state: JobState | None, operation: str | None, limit: int, before_seq: int | None
    ) -> JobPage:
        """List up to `limit` records with a smaller seq than `before_seq`, newest first."""
        before = self._next_seq if before_seq is None else before_seq
        found: list[Job] = []
        for job in reversed(self._jobs.values()):
            if job.seq >= before:
                continue
            if (state is None or job.state == state) and (
                operation is None or job.operation.name == operation
            ):
                found.append(job)
                if len(found) > limit:
                    break
        more = len(found) > limit
        shown = found[:limit]
        return JobPage(jobs=[job.record() for job in shown], next_cursor=str(shown[-1].seq) if more else None)

    def sweep(self, now: float) -> None:
        """Drop finished logs and records that are past their bounds. `now` is monotonic."""
        finished = sorted(
            (job for job in self._jobs.values() if job.is_finished), key=lambda job: job.finished or 0
        )
        kept_bytes = sum(job.log.size for job in finished if job.log is not None)
        for job in finished:
            if job.log is None:
                continue
            too_old = now - (job.finished or 0) > LOG_RETENTION_S
            if (too_old or kept_bytes > LOG_RETENTION_BYTES) and not job.readers:
                kept_bytes -= job.log.size
                job.log = None
                job.said.clear()
        for job in finished[: max(0, len(finished) - RECORDS_KEPT)]:
            if job.readers:
                continue
            del self._jobs[job.id]
            if job.idempotency_key is not None:
                self._by_key.pop(job.idempotency_key, None)
