"""What is recorded close together is one commit, and what is urgent waits for nothing."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest

from rbee_contracts.operations import Status
from rbee_job_server.clock import SystemClock
from rbee_job_server.firehose import Firehose
from rbee_job_server.jobs import Job, JobPolicy
from rbee_queen.journal import StoreJournal
from rbee_queen.store import Record
from rbee_queen.store.testing import MemoryStore

NEVER_S = 3600.0


class CountingStore(MemoryStore):
    """Keeps what each commit held."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: list[list[str]] = []

    def write(self, records: Sequence[Record]) -> None:
        super().write(records)
        if records:
            self.commits.append([type(record).__name__ for record in records])


def job(journal: StoreJournal) -> Job:
    clock = SystemClock()
    return Job(
        job_id="job-1",
        seq=1,
        operation=Status(),
        correlation_id="c",
        idempotency_key=None,
        policy=JobPolicy(starts_at_once=False, resume_window_s=None, timeout_s=None),
        unknown_fields={},
        actor="queen",
        clock=clock,
        publisher=Firehose("boot", "queen", clock),
        journal=journal,
    )


@asynccontextmanager
async def journal_on(store: CountingStore, linger_s: float) -> AsyncGenerator[StoreJournal, None]:
    store.open()
    journal = StoreJournal(store, keep_s=1e6, keep_jobs=10, linger_s=linger_s)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(journal.run)
        yield journal
        tasks.cancel_scope.cancel()


async def test_narration_waits_for_what_is_urgent_and_is_one_commit_with_it() -> None:
    store = CountingStore()
    async with journal_on(store, NEVER_S) as journal:
        one = job(journal)
        journal.accepted(one)
        one.start()
        one.narrate("thinking", "First.")
        await anyio.wait_all_tasks_blocked()
        before = list(store.commits)
        one.narrate("thinking", "Second.")
        with anyio.fail_after(45):
            await journal.flushed()

    assert before == []
    assert store.commits == [["JobAccepted", "JobStarted", "Narrated", "Narrated", "Narrated"]]
    assert one.log is not None
    assert one.log.narrations == 3


@pytest.mark.parametrize("ending", ["output", "end"])
async def test_the_first_output_and_the_end_wait_for_nothing(ending: str) -> None:
    store = CountingStore()
    async with journal_on(store, NEVER_S) as journal:
        one = job(journal)
        journal.accepted(one)
        one.start()
        if ending == "output":
            one.emit_token("Hello")
        else:
            one.complete(None)
        assert one.log is not None
        with anyio.fail_after(45):
            while one.log.position == (0, 0):
                await anyio.lowlevel.checkpoint()
            while store.commits and one.log.narrations + one.log.outputs < 2:
                await anyio.lowlevel.checkpoint()

    assert [len(commit) for commit in store.commits] == [4]


async def test_narration_alone_is_told_after_its_wait() -> None:
    store = CountingStore()
    async with journal_on(store, 0.001) as journal:
        one = job(journal)
        journal.accepted(one)
        one.start()
        assert one.log is not None
        reader = one.reader(one.log.position)
        with anyio.fail_after(45):
            await reader.wait()

    assert store.commits == [["JobAccepted", "JobStarted", "Narrated"]]
