"""One job: exactly one terminal event, whoever ends it, and a state that says the same."""

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from rbee_inprocess import Frame, ManualClock, actions, frames_of

from rbee_contracts.errors import RbeeError
from rbee_contracts.events import (
    EVENTS,
    AnyEvent,
    Decision,
    Placement,
    Token,
    Usage,
    decode_event,
    encode_event,
)
from rbee_contracts.ids import new_job_id
from rbee_contracts.operations import Infer, Operation, Status
from rbee_contracts.sse import START, Position
from rbee_job_server.clock import SystemClock
from rbee_job_server.jobs import CancelReason, Job, JobPolicy

TERMINAL_STATES = {
    "execute_complete": "completed",
    "execute_error": "failed",
    "execute_timeout": "failed",
    "execute_cancelled": "cancelled",
}


class Published:
    """What a job publishes; of output there is its JSON only."""

    def __init__(self) -> None:
        self.events: list[tuple[AnyEvent, bytes, Position]] = []

    def publish(self, event: AnyEvent, body: bytes, position: Position) -> None:
        self.events.append((event, body, position))

    def publish_output(self, body: bytes, narrations: int, outputs: int) -> None:
        self.events.append((decode_event(body), body, Position(narrations, outputs)))


def make_job(
    operation: Operation | None = None,
    unknown_fields: dict[str, str | None] | None = None,
    actor: str = "queen",
) -> tuple[Job, list[tuple[AnyEvent, bytes, Position]]]:
    """Give a job and what it publishes."""
    published = Published()
    job = Job(
        job_id=new_job_id(),
        seq=1,
        operation=operation or Status(),
        correlation_id="corr-1",
        idempotency_key=None,
        policy=JobPolicy(starts_at_once=False, resume_window_s=None, timeout_s=9.0),
        unknown_fields=unknown_fields or {},
        actor=actor,
        clock=ManualClock(),
        publisher=published,
    )
    return job, published.events


def read(job: Job) -> list[Frame]:
    return frames_of(job.reader(START).take())


class Life(RuleBasedStateMachine):
    """Any order of starting, speaking and ending."""

    def __init__(self) -> None:
        super().__init__()
        self.job, self.published = make_job(Infer(model="m", prompt="p"))
        self.first_end: str | None = None
        self.ran = False

    def note(self, ended: bool, action: str) -> None:
        assert ended is (self.first_end is None)
        self.first_end = self.first_end or action

    @rule()
    def start(self) -> None:
        was_pending = self.job.state == "pending"
        assert self.job.start() is was_pending
        self.ran = self.ran or was_pending

    @rule()
    def narrate(self) -> None:
        self.job.narrate("said", "something")

    @rule()
    def emit(self) -> None:
        self.job.emit_token("x")

    @rule(result=st.sampled_from([None, {"a": 1}]))
    def complete(self, result: Any) -> None:
        self.note(self.job.complete(result), "execute_complete")

    @rule()
    def complete_with_what_cannot_be_encoded(self) -> None:
        if self.first_end is None:
            with pytest.raises(TypeError):
                self.job.complete(object())
        else:
            assert not self.job.complete(object())

    @rule()
    def fail(self) -> None:
        self.note(self.job.fail(RbeeError("It broke.", code="broken")), "execute_error")

    @rule()
    def abort(self) -> None:
        self.note(self.job.abort(RbeeError("Stopping.", code="shutting_down")), "execute_error")

    @rule(reason=st.sampled_from(CancelReason))
    def cancel(self, reason: CancelReason) -> None:
        self.note(self.job.cancel(reason), "execute_cancelled")

    @rule()
    def time_out(self) -> None:
        self.note(self.job.time_out(), "execute_timeout")

    @invariant()
    def the_stream_is_well_formed(self) -> None:
        said = actions(read(self.job))
        ends = [action for action in said if action in TERMINAL_STATES]
        if self.first_end is None:
            assert ends == []
            assert "[DONE]" not in said
            assert self.job.state == ("running" if self.ran else "pending")
        else:
            assert ends == [self.first_end]
            assert said[-2:] == [self.first_end, "[DONE]"]
            assert said.count("[DONE]") == 1
            assert self.job.state == TERMINAL_STATES[self.first_end]
            assert self.job.is_finished
        assert said.count("execute") == self.ran
        assert said.count("error") == (self.first_end == "execute_error")
        if self.first_end == "execute_error":
            assert said[-3] == "error"

    @invariant()
    def what_is_published_is_what_is_logged(self) -> None:
        logged = [(frame.id, frame.data.encode()) for frame in read(self.job) if frame.action != "[DONE]"]
        assert [(str(position), body) for _, body, position in self.published] == logged

    @invariant()
    def the_record_tells_the_same(self) -> None:
        record = self.job.record()
        assert record.state == self.job.state
        assert (record.finished_at is not None) is (self.first_end is not None)
        assert (record.error is not None) is (record.state == "failed")
        if self.first_end == "execute_timeout":
            assert record.error is not None
            assert record.error.code == "timeout"
        assert record.result is None or record.state == "completed"


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=12, deadline=None)


