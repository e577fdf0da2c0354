"""The event log: each reader gets exactly what it has not had, in order, once, and `[DONE]` last."""

import asyncio
from typing import Any

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule
from rbee_inprocess import Frame, frames_of

from rbee_contracts.events import AnyEvent, ExecuteComplete, Narration, Token
from rbee_contracts.sse import START, Position, parse_event_id
from rbee_job_server.event_log import EventLog, LogReader

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


class Reading:
    """A reader, where it began, and what it got."""

    def __init__(self, log: EventLog, start: Position) -> None:
        self.start = start
        self.reader: LogReader = log.reader(start)
        self.got: list[Frame] = []

    def take(self) -> None:
        self.got += frames_of(self.reader.take())


class Readers(RuleBasedStateMachine):
    """Any interleaving of appends, of readers that come with any position, and of reading."""

    readings = Bundle("readings")

    def __init__(self) -> None:
        super().__init__()
        self.log = EventLog()
        self.said: list[tuple[Position, str]] = []
        self.all: list[Reading] = []

    def append(self, event: AnyEvent) -> None:
        self.log.append(event)
        self.said.append((self.log.position, event.message))

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
        reading = Reading(self.log, position)
        self.all.append(reading)
        return reading

    @rule(reading=readings)
    def take(self, reading: Reading) -> None:
        reading.take()
        assert reading.got == self.expected(reading)

    def expected(self, reading: Reading) -> list[Frame]:
        frames: list[Frame] = []
        before = START
        for position, message in self.said:
            is_output = position.outputs > before.outputs
            had = (
                position.outputs <= reading.start.outputs
                if is_output
                else position.narrations <= reading.start.narrations
            )
            if not had:
                frames.append(Frame(str(position), message))
            before = position
        if self.log.closed:
            frames.append(Frame("", "[DONE]"))
        return [
            frame._replace(
                data=got.data if got.action == "[DONE]" or got.json["message"] == frame.data else ""
            )
            for frame, got in zip(frames, reading.got, strict=True)
        ]

    @invariant()
    def the_position_counts_what_was_said(self) -> None:
        n, i = self.log.position
        assert n + i == len(self.log) == len(self.said)

    def teardown(self) -> None:
        for reading in self.all:
            reading.take()
            assert reading.got == self.expected(reading)
            assert reading.reader.finished is self.log.closed
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

    assert not log._waiters
    log.append(END)
    await asyncio.wait_for(reader.wait(), 1)
