"""A hop that lost its memory makes its jobs again from the jobs below, by what those tell."""

import hashlib
from typing import Any

import anyio
import pytest
from rbee_inprocess import LoopClock, run_counted

from rbee_contracts.errors import Conflict
from rbee_contracts.events import Execute, InferStart, decode_event, encode_event
from rbee_contracts.ids import hop_job_id, is_hop_job_id, new_job_id, parse_step_key, step_key
from rbee_contracts.operations import Infer, encode_operation, operation_digest
from rbee_contracts.sse import START, Position
from rbee_job_server import JobContext, JobServer, Submission
from rbee_job_server.jobs import Job, JobPolicy
from rbee_job_server.journal import RestoredJob, Said, Step

OWNER = "job-00000000-0000-4000-8000-000000000000"
KEY = step_key(OWNER, "infer", 1)
JOB_ID = hop_job_id("hive", KEY)
OPERATION = Infer(model="m", prompt="a secret")


def submission(key: str | None, operation: Infer = OPERATION, time_left_s: float | None = None) -> Submission:
    return Submission(
        operation=operation,
        correlation_id="c",
        respond_async=True,
        idempotency_key=key,
        time_left_s=time_left_s,
    )


def said() -> list[Said]:
    """What the run before had said itself."""
    common: dict[str, Any] = {
        "actor": "hive/h",
        "job_id": JOB_ID,
        "correlation_id": "c",
        "timestamp": "t",
        "repeated": True,
    }
    events = [
        Execute(message="Executing infer.", formatted="", **common),
        InferStart(message="It has started.", formatted="", **common),
    ]
    return [
        Said(position=Position(n, 0), body=encode_event(event), lower_n=None)
        for n, event in enumerate(events, 1)
    ]


def restored(
    job_id: str = JOB_ID, timeout_s: float | None = None, window_s: float | None = None
) -> RestoredJob:
    return RestoredJob(
        job_id=job_id,
        seq=1,
        operation=Infer(model="m", prompt=""),
        digest=operation_digest(OPERATION),
        correlation_id="c",
        idempotency_key=None,
        policy=JobPolicy(starts_at_once=True, resume_window_s=window_s, timeout_s=timeout_s),
        state="running",
        created_at="t",
        started_at="t",
        finished_at=None,
        age_s=10.0,
        has_spoken=True,
        error=None,
        usage=None,
        result=None,
        said=said(),
        steps=[Step(step="infer", attempt=0, where="w1", lower_job_id=new_job_id())],
    )


async def speak(_: Infer, context: JobContext) -> str:
    context.narrate("infer_start", "It has started.")
    assert context.job.find_step("infer", 0)
    for text in ("one", "two"):
        context.emit_token(text)
    context.narrate("infer_complete_soon", "Nearly.")
    return "done"


async def endless(_: Infer, __: JobContext) -> None:
    await anyio.sleep_forever()


def lines(job: Job) -> list[tuple[str, str, bool]]:
    """The id, the action and whether it is repeated, of all that a job has said."""
    frames = job.reader(START).take().decode().split("\n\n")
    found = []
    for frame in frames:
        fields = dict(line.split(": ", 1) for line in frame.splitlines() if ": " in line)
        if "id" in fields and fields["data"] != "[DONE]":
            event = decode_event(fields["data"])
            found.append((fields["id"], event.action, event.repeated))
    return found


def test_a_hops_job_tells_what_the_hop_needs_to_know_it_again() -> None:
    async def main() -> None:
        server = JobServer(service="hive", actor="hive/h", handlers={Infer: endless}, clock=LoopClock())
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.run)
            record = server.submit(submission(KEY, time_left_s=30.0)).record()
            users = server.submit(submission("a-users-key")).record()
            await anyio.sleep(10)
            later = server.registry.get(record.job_id).record()
            tasks.cancel_scope.cancel()

        assert record.idempotency_key == KEY
        assert record.digest == hashlib.sha256(encode_operation(OPERATION)).hexdigest()
        assert record.time_left_s == pytest.approx(30)
        assert later.time_left_s == pytest.approx(20)
        assert (users.idempotency_key, users.digest, users.time_left_s) == (None, None, None)
        assert parse_step_key(KEY) == (OWNER, "infer", 1)
        assert parse_step_key("a-users-key") is None
        assert is_hop_job_id(record.job_id)
        assert not is_hop_job_id(users.job_id)

    run_counted(main)


def test_a_job_made_again_says_the_same_under_the_same_ids() -> None:
    async def main() -> None:
        server = JobServer(service="hive", actor="hive/h", handlers={Infer: speak}, clock=LoopClock())
        server.restore(restored())
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.run)
            await anyio.sleep(1)
            job = server.registry.get(JOB_ID)
            tasks.cancel_scope.cancel()

        assert lines(job) == [
            ("1-0", "execute", True),
            ("2-0", "infer_start", True),
            ("2-1", "token", False),
            ("2-2", "token", False),
            ("3-2", "infer_complete_soon", False),
            ("4-2", "execute_complete", False),
        ]

    run_counted(main)


def test_a_job_made_again_is_found_by_the_key_it_was_sent_under() -> None:
    async def main() -> None:
        server = JobServer(service="hive", actor="hive/h", handlers={Infer: endless}, clock=LoopClock())
        server.restore(restored())
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.run)
            job = server.submit(submission(KEY))
            assert job.id == JOB_ID
            assert job.record().idempotency_key == KEY
            with pytest.raises(Conflict):
                server.submit(submission(KEY, Infer(model="m", prompt="another")))
            assert len(server.registry) == 1
            tasks.cancel_scope.cancel()

    run_counted(main)


def test_a_job_made_again_is_cancelled_when_its_hop_stays_away() -> None:
    async def main() -> None:
        server = JobServer(service="hive", actor="hive/h", handlers={Infer: endless}, clock=LoopClock())
        server.restore(restored())
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.run)
            await anyio.sleep(50)
            assert server.registry.get(JOB_ID).state == "running"
            await anyio.sleep(15)
            assert server.registry.get(JOB_ID).state == "cancelled"
            tasks.cancel_scope.cancel()

    run_counted(main)


def test_the_time_that_was_left_is_what_is_left() -> None:
    async def main() -> None:
        server = JobServer(service="hive", actor="hive/h", handlers={Infer: endless}, clock=LoopClock())
        server.restore(restored(timeout_s=25.0))
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.run)
            await anyio.sleep(14)
            assert server.registry.get(JOB_ID).state == "running"
            await anyio.sleep(2)
            record = server.registry.get(JOB_ID).record()
            tasks.cancel_scope.cancel()

        assert record.error is not None
        assert record.error.code == "timeout"

    run_counted(main)


def test_a_service_that_leaves_lets_go_of_its_jobs_without_ending_them() -> None:
    async def main() -> None:
        server = JobServer(service="hive", actor="hive/h", handlers={Infer: endless}, clock=LoopClock())
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.run)
            job = server.submit(submission(KEY))
            server.keeps_jobs = True
            assert server.is_durable, "its stop would end its jobs"
            await server.leave()
            assert job.state == "running"
            assert [action for _, action, _ in lines(job)] == ["execute"]
            tasks.cancel_scope.cancel()

    run_counted(main)
