"""Server-sent events on the wire: pings, back-pressure and the end."""

import asyncio

import anyio
import pytest
from rbee_inprocess import eventually
from starlette.types import Message

from rbee_job_server import streams
from rbee_job_server.streams import PING_FRAME, EventStreamResponse

pytestmark = pytest.mark.anyio


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


async def test_a_ping_never_follows_the_end_of_a_reader_that_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PING_S", 0.005)
    source, connection = Source(), Connection()
    closed = anyio.Event()
    async with anyio.create_task_group() as tasks:
        response = EventStreamResponse(source, on_close=closed.set)
        tasks.start_soon(response, {"type": "http"}, connection.receive, connection.send)
        await eventually(lambda: connection.bodies, "the first ping")
        with anyio.fail_after(5):
            connection.writable.clear()
            source.put(b"data: the end\n\n", last=True)
            await anyio.sleep(0.05)  # several pings are due
            connection.writable.set()
            await closed.wait()

    assert connection.ended
    assert connection.bodies[-1] == b"data: the end\n\n"


async def test_pings_come_only_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PING_S", 0.05)
    source, connection = Source(), Connection()
    closed = anyio.Event()
    async with anyio.create_task_group() as tasks:
        response = EventStreamResponse(source, head=b"head\n\n", on_close=closed.set)
        tasks.start_soon(response, {"type": "http"}, connection.receive, connection.send)
        for _ in range(10):
            await anyio.sleep(0.02)
            source.put(b"data: x\n\n")
        source.put(b"data: the end\n\n", last=True)
        await closed.wait()

    assert connection.bodies[0] == b"head\n\n"
    assert connection.bodies.count(PING_FRAME) <= 2


async def test_a_send_that_fails_still_closes() -> None:
    closed = anyio.Event()

    async def send(_: Message) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        await EventStreamResponse(Source(), on_close=closed.set)({"type": "http"}, Connection().receive, send)
    assert closed.is_set()
