"""After a restart: what the store knows, as jobs and hives again."""

import datetime

import msgspec

from rbee_contracts.events import Usage
from rbee_contracts.jobs import JobError
from rbee_contracts.operations import AnyOperation
from rbee_contracts.sse import Position
from rbee_contracts.trace import parse_trace
from rbee_job_server import JobServer
from rbee_job_server.jobs import JobPolicy
from rbee_job_server.journal import RestoredJob, Said, Step
from rbee_job_server.registry import LOG_RETENTION_S
from rbee_queen.fleet import Fleet
from rbee_queen.store import JobStore, StoredJob

_operation_decoder: msgspec.json.Decoder[AnyOperation] = msgspec.json.Decoder(AnyOperation)


def restore(store: JobStore, server: JobServer, fleet: Fleet, now: datetime.datetime) -> int:
    """Give the job server and the fleet what the store knows; give how many jobs go on.

    Finished jobs come back for as long as their output may still lie below, so that it can be read again.
    """
    for hive in store.hives():
        fleet.restore(hive)
    server.registry.start_seq(store.last_seq())
    since = now - datetime.timedelta(seconds=LOG_RETENTION_S)
    finished = store.finished_since(since.strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
    unfinished = store.unfinished()
    for stored in sorted([*finished, *unfinished], key=lambda job: job.accepted.seq):
        server.restore(restored_job(stored, now))
    return len(unfinished)


def restored_job(stored: StoredJob, now: datetime.datetime) -> RestoredJob:
    """Make the job server's value of a stored job. A clock that went back makes no age negative."""
    accepted = stored.accepted
    since = stored.finished_at or stored.started_at
    age_s = 0.0 if since is None else (now - datetime.datetime.fromisoformat(since)).total_seconds()
    return RestoredJob(
        job_id=accepted.job_id,
        seq=accepted.seq,
        operation=_operation_decoder.decode(accepted.operation),
        digest=accepted.digest,
        correlation_id=accepted.correlation_id,
        idempotency_key=accepted.idempotency_key,
        policy=JobPolicy(
            starts_at_once=accepted.starts_at_once,
            resume_window_s=accepted.resume_window_s,
            timeout_s=accepted.timeout_s,
        ),
        state=stored.state,
        created_at=accepted.created_at,
        started_at=stored.started_at,
        finished_at=stored.finished_at,
        age_s=max(0.0, age_s),
        has_spoken=stored.has_spoken,
        error=None if stored.error is None else msgspec.json.decode(stored.error, type=JobError),
        usage=None if stored.usage is None else msgspec.json.decode(stored.usage, type=Usage),
        result=None if stored.result is None else msgspec.json.decode(stored.result),
        said=[Said(position=Position(e.n, e.i), body=e.body, lower_n=e.lower_n) for e in stored.events],
        steps=[
            Step(step=s.step, attempt=s.attempt, where=s.hive_id, lower_job_id=s.lower_job_id)
            for s in stored.steps
        ],
        trace=None if accepted.traceparent is None else parse_trace(accepted.traceparent),
    )
