"""The registry: what is kept of jobs that have ended, and what goes first."""

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from rbee_inprocess import ManualClock

from rbee_contracts.ids import new_job_id
from rbee_contracts.operations import Status
from rbee_job_server import registry as registry_module
from rbee_job_server.event_log import EventLog
from rbee_job_server.firehose import Firehose
from rbee_job_server.jobs import CancelReason, Job, JobPolicy
from rbee_job_server.registry import LOG_RETENTION_S, JobRegistry

RECORDS = 4
BYTES = 3000


class Retention(RuleBasedStateMachine):
    """Any coming, ending and being read of jobs, beside the rule as one would write it down."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(registry_module, "RECORDS_KEPT", RECORDS)
        self.patch.setattr(registry_module, "LOG_RETENTION_BYTES", BYTES)
        self.clock = ManualClock()
        self.registry = JobRegistry()
        self.jobs: list[Job] = []
        self.known: list[Job] = []
        self.with_log: list[Job] = []
        self.sizes: dict[str, int] = {}

    def teardown(self) -> None:
        self.patch.undo()

    @rule(tokens=st.integers(0, 4))
    def add(self, tokens: int) -> None:
        job = Job(
            job_id=new_job_id(),
            seq=self.registry.take_seq(),
            operation=Status(),
            correlation_id="corr-1",
            idempotency_key=f"key-{len(self.jobs)}",
            policy=JobPolicy(starts_at_once=True, resume_window_s=None, timeout_s=None),
            unknown_fields={},
            actor="queen",
            clock=self.clock,
            publisher=Firehose("ab12", "queen", self.clock),
        )
        job.start()
        for _ in range(tokens):
            job.emit_token("x" * 100)
        self.registry.add(job)
        self.jobs.append(job)
        self.known.append(job)
        self.with_log.append(job)

    @precondition(lambda self: self.jobs)
    @rule(pick=st.integers(0, 100))
    def end(self, pick: int) -> None:
        self.clock.now += 1  # no two at the same time
        job = self.jobs[pick % len(self.jobs)]
        job.cancel(CancelReason.REQUESTED)
        if job.log is not None:
            self.sizes[job.id] = job.log.size

    @precondition(lambda self: self.known)
    @rule(pick=st.integers(0, 100), by=st.sampled_from([1, 1, -1]))
    def read(self, pick: int, by: int) -> None:
        job = self.known[pick % len(self.known)]
        job.readers = max(0, job.readers + by)

    @rule(seconds=st.sampled_from([1.0, LOG_RETENTION_S / 2, LOG_RETENTION_S + 1]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def sweep(self) -> None:
        self.registry.sweep(self.clock.now)
        ended = sorted((job for job in self.known if job.is_finished), key=lambda job: job.finished or 0)
        kept = [job for job in ended if job in self.with_log]
        sizes = {job.id: self.size(job) for job in kept}
        total = sum(sizes.values())
        for job in kept:
            is_old = self.clock.now - (job.finished or 0) > LOG_RETENTION_S
            if (is_old or total > BYTES) and not job.readers:
                self.with_log.remove(job)
                total -= sizes[job.id]
        for job in ended[: max(0, len(ended) - RECORDS)]:
            if not job.readers:
                self.known.remove(job)

    def size(self, job: Job) -> int:
        """A log's size, also of one that is gone by now."""
        return self.sizes[job.id]

    @invariant()
    def what_is_kept_is_what_the_rule_says(self) -> None:
        assert list(self.registry) == self.known
        assert [job for job in self.known if job.log is not None] == [
            job for job in self.known if job in self.with_log
        ]
        for number, job in enumerate(self.jobs):
            found = self.registry.find_submitted(f"key-{number}", job.operation)
            assert (found is job) is (job in self.known)


TestRetention = Retention.TestCase
TestRetention.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def keeps_log(job: Job) -> bool:
    return job.log is not None


def test_a_log_that_was_made_again_goes_like_any_other() -> None:
    clock, registry = ManualClock(), JobRegistry()
    job = Job(
        job_id=new_job_id(),
        seq=1,
        operation=Status(),
        correlation_id="corr-1",
        idempotency_key=None,
        policy=JobPolicy(starts_at_once=True, resume_window_s=None, timeout_s=None),
        unknown_fields={},
        actor="queen",
        clock=clock,
        publisher=Firehose("ab12", "queen", clock),
    )
    job.cancel(CancelReason.REQUESTED)
    job.log = None
    registry.add(job)
    registry.sweep(clock.now)
    job.log = EventLog()
    registry.keep_log(job)
    registry.sweep(clock.now)
    assert keeps_log(job)
    clock.now += LOG_RETENTION_S + 1
    registry.sweep(clock.now)
    assert not keeps_log(job)
    job.log, job.readers = EventLog(), 1
    registry.keep_log(job)
    registry.sweep(clock.now)
    assert keeps_log(job)
    job.readers = 0
    registry.sweep(clock.now)
    assert not keeps_log(job)


def completed(registry: JobRegistry, clock: ManualClock, result: object) -> Job:
    """A job that has ended with a result, swept once."""
    clock.now += 1
    job = Job(
        job_id=new_job_id(),
        seq=registry.take_seq(),
        operation=Status(),
        correlation_id="corr-1",
        idempotency_key=None,
        policy=JobPolicy(starts_at_once=True, resume_window_s=None, timeout_s=None),
        unknown_fields={},
        actor="queen",
        clock=clock,
        publisher=Firehose("ab12", "queen", clock),
    )
    registry.add(job)
    job.start()
    job.complete(result)
    registry.sweep(clock.now)
    return job


def test_results_that_are_kept_are_bounded_together_and_the_oldest_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry_module, "RESULT_RETENTION_BYTES", 500)
    clock, registry = ManualClock(), JobRegistry()
    jobs = [completed(registry, clock, {"text": "x" * 200}) for _ in range(4)]
    small = completed(registry, clock, {"ok": True})

    assert [job.record().result is not None for job in jobs] == [False, False, True, True]
    assert all(keeps_log(job) for job in jobs)
    assert msgspec.json.encode(small.record().result) == b'{"ok":true}'
    assert [job.state for job in registry] == ["completed"] * 5


def test_the_results_of_forgotten_records_no_longer_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "RESULT_RETENTION_BYTES", 500)
    monkeypatch.setattr(registry_module, "RECORDS_KEPT", 2)
    clock, registry = ManualClock(), JobRegistry()
    for _ in range(20):
        completed(registry, clock, {"text": "x" * 200})

    assert [job.result is not None for job in registry] == [True, True]