def test_execute_comes_first_when_the_job_starts_in_time() -> None:
    job, _ = make_job()
    job.start()
    job.narrate("said", "something")
    job.complete(None)

    assert actions(read(job)) == ["execute", "said", "execute_complete", "[DONE]"]


def test_unknown_fields_are_named_after_execute() -> None:
    job, _ = make_job(Infer(model="m", prompt="p"), {"max_token": "max_tokens", "x" * 5000: None})
    job.start()
    frames = read(job)

    assert actions(frames) == ["execute", "warning", "warning"]
    assert "'max_token'" in frames[1].json["message"]
    assert "Did you mean max_tokens?" in frames[1].json["message"]
    assert len(frames[2].data) < 1000


def test_tokens_are_counted_from_nought() -> None:
    job, _ = make_job()
    job.start()
    for _ in range(3):
        job.emit_token("x")

    assert [(frame.id, frame.json["index"]) for frame in read(job)[1:]] == [
        ("1-1", 0),
        ("1-2", 1),
        ("1-3", 2),
    ]


@settings(deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=6),
    actor=st.sampled_from(["worker/w1", 'worker/"x"\\']),
)
def test_tokens_are_to_the_byte_what_encoding_them_gives(texts: list[str], actor: str) -> None:
    job, published = make_job(actor=actor)
    for text in texts:
        job.emit_token(text)
    common: dict[str, Any] = {
        "actor": actor,
        "job_id": job.id,
        "correlation_id": "corr-1",
        "timestamp": ManualClock().timestamp(),
    }
    expected = [encode_event(Token(message=text, index=index, **common)) for index, text in enumerate(texts)]

    assert [body for _, body, _ in published] == expected
    assert job.reader(START).take() == b"".join(
        b"id: 0-%d\ndata: %b\n\n" % (index, body) for index, body in enumerate(expected, 1)
    )


def test_a_token_that_cannot_be_said_changes_nothing() -> None:
    job, published = make_job()

    with pytest.raises(UnicodeEncodeError):
        job.emit_token("\ud800")

    assert published == []
    assert job.outputs == 0


def test_every_event_carries_what_events_carry() -> None:
    job, _ = make_job()
    job.start()
    job.narrate("said", "something", {"a": 1})
    job.fail(RbeeError("It broke.", code="broken", retryable=True))
    frames = [frame.json for frame in read(job)[:-1]]

    for event in frames:
        assert event["actor"] == "queen"
        assert event["job_id"] == job.id
        assert event["correlation_id"] == "corr-1"
        assert event["formatted"] == f"[queen] {event['message']}"
        assert event["timestamp"] == "2026-01-01T00:00:00.000000Z"
    assert (frames[2]["code"], frames[2]["retryable"]) == ("broken", True)
    assert frames[1]["data"] == {"a": 1}
    assert frames[3]["code"] == "broken"


def test_a_struct_narrated_becomes_the_events_data() -> None:
    job, _ = make_job()
    job.narrate("infer_worker", "There.", Placement(hive_id="h", worker_id="w", port=9300))

    assert read(job)[0].json["data"] == {"hive_id": "h", "worker_id": "w", "port": 9300}


@pytest.mark.parametrize(
    ("action", "data"),
    [
        ("infer_worker", {"hive_id": "h"}),
        ("infer_worker", {}),
        ("infer_worker", {"hive_id": "../h", "worker_id": "w", "port": 1}),
        ("infer_worker", Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)),
        ("infer_schedule", {"model": "m"}),
        ("worker_spawn_start", [1]),
        ("error", {"no": "code"}),
    ],
)
def test_data_that_misfits_its_struct_is_refused_and_says_nothing(action: str, data: Any) -> None:
    job, published = make_job()

    with pytest.raises(msgspec.ValidationError):
        job.narrate(action, "Wrong.", data)
    assert published == []
    assert job.complete(None)


@pytest.mark.parametrize("action", sorted(a for a, kind in EVENTS.items() if kind.kind != "narration"))
def test_a_handler_can_neither_end_its_job_nor_give_output_by_narrating(action: str) -> None:
    job, published = make_job()

    with pytest.raises(ValueError, match=action):
        job.narrate(action, "The end?", {"index": 0, "code": "x"})
    assert published == []


def test_a_decision_goes_out_whole() -> None:
    job, _ = make_job()
    decision = Decision(model="m", hive_id="h", worker_id="w", reason="only one", candidates=[])
    job.narrate("infer_schedule", "There.", decision)

    assert read(job)[0].json["data"] == msgspec.to_builtins(decision)


def test_the_usage_of_an_inference_is_in_its_record() -> None:
    job, _ = make_job(Infer(model="m", prompt="p"))
    job.start()
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    timings = dict.fromkeys(("queue_ms", "prefill_ms", "decode_ms", "ttft_ms", "tokens_per_second"), 1.0)
    job.narrate("infer_complete", "Done.", {"usage": usage, "finish_reason": "stop", "timings": timings})

    assert job.record().usage == Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3)
    assert job.record().model == "m"


def test_the_system_clock_gives_rfc_3339_in_utc_that_never_goes_back() -> None:
    clock = SystemClock()
    times = [clock.timestamp() for _ in range(100)]

    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", time) for time in times)
    assert times == sorted(times)
