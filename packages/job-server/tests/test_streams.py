"""Server-sent events on the wire: pings, back-pressure and the end."""

import asyncio
from typing import Any, NamedTuple

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rbee_inprocess import PATIENCE_S, eventually, run_counted
from starlette.types import Message, Scope

from rbee_contracts.events import ExecuteComplete, Token
from rbee_job_server import streams
from rbee_job_server.event_log import WRITE_BYTES, EventLog
from rbee_job_server.streams import CONNECTION, PING_FRAME, EventStreamResponse

COMMON: dict[str, Any] = {
    "actor": "worker/w1",
    "job_id": "job-00000000-0000-4000-8000-000000000000",
    "correlation_id": "corr-1",
    "timestamp": "2026-01-01T00:00:00.000000Z",
}
END = ExecuteComplete(message="end", formatted="", **COMMON)


class Source:
    """Frames that are put into it."""

    def __init__(self) -> None:
        self.finished = False
        self._frames: list[bytes] = []
        self._changed = asyncio.Event()

    def put(self, frame: bytes, *, last: bool = False) -> None:
        self._frames.append(frame)
        self._last = last
        self._changed.set()

    def take(self) -> bytes:
        frames, self._frames = b"".join(self._frames), []
        self._changed.clear()
        self.finished = bool(frames) and self._last
        return frames

    async def wait(self) -> None:
        await self._changed.wait()


class Connection:
    """What uvicorn does: `send` waits while the client reads nothing, and raises after the end."""

    def __init__(self) -> None:
        self.writable = asyncio.Event()
        self.writable.set()
        self.bodies: list[bytes] = []
        self.ended = False

    async def send(self, message: Message) -> None:
        await self.writable.wait()
        assert not self.ended, "a message after the end of the response"
        if message["type"] == "http.response.body":
            self.bodies.append(bytes(message["body"]))
            self.ended = not message["more_body"]

    async def receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.anyio
async def test_a_ping_never_follows_the_end_of_a_reader_that_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PING_S", 0.005)
    source, connection = Source(), Connection()
    closed = anyio.Event()
    async with anyio.create_task_group() as tasks:
        response = EventStreamResponse(source, on_close=closed.set)
        tasks.start_soon(response, {"type": "http"}, connection.receive, connection.send)
        await eventually(lambda: connection.bodies, "the first ping")
        with anyio.fail_after(PATIENCE_S):
            connection.writable.clear()
            source.put(b"data: the end\n\n", last=True)
            await anyio.sleep(0.05)  # several pings are due
            connection.writable.set()
            await closed.wait()

    assert connection.ended
    assert connection.bodies[-1] == b"data: the end\n\n"


def test_pings_come_only_in_silence() -> None:
    async def walk() -> None:
        source, connection = Source(), Connection()
        closed = anyio.Event()
        async with anyio.create_task_group() as tasks:
            response = EventStreamResponse(source, head=b"head\n\n", on_close=closed.set)
            tasks.start_soon(response, {"type": "http"}, connection.receive, connection.send)
            for _ in range(10):
                await anyio.sleep(0.4 * streams.PING_S)
                source.put(b"data: x\n\n")
            assert connection.bodies.count(PING_FRAME) == 0
            await anyio.sleep(2.1 * streams.PING_S)
            assert connection.bodies.count(PING_FRAME) in (1, 2)
            source.put(b"data: the end\n\n", last=True)
            await closed.wait()

        assert connection.bodies[0] == b"head\n\n"
        assert connection.bodies.count(b"data: x\n\n") == 10

    run_counted(walk)


# --- what is written without waiting -------------------------------------------------------------------


