"""The table of jobs: who is in it, under which id and key, in which order, and for how long."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from rbee_contracts.errors import Conflict, Gone, InvalidRequest, NotFound
from rbee_contracts.jobs import JobPage, JobState
from rbee_contracts.operations import Operation, operation_digest
from rbee_job_server.jobs import Job

LOG_RETENTION_S = 600.0
"""How long the log of a finished job can still be read."""

LOG_RETENTION_BYTES = 64 * 2**20
"""Bytes of finished logs kept per service; beyond it the oldest finished go first."""

RESULT_RETENTION_BYTES = 64 * 2**20
"""Bytes of the results that records keep, per service; beyond it the oldest finished go first."""

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
    """Jobs by id, newest last. Only the job server adds; only `sweep` takes away.

    Args:
        on_ended: called once for each job that has ended, by the next `sweep`.
    """

    def __init__(self, on_ended: Callable[[Job], None] = lambda _: None) -> None:
        self._on_ended = on_ended
        self._jobs: dict[str, Job] = {}
        self._by_key: dict[str, Job] = {}
        self._next_seq = 1
        self._unfinished: dict[str, Job] = {}
        """What had not ended when `sweep` last looked."""
        self._finished: deque[Job] = deque()
        self._logs: deque[Job] = deque()
        """Finished jobs whose log is kept; both in the order in which they ended."""
        self._log_bytes = 0
        self._results: OrderedDict[str, Job] = OrderedDict()
        """Finished jobs whose result is kept, in the order in which they ended."""
        self._result_bytes = 0

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
        self._jobs[job.id] = self._unfinished[job.id] = job
        if job.idempotency_key is not None:
            self._by_key[job.idempotency_key] = job

    def unfinished(self) -> list[Job]:
        """Give the jobs that have not ended."""
        return [job for job in self._unfinished.values() if not job.is_finished]

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

    def find_submitted(self, key: str, operation: Operation, hop_id: str | None = None) -> Job | None:
        """Give the job that was submitted under this Idempotency-Key, if any.

        Args:
            hop_id: the id that a job of this key has, where a hop has made the key: a job that was restored
                without its key is found by it, and has its key again.

        Raises:
            Conflict: the key belongs to another operation.
        """
        job = self._by_key.get(key)
        if job is None and hop_id is not None and (job := self._jobs.get(hop_id)) is not None:
            job.idempotency_key = key
            self._by_key[key] = job
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

    def keep_log(self, job: Job) -> None:
        """Keep the log of a finished job that was made again, as long as any other."""
        if job.log is not None and job.id not in self._unfinished:
            self._logs.appendleft(job)  # such a job ended in the run before: it is the oldest
            self._log_bytes += job.log.size

    def sweep(self, now: float) -> None:
        """Drop finished logs, results and records that are past their bounds. `now` is monotonic.

        What costs time is what has changed: jobs that have ended since the last time, and what is dropped.
        """
        self._take_ended()
        read: list[Job] = []
        while self._logs and (
            self._log_bytes > LOG_RETENTION_BYTES or now - (self._logs[0].finished or 0) > LOG_RETENTION_S
        ):
            job = self._logs.popleft()
            if job.readers:
                read.append(job)
            else:
                self._drop_log(job)
        self._logs.extendleft(reversed(read))
        read.clear()
        while self._result_bytes > RESULT_RETENTION_BYTES:
            self._drop_result(next(iter(self._results.values())))
        for _ in range(len(self._finished) - RECORDS_KEPT):
            job = self._finished.popleft()
            if job.readers:
                read.append(job)
                continue
            self._drop_log(job)
            self._drop_result(job)
            del self._jobs[job.id]
            if job.idempotency_key is not None:
                self._by_key.pop(job.idempotency_key, None)
        self._finished.extendleft(reversed(read))

    def _take_ended(self) -> None:
        ended = [job for job in self._unfinished.values() if job.is_finished]
        ended.sort(key=lambda job: job.finished or 0)
        for job in ended:
            del self._unfinished[job.id]
            self._finished.append(job)
            self._on_ended(job)
            if job.log is not None:
                self._logs.append(job)
                self._log_bytes += job.log.size
            if job.result is not None:
                self._results[job.id] = job
                self._result_bytes += len(job.result)

    def _drop_result(self, job: Job) -> None:
        if self._results.pop(job.id, None) is not None and job.result is not None:
            self._result_bytes -= len(job.result)
            job.result = None

    def _drop_log(self, job: Job) -> None:
        if job.log is not None:
            self._log_bytes -= job.log.size
            job.log = None
        job.said = None
