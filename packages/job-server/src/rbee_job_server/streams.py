"""Server-sent events on the wire: one ASGI response for whatever gives frames."""

import asyncio
from collections.abc import Callable
from typing import Protocol

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
"""The ASGI extension of our server: `abort` gives up the connection, `error` is what it was lost by."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class FrameSource(Protocol):
    """Where frames come from: a job's log, the firehose, heartbeats."""

    finished: bool

    def take(self) -> bytes:
        """Give what is pending, in one piece; empty when nothing is."""

    async def wait(self) -> None:
        """Wait until `take` may have something."""


class EventStreamResponse:
    """Stream a source until it is finished or the client has gone; `on_close` is called either way.

    What is pending leaves in one write, in more where it is past `WRITE_BYTES`. A client that has gone is
    noticed by its disconnect, not by a failing write; one that stalls, by a write that takes
    `READER_STALL_S`. Pings are comments, sent when nothing else was for `PING_S`.
    """

    def __init__(
        self,
        source: FrameSource,
        *,
        head: bytes = b"",
        on_close: Callable[[], None],
        job_id: str | None = None,
    ) -> None:
        self._source = source
        self._head = head
        self._on_close = on_close
        self._job_id = job_id
        self._has_gone = False
        self._wrote = False
        self._writing_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope.get("extensions", {}).get(CONNECTION, {})
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._until_disconnect, receive, tasks.cancel_scope)
                tasks.start_soon(self._watch, send, connection.get("abort", tasks.cancel_scope.cancel))
                await self._stream(send)
                tasks.cancel_scope.cancel()
            if isinstance(connection.get("error"), TimeoutError):
                self._log_closed("unanswered")
        finally:
            self._on_close()

    async def _stream(self, send: Send) -> None:
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
                await source.wait()
                has_waited = True

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
                await anyio.sleep(since + READER_STALL_S - clock())
                is_stalled = self._writing_since == since
            if not (is_stalled or self._wrote):
                with anyio.move_on_after(READER_STALL_S) as limit:
                    await send({"type": "http.response.body", "body": PING_FRAME, "more_body": True})
                is_stalled = limit.cancelled_caught
        # Nothing can be said to it, as what was said before has not been taken.
        self._log_closed("stalled")
        abort()  # the disconnect that follows ends the response

    def _log_closed(self, reason: str) -> None:
        log.warning("reader_closed", reason=reason, job_id=self._job_id)
