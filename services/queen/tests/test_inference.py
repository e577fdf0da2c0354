"""A request whose place is lost before it spoke is tried once elsewhere; after that never (F01, F02)."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest
from rbee_inprocess import Frame, actions, eventually, running

from rbee_contracts.errors import RbeeError, Unavailable
from rbee_contracts.nodes import HiveHeartbeat, WorkerInfo
from rbee_contracts.operations import Infer, Operation
from rbee_job_server import JobContext, JobServer, LowerJobFailed, Submission
from rbee_job_server.journal import Step
from rbee_queen import inference as inference_module
from rbee_queen.fleet import Fleet
from rbee_queen.inference import Inference
from rbee_queen.journal import StoreJournal
from rbee_queen.recovery import restored_job
from rbee_queen.retry import Budget
from rbee_queen.store import StoredHive
from rbee_queen.store.testing import MemoryStore

Outcome = Callable[[JobContext], Any]


def lost(code: str = "worker_lost", *, actor: str = "hive/a") -> Outcome:
    def fail(_: JobContext) -> Any:
        failure = LowerJobFailed("It was ended by signal 9.", code=code)
        failure.actor = actor
        raise failure

    return fail


def hive_lost(_: JobContext) -> Any:
    raise Unavailable("Hive a has been silent.", code="hive_lost")


def lost_after_a_token(context: JobContext) -> Any:
    context.emit_token("Hello")
    return lost()(context)


def answer(context: JobContext) -> Any:
    context.emit_token("Hello")
    return {"ok": True}


class Lines:
    """Stands in for the lines to all hives: what each (hive, worker) does, and what was asked of it."""

    def __init__(self, outcomes: dict[str, Outcome]) -> None:
        self.outcomes = outcomes
        self.asked: list[tuple[str, str, int, str | None]] = []

    def to(self, hive_id: str) -> "Line":
        return Line(self, hive_id)


class Line:
    def __init__(self, lines: Lines, hive_id: str) -> None:
        self._lines = lines
        self._hive_id = hive_id

    async def perform(self, context: JobContext, operation: Operation, *, step: str, attempt: int) -> Any:
        assert isinstance(operation, Infer)
        assert operation.hive_id == self._hive_id
        self._lines.asked.append((self._hive_id, step, attempt, operation.worker_id))
        taken = Step(step=step, attempt=attempt, where=self._hive_id, lower_job_id=f"lower-{attempt}")
        if context.job.find_step(step, attempt) is None:
            await context.job.take_step(taken)
        return self._lines.outcomes[f"{self._hive_id}/{operation.worker_id}"](context)


def worker(worker_id: str) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        model="m",
        state="ready",
        pid=1,
        port=9300,
        worker="cpu",
        devices=[0],
        running=0,
        waiting=0,
        kv_cache_usage=0.0,
        started_at="t",
    )


def fleet_of(lines: Lines) -> Fleet:
    """A fleet with the hives and workers that `lines` have an outcome for."""
    fleet = Fleet(lambda: 0.0)
    having: dict[str, list[str]] = {}
    for place in lines.outcomes:
        hive_id, worker_id = place.split("/")
        having.setdefault(hive_id, []).append(worker_id)
    for hive_id, worker_ids in having.items():
        fleet.restore(StoredHive(hive_id=hive_id, url="http://127.0.0.1:1", boot="b"))
        hive = fleet.get(hive_id)
        hive.relay = lines.to(hive_id)  # type: ignore[assignment]
        fleet._take(
            hive,
            HiveHeartbeat(
                hive_id=hive_id,
                boot="b",
                version="1",
                timestamp="t",
                devices=[],
                workers=[worker(worker_id) for worker_id in worker_ids],
                models=[],
            ),
        )
    return fleet


async def stream_of(lines: Lines, **fields: Any) -> list[Frame]:
    """Run one request and give its stream."""
    inference = Inference(fleet_of(lines), lambda: 0.0)
    async with running({Infer: inference.run}, service="queen", actor="queen") as queen:
        asked = {"operation": "infer", "model": "m", "prompt": "p"} | fields
        return await queen.read(await queen.submit(asked))


async def test_a_worker_lost_before_it_spoke_is_replaced_by_another_one() -> None:
    """F02: one `execute` and one `infer_start`; the second attempt has a key of its own."""
    lines = Lines({"a/w1": lost(), "a/w2": answer})
    frames = await stream_of(lines)

    assert actions(frames) == [
        "execute",
        "infer_start",
        "infer_schedule",
        "infer_retry",
        "infer_schedule",
        "token",
        "execute_complete",
        "[DONE]",
    ]
    assert lines.asked == [("a", "infer", 0, "w1"), ("a", "infer", 1, "w2")]
    assert frames[3].json["data"] == {
        "from": {"hive_id": "a", "worker_id": "w1"},
        "to": {"hive_id": "a", "worker_id": "w2"},
        "cause": "worker_lost",
    }
    assert "failed before it said anything" in frames[3].json["message"]


@pytest.mark.parametrize("how", [hive_lost, lost("shutting_down")], ids=["silent", "stopping"])
async def test_when_the_hive_is_lost_no_other_worker_of_it_is_tried(how: Outcome) -> None:
    lines = Lines({"a/w1": how, "a/w2": answer, "b/w3": answer})
    frames = await stream_of(lines)

    assert lines.asked == [("a", "infer", 0, "w1"), ("b", "infer", 1, "w3")]
    assert actions(frames)[-2:] == ["execute_complete", "[DONE]"]


async def test_a_worker_that_stops_is_not_its_hive() -> None:
    lines = Lines({"a/w1": lost("shutting_down", actor="worker/w1"), "a/w2": answer})
    await stream_of(lines)

    assert [worker_id for *_, worker_id in lines.asked] == ["w1", "w2"]


async def test_what_has_spoken_is_never_tried_again() -> None:
    """F01."""
    lines = Lines({"a/w1": lost_after_a_token, "a/w2": answer})
    frames = await stream_of(lines)

    assert len(lines.asked) == 1
    assert actions(frames)[-3:] == ["error", "execute_error", "[DONE]"]
    assert (frames[-3].json["code"], frames[-3].json["retryable"]) == ("worker_lost", False)


async def test_a_job_that_has_spoken_changes_nothing_about_the_failure_that_others_share() -> None:
    """A hive that is lost fails all its jobs with one error."""
    failure = Unavailable("Hive a has been silent.", code="hive_lost")

    def fail(context: JobContext) -> Any:
        context.emit_token("Hello")
        raise failure

    frames = await stream_of(Lines({"a/w1": fail}))

    assert (frames[-3].json["code"], frames[-3].json["retryable"]) == ("hive_lost", False)
    assert frames[-3].json["message"] == "Hive a has been silent."
    assert failure.retryable is True


async def test_a_failure_of_the_requests_own_is_not_tried_again() -> None:
    lines = Lines({"a/w1": lost("context_length_exceeded"), "a/w2": answer})
    frames = await stream_of(lines)

    assert len(lines.asked) == 1
    assert frames[-3].json["code"] == "context_length_exceeded"


async def test_without_another_worker_the_error_says_so_and_that_it_may_be_sent_again() -> None:
    frames = await stream_of(Lines({"a/w1": lost()}))

    error = frames[-3].json
    assert (error["action"], error["code"], error["retryable"]) == ("error", "worker_lost", True)
    assert error["message"] == "It was ended by signal 9. No other worker can take it."
    assert error["actor"] == "hive/a"
    assert "infer_retry" not in actions(frames)


async def test_a_pinned_request_goes_nowhere_else() -> None:
    lines = Lines({"a/w1": lost(), "a/w2": answer})
    frames = await stream_of(lines, worker_id="w1")

    assert len(lines.asked) == 1
    assert "w2 on a not worker w1, to which the request is pinned" in frames[-3].json["message"]


async def test_it_is_tried_once_more_and_not_twice() -> None:
    lines = Lines({"a/w1": lost(), "a/w2": lost(), "a/w3": answer})
    frames = await stream_of(lines)

    assert len(lines.asked) == 2
    error = frames[-3].json
    assert (error["code"], error["retryable"]) == ("worker_lost", True)
    assert "It had failed on w1 of hive a before." in error["message"]


async def test_a_storm_of_retries_ends_at_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """F30."""
    monkeypatch.setattr(inference_module, "Budget", lambda at: Budget(left=0.5, at=at))
    lines = Lines({"a/w1": lost(), "a/w2": answer})
    frames = await stream_of(lines)

    assert len(lines.asked) == 1
    assert "Too many requests are being tried again just now" in frames[-3].json["message"]
    assert frames[-3].json["retryable"] is True


@pytest.mark.parametrize(
    ("outcomes", "counted"),
    [
        ({"a/w1": answer}, {"decisions placed": 1}),
        ({"a/w1": lost(), "a/w2": answer}, {"decisions placed": 2, "retries worker_lost": 1}),
        ({"a/w1": lost_after_a_token}, {"decisions placed": 1, "refused spoken": 1}),
        ({"a/w1": lost()}, {"decisions placed": 1, "decisions no_worker": 1, "refused no_worker": 1}),
        (
            {"a/w1": lost(), "a/w2": lost()},
            {"decisions placed": 2, "retries worker_lost": 1, "refused attempts": 1},
        ),
    ],
    ids=["answers", "elsewhere", "spoke", "alone", "twice"],
)
async def test_what_becomes_of_a_request_is_counted(
    outcomes: dict[str, Outcome], counted: dict[str, int]
) -> None:
    inference = Inference(fleet_of(Lines(outcomes)), lambda: 0.0)
    async with running({Infer: inference.run}, service="queen", actor="queen") as queen:
        await queen.read(await queen.submit({"operation": "infer", "model": "m", "prompt": "p"}))
    found = {
        " ".join((family.name.rpartition("_")[2], *sample.labels.values())): sample.value
        for family in inference.measures.collect()
        for sample in family.samples
        if sample.value and sample.name.endswith("_total")
    }
    (waits,) = (
        sample.value
        for family in inference.measures.collect()
        for sample in family.samples
        if sample.name == "rbee_schedule_wait_seconds_count"
    )

    assert (found, waits) == (counted, 1)


async def test_a_request_counts_on_its_worker_for_as_long_as_it_runs() -> None:
    counted = {}

    def look(context: JobContext) -> Any:
        counted.update(fleet.get("a").assigned)
        return answer(context)

    lines = Lines({"a/w1": look})
    fleet = fleet_of(lines)
    async with running({Infer: Inference(fleet, lambda: 0.0).run}, service="queen", actor="queen") as queen:
        await queen.read(await queen.submit({"operation": "infer", "model": "m", "prompt": "p"}))

    assert counted == {"w1": 1}
    assert fleet.get("a").assigned == {}


async def live(
    store: MemoryStore, lines: Lines, *, kill_at: Callable[[], bool] | None, job_ids: list[str]
) -> list[str]:
    """One life of a queen on a store, to the end of the job or until it is killed; gives the actions."""
    journal = StoreJournal(store, keep_s=1e6, keep_jobs=10)
    inference = Inference(fleet_of(lines), lambda: 0.0)
    server = JobServer(service="queen", actor="queen", handlers={Infer: inference.run}, journal=journal)
    server.registry.start_seq(store.last_seq())
    for stored in store.unfinished():
        server.restore(restored_job(stored, datetime.now(UTC)))
    said: list[str] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(journal.run)
        await tasks.start(server.run)
        if not job_ids:
            operation = Infer(model="m", prompt="p")
            job_ids.append(
                server.submit(Submission(operation=operation, correlation_id="c", respond_async=True)).id
            )
        job = server.registry.get(job_ids[0])
        await eventually(lambda: job.is_finished or (kill_at and kill_at()), "it has ended, or is killed", 45)
        await journal.flushed()
        assert job.log is not None
        if job.is_finished:
            reader = server.attach(job)
            said = [line.split('"')[3] for line in reader.take().decode().splitlines() if '"action"' in line]
        tasks.cancel_scope.cancel()
    return said


async def test_a_queen_that_is_killed_between_two_attempts_goes_on_with_the_second() -> None:
    """The first is not run again, and nothing is told twice."""
    store = MemoryStore()
    job_ids: list[str] = []
    store.open()

    def wait(_: JobContext) -> Any:
        raise Unavailable("wait", code="waits")  # not reached in the first life

    first = Lines({"a/w1": lost(), "a/w2": wait})
    hangs = anyio.Event()

    async def hang(self: Line, context: JobContext, operation: Operation, *, step: str, attempt: int) -> Any:
        if attempt == 1:
            await context.job.take_step(Step(step=step, attempt=1, where="a", lower_job_id="lower-1"))
            hangs.set()
            await anyio.sleep_forever()
        return await Line.perform(self, context, operation, step=step, attempt=attempt)

    class Hanging(Line):
        perform = hang

    first.to = lambda hive_id: Hanging(first, hive_id)  # type: ignore[method-assign]
    await live(store, first, kill_at=hangs.is_set, job_ids=job_ids)
    second = Lines({"a/w1": answer, "a/w2": answer})
    said = await live(store, second, kill_at=None, job_ids=job_ids)

    assert second.asked == [("a", "infer", 1, "w2")]
    assert said == [
        "execute",
        "infer_start",
        "infer_schedule",
        "infer_retry",
        "infer_schedule",
        "token",
        "execute_complete",
    ]


async def test_a_request_that_comes_right_after_a_start_waits_until_the_hives_are_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """F05: a queen that was restarted does not say that nothing runs before she has listened."""
    monkeypatch.setattr(inference_module, "SETTLE_S", 3600.0)
    lines = Lines({"a/w1": answer})
    heard = fleet_of(lines)
    beat = heard.get("a").heartbeat
    assert beat is not None
    fleet = Fleet(lambda: 0.0)
    fleet.restore(StoredHive(hive_id="a", url="http://127.0.0.1:1", boot="b"))
    fleet.get("a").relay = heard.get("a").relay
    inference = Inference(fleet, lambda: 0.0)
    async with running({Infer: inference.run}, service="queen", actor="queen") as queen:
        job_id = await queen.submit(
            {"operation": "infer", "model": "m", "prompt": "p"}, Prefer="respond-async"
        )
        job = queen.server.registry.get(job_id)
        await eventually(lambda: job.state == "running", "it waits")
        await anyio.wait_all_tasks_blocked()
        assert not job.is_finished
        fleet._take(fleet.get("a"), beat)
        frames = await queen.read(job_id)

    assert actions(frames)[-2:] == ["execute_complete", "[DONE]"]


async def test_an_unknown_failure_passes_through() -> None:
    def fail(_: JobContext) -> Any:
        raise RbeeError("Odd.", code="odd")

    frames = await stream_of(Lines({"a/w1": fail, "a/w2": answer}))

    assert frames[-3].json["code"] == "odd"
