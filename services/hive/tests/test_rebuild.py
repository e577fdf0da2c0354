"""A worker's job tells which job of the hive it was run for: what is made of it, and what is not."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rbee_contracts.events import InferWorker, decode_event
from rbee_contracts.ids import hop_job_id, new_job_id, step_key
from rbee_contracts.jobs import JobPage, JobRecord
from rbee_contracts.operations import Infer, OpenAI
from rbee_contracts.sse import Position
from rbee_contracts.trace import TraceContext
from rbee_hive.rebuild import RETURN_WINDOW_S, rebuild, restored_job
from rbee_hive.supervisor.machine import Life
from rbee_hive.supervisor.worker import Spec, Worker
from rbee_job_server import JobServer
from rbee_job_server.journal import RestoredJob
from rbee_job_server.tracing import attempt_name, span_id

HIVE_JOB = hop_job_id("hive", step_key(new_job_id(), "infer"))
DIGEST = "ab" * 32
NOW = datetime(2026, 11, 22, 12, 0, 30, tzinfo=UTC)


def record(root: str = HIVE_JOB, **fields: Any) -> JobRecord:
    key = step_key(root, "infer")
    values: dict[str, Any] = {
        "job_id": hop_job_id("worker", key),
        "operation": "infer",
        "state": "running",
        "correlation_id": "c",
        "created_at": "2026-11-22T12:00:00.000000Z",
        "started_at": "2026-11-22T12:00:10.000000Z",
        "model": "m",
        "position": "2-7",
        "idempotency_key": key,
        "digest": DIGEST,
    }
    return msgspec.convert(values | fields, JobRecord)


def made(record: JobRecord) -> RestoredJob | None:
    worker = Worker("w1", Spec("m", "cpu", (0,)), Life(), Path("w1.log"))
    worker.port = 9301
    return restored_job(record, worker, "box1", 5, NOW)


def test_the_hives_job_has_its_id_its_step_and_what_it_had_said() -> None:
    job = made(record())

    assert job is not None
    assert (job.job_id, job.seq, job.state, job.has_spoken) == (HIVE_JOB, 5, "running", True)
    assert job.digest == bytes.fromhex(DIGEST)
    (step,) = job.steps
    assert (step.step, step.attempt, step.where) == ("infer", 0, "w1")
    assert step.lower_job_id == record().job_id
    assert [said.position for said in job.said] == [Position(1, 0), Position(2, 0), Position(3, 0)]
    events = [decode_event(said.body) for said in job.said]
    assert [event.action for event in events] == ["execute", "infer_start", "infer_worker"]
    assert {(event.actor, event.job_id, event.repeated) for event in events} == {
        ("hive/box1", HIVE_JOB, True)
    }
    placed = events[2]
    assert isinstance(placed, InferWorker)
    assert (placed.data.worker_id, placed.data.port) == ("w1", 9301)


def test_a_job_that_has_ended_below_is_told_from_one_that_runs() -> None:
    """The hive before has counted it; read again only now, it would seem to have taken until now."""
    ended = made(record(state="completed", finished_at="2026-11-22T12:00:20Z"))
    running = made(record())

    assert ended is not None
    assert running is not None
    assert (ended.had_ended, running.had_ended) == (True, False)


def test_its_trace_goes_on_below_the_queens_attempt() -> None:
    job = made(record(traceparent=f"00-{'a' * 32}-{'b' * 16}-01"))

    assert job is not None
    parent = span_id(attempt_name(HIVE_JOB))
    assert job.trace == TraceContext(f"00-{'a' * 32}-{parent:016x}-01")
    untraced = made(record())
    assert untraced is not None
    assert untraced.trace is None


def test_its_time_goes_on_from_where_it_was() -> None:
    job = made(record(time_left_s=40.0))

    assert job is not None
    assert job.age_s == 20
    assert job.policy.timeout_s == 60
    unlimited = made(record())
    assert unlimited is not None
    assert unlimited.policy.timeout_s is None


def test_who_sent_it_decides_whether_it_waits_for_a_reader() -> None:
    of_a_queen, of_a_caller = made(record()), made(record(new_job_id()))

    assert of_a_queen is not None
    assert of_a_caller is not None
    assert of_a_queen.policy.resume_window_s is None
    assert of_a_caller.policy.resume_window_s == RETURN_WINDOW_S


@pytest.mark.parametrize(("operation", "kind"), [("infer", Infer), ("openai", OpenAI)])
def test_an_operation_stands_for_the_one_that_was_asked(operation: str, kind: type) -> None:
    job = made(record(operation=operation))

    assert job is not None
    assert isinstance(job.operation, kind)
    assert job.operation.name == operation


@pytest.mark.parametrize(
    "fields",
    [
        {"idempotency_key": None},
        {"idempotency_key": "a-users-key"},
        {"digest": None},
        {"position": None},
        {"operation": "status"},
        {"model": None},
    ],
    ids=lambda fields: next(iter(fields)) + "-" + str(next(iter(fields.values()))),
)
def test_what_is_no_hives_job_or_cannot_be_read_is_left(fields: dict[str, Any]) -> None:
    assert made(record(**fields)) is None


class Listed:
    """A worker's process that tells one job."""

    def __init__(self, job: JobRecord) -> None:
        self.client = self
        self.job = job

    async def list_jobs(self, **_: object) -> JobPage:
        return JobPage(jobs=[self.job], next_cursor=None)


async def test_a_job_that_two_workers_know_is_made_once_of_the_one_that_runs() -> None:
    """It was sent to another while the first was too stuck to tell of it; the hive restarted again."""
    server = JobServer(service="hive", actor="hive/box1", handlers={})
    workers = []
    for number, fields in enumerate([{"state": "completed", "finished_at": "2026-11-22T12:00:20Z"}, {}]):
        workers.append(Worker(f"w{number}", Spec("m", "cpu", (0,)), Life(), Path("w.log")))
        workers[-1].running = Listed(record(**fields))  # type: ignore[assignment]

    assert await rebuild(server, workers, "box1", NOW) == 1
    (job,) = server.registry
    assert [step.where for step in job.steps] == ["w1"]
    assert len(server._restored) == 1
