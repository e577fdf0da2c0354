"""The event log: each reader gets exactly what it has not had, in order, once, and `[DONE]` last."""

from typing import Any, NamedTuple

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from rbee_inprocess import PATIENCE_S, Frame, frames_of

from rbee_contracts.events import (
    AnyEvent,
    DownloadProgress,
    ExecuteComplete,
    ModelDownloadProgress,
    Narration,
    Token,
)
from rbee_contracts.sse import START, Position, parse_event_id
from rbee_job_server.event_log import DONE_FRAME, EventLog, LogReader

COMMON: dict[str, Any] = {
    "actor": "worker/w1",
    "job_id": "job-00000000-0000-4000-8000-000000000000",
    "correlation_id": "corr-1",
    "timestamp": "2026-01-01T00:00:00.000000Z",
}
END = ExecuteComplete(message="end", formatted="", **COMMON)


def said(text: str) -> AnyEvent:
    return Narration(action="said", message=text, **COMMON)


def token(text: str, index: int = 0) -> AnyEvent:
    return Token(message=text, index=index, **COMMON)


class Said(NamedTuple):
    """What the log was given, and where it came to stand."""

    position: Position
    event: AnyEvent

    def is_new_at(self, start: Position) -> bool:
        if self.event.kind == "output":
            return self.position.outputs > start.outputs
        return self.position.narrations > start.narrations


class Reading:
    """A reader, where it began, and how far the model of it has come."""

    def __init__(self, log: EventLog, start: Position, write_bytes: int) -> None:
        self.start = start
        self.write_bytes = write_bytes
        self.reader: LogReader = log.reader(start, write_bytes=write_bytes)
        self.seen = 0
        self.is_done = False

    def take(self) -> list[Frame]:
        """Take all that is pending."""
        body = b""
        while piece := self.reader.take():
            body += piece
            assert len(piece) <= self.write_bytes + len(DONE_FRAME) or piece.count(b"\n\n") == 1
            assert body.count(DONE_FRAME) <= 1
        return frames_of(body)


class Readers(RuleBasedStateMachine):
    """Any interleaving of appends, of readers that come with any position, and of reading.

    With small blocks and small writes, so that folding and cutting take part.
    """

    readings = Bundle("readings")

    @initialize(block_events=st.sampled_from([1, 2, 3, 64]), write_bytes=st.sampled_from([1, 500, 2**18]))
    def begin(self, block_events: int, write_bytes: int) -> None:
        self.log = EventLog(block_events)
        self.write_bytes = write_bytes
        self.said: list[Said] = []
        self.all: list[Reading] = []

    def append(self, event: AnyEvent) -> None:
        self.log.append(event)
        self.said.append(Said(self.log.position, event))

    @precondition(lambda self: not self.log.closed)
    @rule()
    def narrate(self) -> None:
        self.append(said(f"narration {len(self.said)}"))

    @precondition(lambda self: not self.log.closed)
    @rule(count=st.integers(1, 4))
    def output(self, count: int) -> None:
        for _ in range(count):
            self.append(token(f"token {len(self.said)}", self.log.outputs))

    @precondition(lambda self: not self.log.closed)
    @rule(model=st.sampled_from(["a", "b"]))
    def progress(self, model: str) -> None:
        data = DownloadProgress(model=model, bytes_done=1, bytes_total=None, rate=1.0, eta_s=None)
        message = f"progress {len(self.said)}"
        self.append(ModelDownloadProgress(message=message, formatted="", data=data, **COMMON))

    @precondition(lambda self: not self.log.closed)
    @rule()
    def end(self) -> None:
        self.append(END)

    @precondition(lambda self: self.log.closed)
    @rule()
    def nothing_follows_the_end(self) -> None:
        size = len(self.log)
        with pytest.raises(RuntimeError):
            self.log.append(said("too late"))
        assert len(self.log) == size

    @rule(target=readings, pick=st.integers(0, 100))
    def join_where_the_log_has_been(self, pick: int) -> Reading:
        places = [START, *(position for position, _ in self.said)]
        return self.join(places[pick % len(places)])

    @rule(target=readings, n=st.integers(0, 8), i=st.integers(0, 12))
    def join_anywhere(self, n: int, i: int) -> Reading:
        return self.join(Position(n, i))

    def join(self, position: Position) -> Reading:
        reading = Reading(self.log, position, self.write_bytes)
        self.all.append(reading)
        return reading

    @rule(reading=readings)
    def take(self, reading: Reading) -> None:
        self.check(reading)

    def check(self, reading: Reading) -> None:
        """Take, and compare with what this reader has not had."""
        got = reading.take()
        expected = [
            (str(one.position), one.event.message)
            for one in self.said[reading.seen :]
            if one.is_new_at(reading.start) and not self.is_replaced(one)
        ]
        reading.seen = len(self.said)
        if self.log.closed and not reading.is_done:
            reading.is_done = True
            assert got.pop() == Frame("", "[DONE]")
        assert [(frame.id, frame.json["message"]) for frame in got] == expected
        assert reading.reader.finished is reading.is_done

    def is_replaced(self, one: Said) -> bool:
        """Whether a later progress of the same download stands for this one."""
        event = one.event
        if not isinstance(event, ModelDownloadProgress):
            return False
        later = [after.event for after in self.said[self.said.index(one) + 1 :]]
        return any(
            isinstance(after, ModelDownloadProgress) and after.data.model == event.data.model
            for after in later
        )

    @invariant()
    def the_position_counts_what_was_said(self) -> None:
        n, i = self.log.position
        assert n + i == len(self.log) == len(self.said)

    def teardown(self) -> None:
        for reading in getattr(self, "all", []):
            self.check(reading)
            assert reading.reader.take() == b""


TestReaders = Readers.TestCase
TestReaders.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_ids_count_narrations_and_outputs() -> None:
    log = EventLog()
    for event in (said("a"), token("x"), token("y", 1), said("b"), END):
        log.append(event)

    assert [frame.id for frame in frames_of(log.reader().take())] == ["1-0", "1-1", "1-2", "2-2", "3-2", ""]
    assert all(parse_event_id(frame.id) for frame in frames_of(log.reader().take())[:-1])


def test_an_event_that_cannot_be_encoded_leaves_the_log_as_it_was() -> None:
    log = EventLog()
    log.append(said("a"))

    with pytest.raises(TypeError):
        log.append(ExecuteComplete(message="end", formatted="", data=object(), **COMMON))
    log.append(END)

    assert [frame.id for frame in frames_of(log.reader().take())] == ["1-0", "2-0", ""]


@pytest.mark.anyio
async def test_waiting_readers_wake_at_an_append_and_at_the_end() -> None:
    log = EventLog()
    got: list[list[str]] = [[], [], []]

    async def read(texts: list[str]) -> None:
        reader = log.reader()
        while not reader.finished:
            await reader.wait()
            texts += [
                frame.data if frame.id == "" else frame.json["message"] for frame in frames_of(reader.take())
            ]

    async with anyio.create_task_group() as tasks:
        for texts in got:
            tasks.start_soon(read, texts)
        for event in (said("a"), token("x"), END):
            await anyio.wait_all_tasks_blocked()
            log.append(event)

    assert got == [["a", "x", "end", "[DONE]"]] * 3


@pytest.mark.anyio
async def test_a_reader_that_stops_waiting_leaves_nothing_behind() -> None:
    log = EventLog()
    reader = log.reader()
    for _ in range(3):
        with anyio.move_on_after(0.001):
            await reader.wait()

    assert not log._listeners
    log.append(END)
    with anyio.fail_after(PATIENCE_S):
        await reader.wait()
