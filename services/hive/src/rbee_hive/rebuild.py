"""After a restart: the hive's jobs again, made from the jobs of the workers that it has adopted.

A hop names the job below after its own (`step_key`), so a worker's job tells which job of the hive it was
run for. What that job had said itself is known too: it is always the same. It is said again, marked as
repeated; the rest is read from the worker anew. So every event has the id that it had, and who follows
goes on.
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import datetime
from typing import Any

import anyio
import msgspec
import structlog

from rbee_contracts.errors import RbeeError
from rbee_contracts.events import Execute, InferStart, InferWorker, Narrated, Placement, encode_event
from rbee_contracts.ids import is_hop_job_id, parse_step_key
from rbee_contracts.jobs import JobRecord
from rbee_contracts.operations import Infer, OpenAI, Operation
from rbee_contracts.sse import Position
from rbee_hive.supervisor.worker import Running, Worker
from rbee_job_server import JobServer
from rbee_job_server.jobs import JobPolicy
from rbee_job_server.journal import RestoredJob, Said, Step
from rbee_job_server.tracing import trace_above

log = structlog.get_logger(__name__)

STEP = "infer"
"""The one step of an inference at the hive."""

PAGE = 500
ASK_LIMIT_S = 5.0
"""For all of a worker's jobs. A worker that is stuck does not keep the hive from starting."""

RETURN_WINDOW_S = 60.0
"""How long a job that a caller had sent to this hive itself waits for its reader to come back."""


async def rebuild(server: JobServer, workers: Iterable[Worker], hive_id: str, now: datetime) -> int:
    """Give the job server the jobs that ran on adopted workers, or ended lately; before its `run`.

    Returns:
        How many there were.
    """
    found: list[tuple[JobRecord, Worker]] = []

    async def ask(worker: Worker, running: Running) -> None:
        with anyio.move_on_after(ASK_LIMIT_S) as limit:
            try:
                found.extend([(record, worker) async for record in _jobs(running)])
            except RbeeError as exc:
                log.warning("worker_jobs_not_read", worker_id=worker.id, reason=exc.details)
        if limit.cancelled_caught:
            log.warning("worker_jobs_not_read", worker_id=worker.id, reason=f"silent for {ASK_LIMIT_S:g} s")

    async with anyio.create_task_group() as tasks:
        for worker in workers:
            if worker.running is not None:
                tasks.start_soon(ask, worker, worker.running)
    restored = 0
    # What runs comes before what has ended, so that of a job that two workers know the running one is taken.
    for record, worker in sorted(
        found, key=lambda pair: (pair[0].finished_at is not None, pair[0].created_at)
    ):
        job = restored_job(record, worker, hive_id, server.registry.take_seq(), now)
        if job is not None and job.job_id not in server.registry:
            server.restore(job)
            restored += 1
    return restored


async def _jobs(running: Running) -> AsyncIterator[JobRecord]:
    cursor: str | None = None
    while True:
        page = await running.client.list_jobs(limit=PAGE, cursor=cursor)
        for record in page.jobs:
            yield record
        cursor = page.next_cursor
        if cursor is None:
            return


def restored_job(
    record: JobRecord, worker: Worker, hive_id: str, seq: int, now: datetime
) -> RestoredJob | None:
    """Make the hive's job of a worker's; None where that is of no hive, or cannot be read again.

    It counts as having spoken: it is only read, and never run again.
    """
    root = None if record.idempotency_key is None else parse_step_key(record.idempotency_key)
    operation = _operation(record)
    if root is None or operation is None or record.digest is None or record.position is None:
        return None
    job_id, step, attempt = root
    since = record.started_at or record.created_at
    age_s = max(0.0, (now - datetime.fromisoformat(since)).total_seconds())
    is_of_a_queen = is_hop_job_id(job_id)
    return RestoredJob(
        job_id=job_id,
        seq=seq,
        operation=operation,
        digest=bytes.fromhex(record.digest),
        correlation_id=record.correlation_id,
        idempotency_key=None,
        policy=JobPolicy(
            starts_at_once=True,
            resume_window_s=None if is_of_a_queen else RETURN_WINDOW_S,
            timeout_s=None if record.time_left_s is None else age_s + record.time_left_s,
        ),
        state="running",
        created_at=record.created_at,
        started_at=since,
        finished_at=None,
        age_s=age_s,
        has_spoken=True,
        error=None,
        usage=None,
        result=None,
        said=list(_said(record, job_id, operation, worker, hive_id)),
        steps=[Step(step=step, attempt=attempt, where=worker.id, lower_job_id=record.job_id)],
        trace=trace_above(record.traceparent, job_id) if is_of_a_queen else None,
        had_ended=record.finished_at is not None,
    )


def _operation(record: JobRecord) -> Operation | None:
    """Make an operation that stands for the one that was asked: what it asked is not told, and not needed."""
    match record.operation:
        case "infer" if record.model is not None:
            return Infer(model=record.model, prompt="")
        case "openai":
            return OpenAI(endpoint="/v1/unknown", body=msgspec.Raw(b"{}"), model=record.model)
        case _:
            return None


def _said(
    record: JobRecord, job_id: str, operation: Operation, worker: Worker, hive_id: str
) -> Iterator[Said]:
    """What the hive itself says of an inference, in its order: before any of the worker's events."""
    model = record.model
    texts: list[tuple[type[Narrated], str, dict[str, Any]]] = [
        (Execute, f"Executing {operation.name}.", {}),
        (InferStart, f"Inference on {model} has started.", {}),
        (
            InferWorker,
            f"Running on {worker.id}.",
            {"data": Placement(hive_id=hive_id, worker_id=worker.id, port=worker.port)},
        ),
    ]
    actor = f"hive/{hive_id}"
    for n, (kind, message, fields) in enumerate(texts, 1):
        event = kind(
            message=message,
            actor=actor,
            job_id=job_id,
            correlation_id=record.correlation_id,
            timestamp=record.created_at,
            repeated=True,
            formatted=f"[{actor}] {message}",
            **fields,
        )
        yield Said(position=Position(n, 0), body=encode_event(event), lower_n=None)
