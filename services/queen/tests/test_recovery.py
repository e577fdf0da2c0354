"""A queen that is killed at any moment, however often, loses and doubles nothing (design §6.1 to 6.4)."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch

import anyio
from anyio.abc import TaskGroup
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct

from rbee_contracts.errors import RbeeError
from rbee_contracts.events import AnyEvent, decode_event
from rbee_contracts.jobs import JobAccepted, JobRecord
from rbee_contracts.operations import Infer, Operation
from rbee_contracts.sse import START, Position, parse_event_id
from rbee_contracts.trace import TraceContext
from rbee_job_client.frames import FirehoseParser
from rbee_job_server import JobContext, JobServer, Relay, Submission
from rbee_queen.journal import StoreJournal
from rbee_queen.recovery import restored_job
from rbee_queen.store.testing import MemoryStore


class Plan(Struct, frozen=True):
    """What the job below does: narrates before some tokens, says tokens, completes or fails."""

    tokens: int
    narrates_before: frozenset[int]
    fails: bool


class LocalHive:
    """The hop below, in this process and without a wire; it outlives every queen."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.runs = 0
        self.server = JobServer(service="hive", actor="hive/h1", handlers={Infer: self._infer})

    async def _infer(self, _: Infer, context: JobContext) -> dict[str, int]:
        self.runs += 1
        for index in range(self.plan.tokens):
            if index in self.plan.narrates_before:
                context.narrate("thinking", f"about {index}")
            context.emit_token(f"t{index} ")
            await asyncio.sleep(0)
        if self.plan.fails:
            raise RbeeError("It broke.", code="broken")
        return {"tokens": self.plan.tokens}

    async def submit(
        self,
        operation: Operation,
        *,
        correlation_id: str | None = None,
        respond_async: bool = False,
        idempotency_key: str | None = None,
        time_left_s: float | None = None,
        trace: TraceContext | None = None,
    ) -> JobAccepted:
        await asyncio.sleep(0)
        job = self.server.submit(
            Submission(
                operation=operation,
                correlation_id=correlation_id or "",
                respond_async=respond_async,
                idempotency_key=idempotency_key,
                time_left_s=time_left_s,
            )
        )
        await asyncio.sleep(0)
        return JobAccepted(job_id=job.id, sse_url="")

    async def cancel(self, job_id: str, *, correlation_id: str | None = None) -> bool:
        raise AssertionError(f"a queen that is killed cancelled {job_id}")

    async def get(self, job_id: str) -> JobRecord:
        await asyncio.sleep(0)
        return await self.server.find(job_id)

    async def follow_raw(
        self, *, on_connection: Callable[[bool], None] | None = None
    ) -> AsyncIterator[list[AnyEvent | bytes]]:
        await asyncio.sleep(0)
        follower, parser = self.server.firehose.follow(None, output=True), FirehoseParser()
        try:
            parser.feed_raw(follower.take())
            if on_connection is not None:
                on_connection(True)
            while True:
                await follower.wait()
                yield parser.feed_raw(follower.take())
        finally:
            follower.close()

    async def stream_from(
        self, job_id: str, position: Position
    ) -> AsyncGenerator[tuple[Position, AnyEvent], None]:
        job = await self.server.readable(job_id)
        reader = self.server.attach(job, position)
        try:
            while not reader.finished:
                await reader.wait()
                for found in frames(reader.take()):
                    await asyncio.sleep(0)
                    yield found
        finally:
            self.server.detach(job)


def frames(data: bytes) -> list[tuple[Position, AnyEvent]]:
    found = []
    for frame in data.split(b"\n\n"):
        lines = frame.split(b"\n")
        if len(lines) == 2:
            found.append((parse_event_id(lines[0][4:].decode()), decode_event(lines[1][6:])))
    return found


class Reader:
    """A client that comes back with its Last-Event-ID, whichever queen is there."""

    def __init__(self) -> None:
        self.events: list[AnyEvent] = []
        self.positions: list[Position] = []
        self.position = START
        self.is_done = False

    async def read(self, server: JobServer, job_id: str) -> None:
        job = await server.readable(job_id)
        if job.log is not None and self.events and job.log.is_seen(self.position):
            self.is_done = True
            return
        reader = server.attach(job, self.position)
        try:
            while not self.is_done:
                await reader.wait()
                for self.position, event in frames(reader.take()):
                    self.events.append(event)
                    self.positions.append(self.position)
                self.is_done = reader.finished
        finally:
            server.detach(job)


