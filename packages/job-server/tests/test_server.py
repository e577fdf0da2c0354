"""The job server in counted time: who starts a job, who ends it, and when."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rbee_inprocess import PATIENCE_S, LoopClock, actions, eventually, frames_of, run_counted

from rbee_contracts.errors import (
    Conflict,
    InvalidRequest,
    NoCapacity,
    NotImplementedHere,
    RbeeError,
    Unavailable,
)
from rbee_contracts.events import Placement
from rbee_contracts.ids import hop_job_id, new_job_id, step_key
from rbee_contracts.operations import HiveList, Infer, OpenAI, Operation, Status, WorkerSpawn
from rbee_contracts.sse import START
from rbee_job_server import (
    JobContext,
    JobServer,
    JobServerConfig,
    Submission,
    current_job,
    narrate,
    registry,
)
from rbee_job_server.jobs import CancelReason, Job
from rbee_job_server.registry import LOG_RETENTION_S

HandlerOf: TypeAlias = Callable[[Any, JobContext], Awaitable[Any]]
UNREAD_S, WINDOW_S, TIMEOUT_S = 60.5, 5.25, 97.125
"""Chosen so that no two timers are ever due at the same time."""

INFER = Infer(model="m", prompt="p", resume_window_s=WINDOW_S)


@asynccontextmanager
async def serving(*handlers: HandlerOf, kinds: tuple[type[Operation], ...] = ()) -> AsyncIterator[JobServer]:
    """A job server whose every operation has the handler."""
    (handler,) = handlers
    taken = kinds or (Infer, OpenAI, Status, WorkerSpawn)
    server = JobServer(
        service="worker",
        actor="worker/w1",
        handlers=dict.fromkeys(taken, handler),
        config=JobServerConfig(unread_timeout_s=UNREAD_S),
        clock=LoopClock(),
    )
    async with anyio.create_task_group() as tasks:
        await tasks.start(server.run)
        yield server
        tasks.cancel_scope.cancel()


async def forever(_: Operation, __: JobContext) -> None:
    await anyio.sleep_forever()


def submit(server: JobServer, operation: Operation = INFER, **options: Any) -> Job:
    return server.submit(Submission(operation=operation, correlation_id="corr-1", **options))


def said(job: Job) -> list[str]:
    return actions(frames_of(job.reader(START).take()))


def state_of(job: Job) -> str:
    """The state; a call, so that mypy does not take it for unchanging."""
    return job.state


def keeps_log(job: Job) -> bool:
    return job.log is not None


def end_code(job: Job) -> Any:
    """The code of the terminal event."""
    return frames_of(job.reader(START).take())[-2].json.get("code")


async def settle() -> None:
    """Let everything run that can run now; no time passes."""
    for _ in range(10):
        await asyncio.sleep(0)


# --- readers come and go -------------------------------------------------------------------------------

steps = st.lists(
    st.sampled_from(["attach", "detach", "finish", "cancel"])
    | st.sampled_from(["attach", "detach"])
    | st.sampled_from([1, 4, 6, 30, 59, 90]),
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(steps=steps, kind=st.sampled_from(["infer", "openai", "status"]), asynchronous=st.booleans())
def test_any_coming_and_going_of_readers(steps: list[str | int], kind: str, asynchronous: bool) -> None:
    """Walks a job and a model of the rules side by side."""
    operation: Operation = {
        "infer": Infer(model="m", prompt="p", resume_window_s=WINDOW_S, timeout_s=TIMEOUT_S),
        "openai": OpenAI(endpoint="/v1/completions", body=msgspec.Raw(b"{}"), timeout_s=TIMEOUT_S),
        "status": Status(timeout_s=TIMEOUT_S),
    }[kind]
    window = None if asynchronous else {"infer": WINDOW_S, "openai": 0.0, "status": None}[kind]

    async def walk() -> None:
        finish = anyio.Event()

        async def until_told(_: Operation, __: JobContext) -> str:
            await finish.wait()
            return "result"

        async with serving(until_told) as server:
            now = asyncio.get_running_loop().time
            job = submit(server, operation, respond_async=asynchronous)
            state, readers, code = ("running" if asynchronous else "pending"), 0, None
            unread_at = None if asynchronous else now() + UNREAD_S
            timeout_at = now() + TIMEOUT_S if asynchronous else None
            abandon_at: float | None = None
            for step in steps:
                match step:
                    case "attach":
                        server.attach(job)
                        readers += 1
                        if state == "pending":
                            state, unread_at, timeout_at = "running", None, now() + TIMEOUT_S
                        abandon_at = None
                    case "detach" if readers:
                        server.detach(job)
                        readers -= 1
                        if not readers and window is not None:
                            abandon_at = now() + window
                    case "finish":
                        finish.set()
                        await settle()
                        if state == "running":
                            state = "completed"
                    case "cancel":
                        won = job.cancel(CancelReason.REQUESTED)
                        assert won is (state in ("pending", "running"))
                        if won:
                            state, code = "cancelled", "cancelled"
                    case int():
                        until = now() + step
                        await anyio.sleep(step)
                        due = [
                            (at, result)
                            for at, result in (
                                (unread_at, ("cancelled", "not_read")),
                                (abandon_at, ("cancelled", "abandoned")),
                                (timeout_at, ("failed", "timeout")),
                            )
                            if at is not None and at <= until
                        ]
                        if due and state in ("pending", "running"):
                            state, code = min(due)[1]
                if finish.is_set():
                    await settle()
                    if state == "running":
                        state = "completed"
                if abandon_at is not None and abandon_at <= now() and state == "running":
                    await settle()
                    state, code = "cancelled", "abandoned"
                assert job.state == state, step
                assert job.readers == readers
            await settle()
            if state == "completed":
                assert said(job) == ["execute", "execute_complete", "[DONE]"]
            elif state == "failed":
                assert said(job) == ["execute", "execute_timeout", "[DONE]"]
            elif state == "cancelled":
                ran = ["execute"] if job.started is not None else []
                assert said(job) == [*ran, "execute_cancelled", "[DONE]"]
            if code is not None:
                assert end_code(job) == code

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "LOG_RETENTION_S", 1e9)  # all that was said is looked at in the end
        run_counted(walk)


def test_a_job_never_read_is_cancelled_and_never_runs() -> None:
    async def walk() -> None:
        ran: list[str] = []

        async def handler(_: Operation, context: JobContext) -> None:
            ran.append(context.job_id)

        async with serving(handler) as server:
            job = submit(server)
            await anyio.sleep(UNREAD_S - 0.1)
            assert state_of(job) == "pending"
            await anyio.sleep(0.2)

            assert said(job) == ["execute_cancelled", "[DONE]"]
            assert end_code(job) == "not_read"
            server.attach(job)
            await settle()
            assert ran == []
            assert state_of(job) == "cancelled"

    run_counted(walk)


def test_a_job_goes_on_while_one_of_two_readers_stays() -> None:
    async def walk() -> None:
        async with serving(forever) as server:
            job = submit(server)
            server.attach(job)
            server.attach(job)
            server.detach(job)
            await anyio.sleep(WINDOW_S * 10)
            assert state_of(job) == "running"
            server.detach(job)
            await anyio.sleep(WINDOW_S - 1)
            assert state_of(job) == "running"
            server.attach(job)
            await anyio.sleep(WINDOW_S * 10)
            assert state_of(job) == "running"
            server.detach(job)
            await anyio.sleep(WINDOW_S + 1)
            assert end_code(job) == "abandoned"

    run_counted(walk)


def test_an_abandoned_handler_is_told_to_stop() -> None:
    async def walk() -> None:
        stopped: list[float] = []

        async def handler(_: Operation, __: JobContext) -> None:
            try:
                await anyio.sleep_forever()
            finally:
                stopped.append(asyncio.get_running_loop().time())

        async with serving(handler) as server:
            job = submit(server)
            server.attach(job)
            await anyio.sleep(10)
            server.detach(job)
            left = asyncio.get_running_loop().time()
            await anyio.sleep(WINDOW_S + 1)

            assert end_code(job) == "abandoned"
            assert stopped == [pytest.approx(left + WINDOW_S, abs=0.01)]

    run_counted(walk)


# --- limits of time ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "time_left_s", "limit"),
    [
        (Status(timeout_s=10), None, 10.0),
        (Status(), 20.0, 20.0),
        (Status(timeout_s=10), 20.0, 10.0),
        (Status(timeout_s=20), 10.0, 10.0),
        (WorkerSpawn(model="m"), None, 1800.0),
        (WorkerSpawn(model="m", timeout_s=3600), None, 3600.0),
    ],
)
def test_the_shortest_limit_ends_the_job(
    operation: Operation, time_left_s: float | None, limit: float
) -> None:
    async def walk() -> None:
        left: list[float | None] = []

        async def handler(_: Operation, context: JobContext) -> None:
            left.append(context.time_left_s)
            await anyio.sleep_forever()

        async with serving(handler) as server:
            job = submit(server, operation, respond_async=True, time_left_s=time_left_s)
            await anyio.sleep(limit - 0.5)
            assert state_of(job) == "running"
            await anyio.sleep(1)

            assert said(job) == ["execute", "execute_timeout", "[DONE]"]
            assert state_of(job) == "failed"
            assert job.record().error is not None
            assert left == [pytest.approx(limit, abs=0.01)]

    run_counted(walk)


def test_the_limit_counts_from_the_start_and_not_from_the_submit() -> None:
    async def walk() -> None:
        async with serving(forever) as server:
            job = submit(server, Status(timeout_s=10))
            await anyio.sleep(50)
            server.attach(job)
            await anyio.sleep(9)
            assert state_of(job) == "running"
            await anyio.sleep(2)
            assert said(job)[-2] == "execute_timeout"

    run_counted(walk)


def test_without_a_limit_a_job_may_take_days() -> None:
    async def walk() -> None:
        async with serving(forever) as server:
            job = submit(server, Status(), respond_async=True)
            await anyio.sleep(3600)
            assert state_of(job) == "running"

    run_counted(walk)


# --- how handlers end ----------------------------------------------------------------------------------


async def run_handler(handler: HandlerOf, operation: Operation = INFER) -> Job:
    async with serving(handler) as server:
        job = submit(server, operation, respond_async=True)
        await settle()
        assert job.is_finished
        other = submit(server, operation, respond_async=True)
        await settle()
        assert other.state == job.state, "the server takes no more jobs"
    return job


@pytest.mark.anyio
async def test_a_handlers_result_is_the_data_of_the_end() -> None:
    async def handler(_: Operation, __: JobContext) -> Placement:
        return Placement(hive_id="h", worker_id="w", port=9300)

    job = await run_handler(handler)

    assert frames_of(job.reader(START).take())[-2].json["data"] == {
        "hive_id": "h",
        "worker_id": "w",
        "port": 9300,
    }


@pytest.mark.anyio
async def test_an_error_of_ours_is_told_to_the_client() -> None:
    async def handler(_: Operation, __: JobContext) -> None:
        raise NoCapacity("No GPU is free.", code="no_gpu")

    job = await run_handler(handler)
    error, end, _ = frames_of(job.reader(START).take())[-3:]

    assert (error.action, error.json["code"], error.json["message"]) == ("error", "no_gpu", "No GPU is free.")
    assert error.json["retryable"] is True
    assert (end.action, end.json["code"]) == ("execute_error", "no_gpu")


async def crash(_: Operation, __: JobContext) -> None:
    password = "LOCAL-SECRET"
    raise ZeroDivisionError(f"SECRET in the message, {len(password)}")


async def cancel_itself(_: Operation, __: JobContext) -> None:
    raise asyncio.CancelledError


async def await_a_cancelled_future(_: Operation, __: JobContext) -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


async def crash_in_a_group(_: Operation, __: JobContext) -> None:
    async def child() -> None:
        raise ZeroDivisionError("SECRET")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child)


async def give_what_cannot_be_encoded(_: Operation, __: JobContext) -> object:
    return object()


async def give_a_lone_surrogate(_: Operation, __: JobContext) -> dict[str, str]:
    return {"SECRET": "\ud800"}


async def fail_with_a_lone_surrogate(_: Operation, __: JobContext) -> None:
    raise RbeeError("SECRET \ud800")


async def narrate_a_lone_surrogate(_: Operation, context: JobContext) -> None:
    context.narrate("said", "SECRET \ud800")


async def narrate_what_misfits(_: Operation, context: JobContext) -> None:
    context.narrate("infer_worker", "There.", SECRET=1)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "handler",
    [
        crash,
        cancel_itself,
        await_a_cancelled_future,
        crash_in_a_group,
        give_what_cannot_be_encoded,
        give_a_lone_surrogate,
        fail_with_a_lone_surrogate,
        narrate_a_lone_surrogate,
        narrate_what_misfits,
    ],
)
async def test_a_crash_ends_the_job_alone_and_tells_no_inside(handler: HandlerOf) -> None:
    job = await run_handler(handler)
    body = job.reader(START).take()
    error, end, _ = frames_of(body)[-3:]

    assert (error.action, error.json["code"]) == ("error", "internal_error")
    assert (end.action, end.json["code"]) == ("execute_error", "internal_error")
    assert "corr-1" in error.json["message"]
    for secret in (b"SECRET", b"Traceback", b".py", b"line "):
        assert secret not in body


@pytest.mark.anyio
async def test_an_error_raised_in_a_handlers_task_group_keeps_its_code() -> None:
    async def handler(_: Operation, __: JobContext) -> None:
        async def child() -> None:
            raise NoCapacity("No GPU is free.")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            tasks.start_soon(child)

    job = await run_handler(handler)

    assert end_code(job) == "no_capacity"


@pytest.mark.anyio
async def test_cancel_stops_the_handler_and_waits_for_nothing() -> None:
    cleaned = anyio.Event()

    async def handler(_: Operation, context: JobContext) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            context.narrate("said", "too late")
            cleaned.set()

    async with serving(handler) as server:
        job = submit(server, respond_async=True)
        await settle()

        assert job.cancel(CancelReason.REQUESTED)
        assert said(job) == ["execute", "execute_cancelled", "[DONE]"]
        with anyio.fail_after(PATIENCE_S):
            await cleaned.wait()
        assert not job.cancel(CancelReason.REQUESTED)
        assert said(job) == ["execute", "execute_cancelled", "[DONE]"]


@pytest.mark.anyio
async def test_a_handler_that_completes_against_its_cancellation_changes_nothing() -> None:
    async def handler(_: Operation, __: JobContext) -> str:
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep_forever()
        return "done all the same"

    async with serving(handler) as server:
        job = submit(server, respond_async=True)
        await settle()
        job.cancel(CancelReason.REQUESTED)
        await settle()

        assert said(job) == ["execute", "execute_cancelled", "[DONE]"]
        assert job.record().result is None


@pytest.mark.anyio
async def test_a_job_cancelled_before_its_handler_ran_stays_cancelled() -> None:
    async with serving(crash) as server:
        job = submit(server, respond_async=True)
        job.cancel(CancelReason.REQUESTED)
        await settle()

        assert said(job) == ["execute", "execute_cancelled", "[DONE]"]


# --- narrate -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_narrate_finds_its_job_from_nested_calls_and_child_tasks() -> None:
    async def deep(text: str) -> None:
        await asyncio.sleep(0)
        narrate("said", text, number=len(text))

    async def handler(operation: Infer, _: JobContext) -> None:
        await deep(f"{operation.prompt} nested")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(deep, f"{operation.prompt} child")
        await asyncio.gather(deep(f"{operation.prompt} gathered"))
        await anyio.to_thread.run_sync(lambda: current_job().job_id)

    async with serving(handler) as server:
        jobs = [submit(server, Infer(model="m", prompt=name), respond_async=True) for name in ("a", "b", "c")]
        for job in jobs:
            await eventually(lambda job=job: job.is_finished, "the job ended")  # type: ignore[misc]

    for job, name in zip(jobs, ("a", "b", "c"), strict=True):
        frames = [frame.json for frame in frames_of(job.reader(START).take())[1:-2]]
        assert [frame["message"] for frame in frames] == [
            f"{name} nested",
            f"{name} child",
            f"{name} gathered",
        ]
        assert {frame["job_id"] for frame in frames} == {job.id}
        assert frames[0]["data"] == {"number": len(f"{name} nested")}


@pytest.mark.anyio
async def test_narrate_outside_a_job_is_an_error_and_leaks_from_none() -> None:
    await run_handler(forever_not)

    with pytest.raises(LookupError):
        narrate("said", "to nobody")


async def forever_not(_: Operation, __: JobContext) -> None:
    narrate("said", "to somebody")


# --- submitting ----------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_key_gives_one_job_and_another_operation_is_a_conflict() -> None:
    async with serving(forever) as server:
        first = submit(server, idempotency_key="k")

        assert submit(server, idempotency_key="k") is first
        assert (
            submit(server, Infer(prompt="p", model="m", resume_window_s=WINDOW_S), idempotency_key="k")
            is first
        )
        with pytest.raises(Conflict):
            submit(server, Status(), idempotency_key="k")
        assert submit(server, idempotency_key="other") is not first
        assert submit(server) is not first
        assert len(server.registry) == 3


@pytest.mark.anyio
async def test_a_hops_key_gives_the_id_that_the_hop_knows() -> None:
    async with serving(forever) as server:
        key = step_key(new_job_id(), "infer")

        assert submit(server, idempotency_key=key).id == hop_job_id("worker", key)
        assert submit(server, idempotency_key="of a user").id != hop_job_id("worker", "of a user")


@pytest.mark.anyio
async def test_an_operation_without_a_handler_leaves_no_job() -> None:
    async with serving(forever, kinds=(Infer,)) as server:
        with pytest.raises(NotImplementedHere):
            submit(server, HiveList())
        assert len(server.registry) == 0


@pytest.mark.anyio
async def test_what_admit_raises_leaves_no_job() -> None:
    def admit(_: Operation) -> None:
        raise InvalidRequest("Not here.")

    server = JobServer(service="worker", actor="w", handlers={Status: forever}, admit=admit)
    async with anyio.create_task_group() as tasks:
        await tasks.start(server.run)
        with pytest.raises(InvalidRequest):
            submit(server, Status())
        tasks.cancel_scope.cancel()
    assert len(server.registry) == 0


@pytest.mark.anyio
async def test_a_server_that_does_not_run_yet_takes_no_job() -> None:
    server = JobServer(service="worker", actor="w", handlers={Status: forever})

    for respond_async in (True, False):
        with pytest.raises(Unavailable):
            submit(server, Status(), respond_async=respond_async)
    assert len(server.registry) == 0


@pytest.mark.anyio
async def test_a_stopping_server_takes_no_new_job_but_tells_of_known_ones() -> None:
    async with serving(forever) as server:
        known = submit(server, idempotency_key="k")
        server.stopping = True

        assert submit(server, idempotency_key="k") is known
        with pytest.raises(Unavailable) as caught:
            submit(server)
        assert (caught.value.code, caught.value.retryable) == ("shutting_down", True)


@pytest.mark.anyio
async def test_ending_all_ends_pending_and_running_jobs_once() -> None:
    async with serving(forever) as server:
        pending, running = submit(server), submit(server, respond_async=True)
        await settle()
        await server.end_all(Unavailable("Stopping.", code="shutting_down"))

        assert said(pending) == ["error", "execute_error", "[DONE]"]
        assert said(running) == ["execute", "error", "execute_error", "[DONE]"]
        assert end_code(running) == "shutting_down"


def test_draining_waits_for_what_runs_and_no_longer_than_told() -> None:
    async def walk() -> None:
        now = asyncio.get_running_loop().time

        async def handler(_: Operation, __: JobContext) -> None:
            await anyio.sleep(7)

        async with serving(handler) as server:
            submit(server)
            job = submit(server, respond_async=True)
            begun = now()
            await server.drain(3)
            assert now() == pytest.approx(begun + 3, abs=0.01)
            assert state_of(job) == "running"
            await server.drain(30)
            assert now() == pytest.approx(begun + 7, abs=0.01)
            assert state_of(job) == "completed"

    run_counted(walk)


def test_draining_waits_for_no_operation_but_inference() -> None:
    async def walk() -> None:
        now = asyncio.get_running_loop().time
        async with serving(forever) as server:
            job = submit(server, WorkerSpawn(model="m"), respond_async=True)
            begun = now()
            await server.drain(30)
            assert now() == begun
            assert state_of(job) == "running"

    run_counted(walk)


# --- forgetting ----------------------------------------------------------------------------------------


def test_a_finished_log_is_kept_ten_minutes_and_longer_while_it_is_read() -> None:
    async def walk() -> None:
        async with serving(forever_not) as server:
            read, unread = (
                submit(server, Status(), respond_async=True),
                submit(server, Status(), respond_async=True),
            )
            server.attach(read)
            await anyio.sleep(LOG_RETENTION_S - 2)
            assert keeps_log(unread)
            await anyio.sleep(4)

            assert not keeps_log(unread)
            assert keeps_log(read)
            assert state_of(unread) == "completed"
            server.detach(read)
            await anyio.sleep(2)
            assert not keeps_log(read)
            assert len(server.registry) == 2

    run_counted(walk)


@pytest.mark.anyio
async def test_a_finished_job_keeps_nothing_that_only_a_running_one_needs() -> None:
    async def handler(_: Operation, context: JobContext) -> None:
        context.emit_token("x")

    async with serving(handler) as server:
        job = submit(server, Status(timeout_s=9), respond_async=True)
        await eventually(lambda: job.scope is None and job.is_finished, "it has ended")

        assert (job.timer, job.deadline_timer, job._staging, job._said_before) == (None,) * 4
        assert job._token_fields == b""
        assert not hasattr(job, "__dict__")


@pytest.mark.anyio
async def test_finished_logs_are_bounded_in_bytes_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "LOG_RETENTION_BYTES", 250_000)

    async def handler(_: Operation, context: JobContext) -> None:
        context.emit_token("x" * 100_000)

    async with serving(handler) as server:
        jobs = []
        for _ in range(4):
            jobs.append(submit(server, respond_async=True))
            await settle()
        server.registry.sweep(server.clock.monotonic())

        assert [job.log is not None for job in jobs] == [False, False, True, True]


@pytest.mark.anyio
async def test_records_are_bounded_and_their_keys_go_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "RECORDS_KEPT", 2)
    async with serving(forever_not) as server:
        jobs = []
        for number in range(4):
            jobs.append(submit(server, Status(), respond_async=True, idempotency_key=f"k{number}"))
            await settle()
        pending = submit(server, Status())
        server.registry.sweep(server.clock.monotonic())

        assert list(server.registry) == [*jobs[2:], pending]
        assert submit(server, Status(), idempotency_key="k0") is not jobs[0]
        assert submit(server, Status(), idempotency_key="k3") is jobs[3]
