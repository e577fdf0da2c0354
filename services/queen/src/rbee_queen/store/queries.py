"""What is read: jobs with all that belongs to them, and records as callers see them."""

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, func, select
from sqlalchemy.sql import ColumnElement

from rbee_contracts.events import Usage
from rbee_contracts.jobs import JobError, JobPage, JobRecord, JobState
from rbee_queen.store.payloads import join
from rbee_queen.store.records import JobAccepted, StoredEvent, StoredHive, StoredJob, StoredStep
from rbee_queen.store.schema import counters, events, hives, is_finished, is_unfinished, jobs, payloads, steps

LAST_SEQ = "last_seq"

_error = msgspec.json.Decoder(JobError)
_usage = msgspec.json.Decoder(Usage)
_record_columns = [
    column
    for column in jobs.c
    if column.name in {"seq", "error", "usage", "result"} or column.name in JobRecord.__struct_fields__
]
_record = select(*(c for c in _record_columns if c.name != "operation"), jobs.c.name)


def hives_by_id(connection: Connection) -> list[StoredHive]:
    rows = connection.execute(select(hives)).all()
    return sorted((StoredHive(**row._mapping) for row in rows), key=lambda hive: hive.hive_id)


def stored_jobs(connection: Connection, condition: ColumnElement[bool]) -> list[StoredJob]:
    """Give whole jobs, by seq."""
    # Not a join: SQLite would go through all events to find those of a few jobs.
    chosen = select(jobs.c.seq).where(condition)
    said: dict[int, list[StoredEvent]] = {}
    query = select(events).where(events.c.seq.in_(chosen)).order_by(events.c.seq, events.c.n)
    for row in connection.execute(query):
        event = StoredEvent(n=row.n, i=row.i, body=row.body, lower_n=row.lower_n)
        said.setdefault(row.seq, []).append(event)
    taken: dict[int, list[StoredStep]] = {}
    in_order = (steps.c.seq, steps.c.attempt, steps.c.step)
    for row in connection.execute(select(steps).where(steps.c.seq.in_(chosen)).order_by(*in_order)):
        step = StoredStep(
            step=row.step, attempt=row.attempt, hive_id=row.hive_id, lower_job_id=row.lower_job_id
        )
        taken.setdefault(row.seq, []).append(step)
    # Sorted here: asked for this order, SQLite would go through all jobs.
    found = select(jobs, payloads.c.body.label("payload")).join(payloads, isouter=True).where(condition)
    rows = sorted(connection.execute(found), key=lambda row: row.seq)
    return [_stored_job(row, said.get(row.seq, []), taken.get(row.seq, [])) for row in rows]


def oldest_within(connection: Connection, finished_at: str, max_bytes: int) -> tuple[str, int] | None:
    """Give the end and the seq of the job that ended first among the newest that fit into `max_bytes`.

    None where not one of those that ended at or after `finished_at` fits.
    """
    said = select(func.coalesce(func.sum(func.length(events.c.body)), 0)).where(events.c.seq == jobs.c.seq)
    size = said.scalar_subquery() + func.coalesce(func.length(jobs.c.result), 0)
    newest = (jobs.c.finished_at.desc(), jobs.c.seq.desc())
    query = select(jobs.c.finished_at, jobs.c.seq, size.label("size"))
    query = query.where(is_finished, jobs.c.finished_at >= finished_at).order_by(*newest)
    total, oldest = 0, None
    for row in connection.execute(query):
        total += row.size
        if total > max_bytes:
            break
        oldest = (row.finished_at, row.seq)
    return oldest


def highest_seq(connection: Connection) -> int:
    stored = connection.execute(select(func.max(jobs.c.seq))).scalar_one()
    forgotten = connection.execute(select(counters.c.value).where(counters.c.name == LAST_SEQ)).scalar()
    return max(stored or 0, forgotten or 0)


def record(connection: Connection, job_id: str) -> JobRecord | None:
    rows = connection.execute(_record.where(jobs.c.job_id == job_id)).all()
    found = _records(connection, rows)
    return found[0] if found else None


def page(
    connection: Connection,
    *,
    state: JobState | None,
    operation: str | None,
    limit: int,
    before_seq: int | None,
) -> JobPage:
    query = _record.order_by(jobs.c.seq.desc()).limit(limit + 1)
    if before_seq is not None:
        query = query.where(jobs.c.seq < before_seq)
    if operation is not None:
        query = query.where(jobs.c.name == operation)
    if state is not None:
        # The second condition lets the database use its index of the few that have not ended.
        has_ended = is_unfinished if state in {"pending", "running"} else is_finished
        query = query.where(jobs.c.state == state, has_ended)
    rows = connection.execute(query).all()
    shown = rows[:limit]
    cursor = str(shown[-1].seq) if shown and len(rows) > limit else None
    return JobPage(jobs=_records(connection, shown), next_cursor=cursor)


def _records(connection: Connection, rows: Sequence[Any]) -> list[JobRecord]:
    children: dict[int, list[str]] = {}
    wanted = [row.seq for row in rows]
    if wanted:
        query = select(steps.c.seq, steps.c.lower_job_id).where(steps.c.seq.in_(wanted))
        for seq, child in connection.execute(query.order_by(steps.c.seq, steps.c.attempt, steps.c.step)):
            children.setdefault(seq, []).append(child)
    return [
        JobRecord(
            job_id=row.job_id,
            operation=row.name,
            state=row.state,
            correlation_id=row.correlation_id,
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            model=row.model,
            error=None if row.error is None else _error.decode(row.error),
            usage=None if row.usage is None else _usage.decode(row.usage),
            result=None if row.result is None else msgspec.json.decode(row.result),
            children=children.get(row.seq, []),
        )
        for row in rows
    ]


def _stored_job(row: Any, said: list[StoredEvent], taken: list[StoredStep]) -> StoredJob:
    accepted = {name: getattr(row, name) for name in JobAccepted.__struct_fields__}
    return StoredJob(
        accepted=JobAccepted(**accepted | {"operation": join(row.operation, row.payload)}),
        state=row.state,
        started_at=row.started_at,
        has_spoken=row.has_spoken,
        finished_at=row.finished_at,
        error=row.error,
        usage=row.usage,
        result=row.result,
        events=said,
        steps=taken,
    )
