"""Server-sent events on the wire: one ASGI response for whatever gives frames."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import anyio
import structlog
from starlette.types import Receive, Scope, Send

from rbee_job_server.event_log import WRITE_BYTES

log = structlog.get_logger(__name__)

PING_S = 15.0
PING_FRAME = b": ping\n\n"

READER_STALL_S = 30.0
"""A reader that takes so long for one write is closed. Above `PING_S`, whose task looks after it."""

CONNECTION = "rbee.connection"
"""The ASGI extension of our server: its `connection` is the request's `Connection`."""

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Connection(Protocol):
    """What our server lets a response do, besides sending ASGI's messages."""

    error: Exception | None
    """What the connection was lost by."""

    def abort(self) -> None:
        """Give up the connection, with all that is not sent yet."""

    def is_writable(self) -> bool:
        """Whether there is room for a write, and the client has not gone."""

    def write(self, body: bytes) -> None:
        """Write a piece of the body of a response that has started, at once."""


class FrameSource(Protocol):
    """Where frames come from: a job's log, the firehose, heartbeats."""

    finished: bool

    def take(self) -> bytes:
        """Give what is pending, in one piece; empty when nothing is."""

    async def wait(self) -> None:
        """Wait until `take` may have something."""


@runtime_checkable
class PushSource(FrameSource, Protocol):
    """A source that tells when it has more, so that nothing has to wait for it: a job's log."""

    @property
    def is_up_to_date(self) -> bool:
        """Whether all that there is was taken, and more may come."""

    def subscribe(self, on_append: Callable[[], None]) -> None:
        """Have `on_append` called at every append, from within it: it may only note it, or schedule."""

    def unsubscribe(self, on_append: Callable[[], None]) -> None: ...


class EventStreamResponse:
    """Stream a source until it is finished or the client has gone; `on_close` is called either way.

    While a job's reader has all there is, nothing runs for it: an append schedules one callback, which
    writes what has come straight to the connection (`_push`). Whatever has to be waited for is the task's.

    What is pending leaves in one write, in more where it is past `WRITE_BYTES`. A client that has gone is
    noticed by its disconnect, not by a failing write; one that stalls, by a write that takes
    `READER_STALL_S`. Pings are comments, sent when nothing else was for `PING_S`, unless `pings` is false.
    """

    def __init__(
        self,
        source: FrameSource,
        *,
        head: bytes = b"",
        on_close: Callable[[], None],
        job_id: str | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
        pings: bool = True,
    ) -> None:
        self._source = source
        self._head = head
        self._on_close = on_close
        self._job_id = job_id
        self._headers = [*STREAM_HEADERS, *headers]
        self._pings = pings
        self._has_gone = False
        self._wrote = False
        self._writing_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: Connection | None = scope.get("extensions", {}).get(CONNECTION, {}).get("connection")
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._headers})
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._until_disconnect, receive, tasks.cancel_scope)
                abort = tasks.cancel_scope.cancel if connection is None else connection.abort
                tasks.start_soon(self._watch, send, abort)
                await self._stream(send, connection)
                tasks.cancel_scope.cancel()
            if connection is not None and isinstance(connection.error, TimeoutError):
                self._log_closed("unanswered")
        finally:
            self._on_close()

    async def _stream(self, send: Send, connection: Connection | None) -> None:
        source, head = self._source, self._head
        has_waited = True
        while not self._has_gone:
            frames, head = head + source.take(), b""
            if frames:
                if not has_waited:
                    # `send` returns at once when the client has gone: give the loop a turn between two
                    # writes, so that the disconnect is seen.
                    await asyncio.sleep(0)
                await self._write(frames, send, is_last=source.finished)
                has_waited = False
            if source.finished:
                if not frames:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            if not frames:
                if connection is not None and isinstance(source, PushSource):
                    head = await self._push(source, connection)
                else:
                    await source.wait()
                has_waited = True

    async def _push(self, source: PushSource, connection: Connection) -> bytes:
        """Write what comes in each turn of the loop, in one piece, as long as nothing has to be waited for.

        Ends where the connection is full, at the log's end, and where more is pending than one write.
        Gives what was taken and is not written.
        """
        loop = asyncio.get_running_loop()
        over: asyncio.Future[bytes] = loop.create_future()
        is_due = False

        def on_append() -> None:
            nonlocal is_due
            if not is_due:
                is_due = True
                loop.call_soon(flush)

        def flush() -> None:
            nonlocal is_due
            is_due = False
            if over.done():
                return
            frames = b""
            if connection.is_writable():
                frames = source.take()
                if 0 < len(frames) <= WRITE_BYTES and not source.finished:
                    self._wrote = True
                    connection.write(frames)
                    frames = b""
                if not frames and source.is_up_to_date:
                    return
            over.set_result(frames)

        source.subscribe(on_append)
        try:
            return await over
        finally:
            source.unsubscribe(on_append)

    async def _write(self, frames: bytes, send: Send, *, is_last: bool) -> None:
        """Send `frames`; no ping comes in between, as a write that waits counts as one that goes on."""
        clock = asyncio.get_running_loop().time
        self._wrote = True
        self._writing_since = clock()
        while len(frames) > WRITE_BYTES:
            await send({"type": "http.response.body", "body": frames[:WRITE_BYTES], "more_body": True})
            await asyncio.sleep(0)
            self._writing_since = clock()
            frames = frames[WRITE_BYTES:]
        await send({"type": "http.response.body", "body": frames, "more_body": not is_last})
        self._writing_since = None

    async def _until_disconnect(self, receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        # The flag too: a source that has more at every turn keeps the writer from being cancelled.
        self._has_gone = True
        scope.cancel()

    async def _watch(self, send: Send, abort: Callable[[], object]) -> None:
        """Ping in silence, until the reader stalls; then give it up."""
        clock = asyncio.get_running_loop().time
        is_stalled = False
        while not is_stalled:
            self._wrote = False
            await anyio.sleep(PING_S)
            while not is_stalled and (since := self._writing_since) is not None:
                # The write may be the last one, which no ping may follow.
                await anyio.sleep(max(0.0, since + READER_STALL_S - clock()))
                is_stalled = self._writing_since == since
            if self._pings and not (is_stalled or self._wrote):
                with anyio.move_on_after(READER_STALL_S) as limit:
                    await send({"type": "http.response.body", "body": PING_FRAME, "more_body": True})
                is_stalled = limit.cancelled_caught
        # Nothing can be said to it, as what was said before has not been taken.
        self._log_closed("stalled")
        abort()  # the disconnect that follows ends the response

    def _log_closed(self, reason: str) -> None:
        log.warning("reader_closed", reason=reason, job_id=self._job_id)