class Direct(Connection):
    """A connection of our server: it can be written to at once, until it is full."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.is_full = False
        self.pieces: list[tuple[str, bytes]] = []

    @property
    def scope(self) -> Scope:
        return {"type": "http", "extensions": {CONNECTION: {"connection": self}}}

    def abort(self) -> None:
        raise AssertionError

    def is_writable(self) -> bool:
        return not self.is_full

    def write(self, body: bytes) -> None:
        assert not self.is_full
        assert not self.ended, "a piece after the end of the response"
        self.pieces.append(("written", body))

    def fill(self) -> None:
        self.is_full = True
        self.writable.clear()

    def empty(self) -> None:
        self.is_full = False
        self.writable.set()

    async def send(self, message: Message) -> None:
        await super().send(message)
        if message["type"] == "http.response.body":
            self.pieces.append(("sent", bytes(message["body"])))

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)


def token(text: str, index: int) -> Token:
    return Token(message=text, index=index, **COMMON)


class Step(NamedTuple):
    """What happens in one turn of the loop: so many tokens of this length; the connection is full, or not."""

    tokens: int
    length: int
    is_full: bool


steps = st.lists(
    st.builds(
        Step,
        tokens=st.integers(0, 3),
        length=st.sampled_from([0, 5, 5, WRITE_BYTES // 2, WRITE_BYTES * 2]),
        is_full=st.sampled_from([False, False, False, True]),
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(steps=steps, is_ours=st.booleans())
def test_a_stream_is_the_same_bytes_on_every_way(steps: list[Step], is_ours: bool) -> None:
    async def walk() -> None:
        log, connection, closed = EventLog(), Direct(), anyio.Event()
        scope = connection.scope if is_ours else {"type": "http"}
        response = EventStreamResponse(log.reader(), head=b"head\n\n", on_close=closed.set)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(response, scope, connection.receive, connection.send)
            for tokens, length, is_full in steps:
                connection.fill() if is_full else connection.empty()
                for _ in range(tokens):
                    log.append(token("x" * length, log.outputs))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            connection.empty()
            log.append(END)
            with anyio.fail_after(10):
                await closed.wait()

        pieces = list(iter(log.reader().take, b""))
        assert connection.body == b"head\n\n" + b"".join(pieces)
        assert max(len(piece) for _, piece in connection.pieces) <= WRITE_BYTES
        assert connection.pieces[-1][0] == "sent"
        assert connection.ended
        assert not log._listeners

    run_counted(walk)


@pytest.mark.anyio
async def test_what_comes_to_a_reader_that_waits_is_written_at_once_and_in_one_piece() -> None:
    log, connection = EventLog(), Direct()
    response = EventStreamResponse(log.reader(), on_close=lambda: None)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(response, connection.scope, connection.receive, connection.send)
        await eventually(lambda: log._listeners, "it waits")
        for number in range(3):
            log.append(token("a", 2 * number))
            log.append(token("b", 2 * number + 1))
            await asyncio.sleep(0)
            assert len(connection.pieces) == number + 1
        tasks.cancel_scope.cancel()

    assert [kind for kind, _ in connection.pieces] == ["written"] * 3
    assert [piece.count(b"\n\n") for _, piece in connection.pieces] == [2] * 3


@pytest.mark.anyio
@pytest.mark.parametrize("ping_s", [0.02, 0.2], ids=["in time", "held up"])
async def test_a_full_connection_is_waited_for_and_its_reader_stalls(
    monkeypatch: pytest.MonkeyPatch, ping_s: float
) -> None:
    """Held up: when the write is looked at, it has taken longer than a reader may."""
    monkeypatch.setattr(streams, "PING_S", ping_s)
    monkeypatch.setattr(streams, "READER_STALL_S", 0.05)
    log, connection, aborted = EventLog(), Direct(), anyio.Event()
    monkeypatch.setattr(connection, "abort", aborted.set)
    response = EventStreamResponse(log.reader(), on_close=lambda: None)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(response, connection.scope, connection.receive, connection.send)
        await eventually(lambda: log._listeners, "it waits")
        log.append(token("a", 0))
        await eventually(lambda: b'"a"' in connection.body, "it is written")
        connection.fill()
        log.append(token("b", 1))
        with anyio.fail_after(PATIENCE_S):
            await aborted.wait()
        tasks.cancel_scope.cancel()

    assert b'"a"' in connection.body
    assert b'"b"' not in connection.body


@pytest.mark.anyio
async def test_a_send_that_fails_still_closes() -> None:
    closed = anyio.Event()

    async def send(_: Message) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        await EventStreamResponse(Source(), on_close=closed.set)({"type": "http"}, Connection().receive, send)
    assert closed.is_set()