class Queen:
    """One life of a queen on a store: restores, runs, and is killed."""

    def __init__(self, store: MemoryStore, hive: LocalHive) -> None:
        self.journal = StoreJournal(store, keep_s=1e6, keep_jobs=1000, linger_s=0)
        self.relay = Relay(service="hive", peer="h1", client=hive)
        self.server = JobServer(
            service="queen",
            actor="queen",
            handlers={Infer: self._infer},
            journal=self.journal,
            read_output=lambda job: self.relay.read_output(job.steps[-1].lower_job_id),
        )
        self.server.registry.start_seq(store.last_seq())
        now = datetime.now(UTC)
        for stored in [*store.finished_since("2000-01-01T00:00:00.000000Z"), *store.unfinished()]:
            self.server.restore(restored_job(stored, now))

    async def _infer(self, op: Infer, context: JobContext) -> Any:
        context.narrate("infer_start", "Started.")
        return await self.relay.perform(context, op, step="infer")

    async def live(self, turns: int | None, work: Callable[[], Any]) -> None:
        """Run, with `work` beside it, until it ends or for a number of turns of the loop; then be killed."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.journal.run)
            tasks.start_soon(self.relay.run)
            await tasks.start(self.server.run)

            async def worked() -> None:
                await work()
                tasks.cancel_scope.cancel()

            tasks.start_soon(worked)
            if turns is not None:
                for _ in range(turns):
                    await asyncio.sleep(0)
                self.relay.leave()
                tasks.cancel_scope.cancel()


async def inline(function: Callable[..., Any], *args: Any) -> Any:
    """Stand in for a thread: the same order of things at every run of an example."""
    await asyncio.sleep(0)
    return function(*args)


async def scenario(plan: Plan, kills: list[int]) -> None:
    store, hive, reader, second = MemoryStore(), LocalHive(plan), Reader(), Reader()
    store.open()
    job_ids: list[str] = []
    async with anyio.create_task_group() as tasks:
        await tasks.start(hive.server.run)
        for turns in [*kills, None]:
            queen = Queen(store, hive)

            async def work(queen: Queen = queen) -> None:
                if not job_ids:
                    job = queen.server.submit(
                        Submission(operation=Infer(model="m", prompt="p"), correlation_id="c")
                    )
                    await queen.server.durable()
                    job_ids.append(job.id)
                while not reader.is_done:
                    await reader.read(queen.server, job_ids[0])
                await second.read(queen.server, job_ids[0])

            with contextlib.suppress(asyncio.CancelledError):
                await queen.live(turns, work)
        tasks.cancel_scope.cancel()

    assert reader.positions == second.positions
    assert reader.events == second.events
    assert reader.positions == sorted(set(reader.positions))
    actions = [event.action for event in reader.events]
    texts = [event.message for event in reader.events if event.action == "token"]
    assert texts == [f"t{index} " for index in range(plan.tokens)]
    assert actions[0] == "execute"
    assert actions.count("infer_start") == 1
    thoughts = [event.message for event in reader.events if event.action == "thinking"]
    assert thoughts == [f"about {index}" for index in sorted(plan.narrates_before) if index < plan.tokens]
    ends = ["error", "execute_error"] if plan.fails else ["execute_complete"]
    assert [action for action in actions if action.startswith(("execute_", "error"))] == ends
    assert hive.runs == 1
    assert [job.state for job in [store.get(job_ids[0])] if job] == ["failed" if plan.fails else "completed"]


@settings(max_examples=150, deadline=None)
@given(
    plan=st.builds(
        Plan,
        tokens=st.integers(0, 25),
        narrates_before=st.frozensets(st.integers(0, 24), max_size=4),
        fails=st.booleans(),
    ),
    kills=st.lists(st.integers(0, 70), max_size=4),
)
def test_kills_at_any_moment_lose_and_double_nothing(plan: Plan, kills: list[int]) -> None:
    with patch("anyio.to_thread.run_sync", inline):
        asyncio.run(asyncio.wait_for(scenario(plan, kills), 45))


# --- a hive that is killed too, and forgets -------------------------------------------------------------


class ForgetfulHive(LocalHive):
    """A hive that can be killed and started again, and then knows nothing of its jobs."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._scope = anyio.CancelScope()
        self._replaced = asyncio.Event()

    async def start(self, tasks: TaskGroup) -> None:
        async def run(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            with scope:
                await server.run(task_status=task_status)

        scope, server = self._scope, self.server
        await tasks.start(run)

    async def restart(self, tasks: TaskGroup) -> None:
        new = ForgetfulHive(self.plan)
        new.server = JobServer(service="hive", actor="hive/h1", handlers={Infer: self._infer})
        await new.start(tasks)
        old, scope, replaced = self.server, self._scope, self._replaced
        self.server, self._scope, self._replaced = new.server, new._scope, asyncio.Event()
        scope.cancel()
        replaced.set()
        old.firehose.close()

    async def cancel(self, job_id: str, *, correlation_id: str | None = None) -> bool:
        return False

    async def follow_raw(
        self, *, on_connection: Callable[[bool], None] | None = None
    ) -> AsyncIterator[list[AnyEvent | bytes]]:
        assert on_connection is not None
        before: tuple[str, int] | None = None
        while True:
            server, parser = self.server, FirehoseParser()
            follower = server.firehose.follow(before, output=True)
            before = ("the boot before", 0)
            on_connection(True)
            try:
                while server is self.server:
                    yield parser.feed_raw(follower.take())
                    await follower.wait()
            finally:
                follower.close()
                on_connection(False)

    async def stream_from(
        self, job_id: str, position: Position
    ) -> AsyncGenerator[tuple[Position, AnyEvent], None]:
        while True:
            server, replaced = self.server, self._replaced
            job = await server.readable(job_id)
            reader = server.attach(job, position)
            try:
                while not reader.finished and server is self.server:
                    more = asyncio.ensure_future(reader.wait())
                    over = asyncio.ensure_future(replaced.wait())
                    try:
                        await asyncio.wait([more, over], return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        more.cancel()
                        over.cancel()
                    for position, event in frames(reader.take()):
                        yield position, event
                if reader.finished:
                    return
            finally:
                server.detach(job)


async def forgetting(plan: Plan, kills: list[int], restarts: list[int]) -> None:
    store, hive, reader = MemoryStore(), ForgetfulHive(plan), Reader()
    store.open()
    job_ids: list[str] = []
    is_gone = False
    async with anyio.create_task_group() as tasks:
        await hive.start(tasks)

        async def restart() -> None:
            for turns in restarts:
                for _ in range(turns):
                    await asyncio.sleep(0)
                await hive.restart(tasks)

        tasks.start_soon(restart)
        for turns in [*kills, None]:
            queen = Queen(store, hive)

            async def work(queen: Queen = queen) -> None:
                nonlocal is_gone
                if not job_ids:
                    job = queen.server.submit(
                        Submission(operation=Infer(model="m", prompt="p"), correlation_id="c")
                    )
                    await queen.server.durable()
                    job_ids.append(job.id)
                while not (reader.is_done or is_gone):
                    try:
                        await reader.read(queen.server, job_ids[0])
                    except RbeeError as exc:
                        is_gone = exc.code == "output_expired"
                        if not is_gone:
                            raise

            with contextlib.suppress(asyncio.CancelledError):
                await queen.live(turns, work)
        tasks.cancel_scope.cancel()

    actions = [event.action for event in reader.events]
    texts = [event.message for event in reader.events if event.action == "token"]
    thoughts = [event.message for event in reader.events if event.action == "thinking"]
    assert reader.positions == sorted(set(reader.positions))
    assert texts == [f"t{index} " for index in range(len(texts))]
    assert len(set(thoughts)) == len(thoughts)
    assert actions.count("infer_start") <= 1
    assert hive.runs <= 1 + len(restarts)
    stored = store.get(job_ids[0])
    assert stored is not None
    assert stored.state in ("completed", "failed")
    if not is_gone:
        assert [action for action in actions if action.startswith("execute_")] == [
            "execute_complete" if stored.state == "completed" else "execute_error"
        ]
    if stored.state == "completed":
        assert not plan.fails
        assert is_gone or len(texts) == plan.tokens
    else:
        assert stored.error is not None
        assert stored.error.code in (["broken", "job_lost"] if plan.fails else ["job_lost"])
    if not restarts:
        assert hive.runs == 1


@settings(max_examples=150, deadline=None)
@given(
    plan=st.builds(
        Plan,
        tokens=st.integers(0, 25),
        narrates_before=st.frozensets(st.integers(0, 24), max_size=4),
        fails=st.booleans(),
    ),
    kills=st.lists(st.integers(0, 70), max_size=2),
    restarts=st.lists(st.integers(0, 60), max_size=3),
)
def test_a_hive_that_forgets_is_asked_again_only_for_what_had_said_nothing(
    plan: Plan, kills: list[int], restarts: list[int]
) -> None:
    """Every job ends; its output is never doubled, and never continued by another run."""
    with patch("anyio.to_thread.run_sync", inline):
        asyncio.run(asyncio.wait_for(forgetting(plan, kills, restarts), 45))
