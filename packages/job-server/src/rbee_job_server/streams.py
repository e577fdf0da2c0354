"""Server-sent events on the wire: one ASGI response for whatever gives frames."""

import asyncio
from collections.abc import Callable
from typing import Protocol

import anyio
from starlette.types import Receive, Scope, Send

PING_S = 15.0
PING_FRAME = b": ping\n\n"

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class FrameSource(Protocol):
    """Where frames come from: a job's log, the firehose, heartbeats."""

    finished: bool

    def take(self) -> bytes:
        """Give all that is pending, in one piece; empty when nothing is."""

    async def wait(self) -> None:
        """Wait until `take` may have something."""


class EventStreamResponse:
    """Stream a source until it is finished or the client has gone; `on_close` is called either way.

    All that is pending leaves in one write. A client that has gone is noticed by its disconnect, not by
    a failing write. Pings are comments, sent when nothing else was for `PING_S`.
    """

    def __init__(self, source: FrameSource, *, head: bytes = b"", on_close: Callable[[], None]) -> None:
        self._source = source
        self._head = head
        self._on_close = on_close
        self._wrote = False
        self._writing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_until_disconnect, receive, tasks.cancel_scope)
                tasks.start_soon(self._ping, send)
                await self._write(send)
                tasks.cancel_scope.cancel()
        finally:
            self._on_close()

    async def _write(self, send: Send) -> None:
        source, head = self._source, self._head
        while True:
            frames, head = head + source.take(), b""
            if frames:
                self._wrote = self._writing = True
                await send({"type": "http.response.body", "body": frames, "more_body": not source.finished})
                self._writing = False
                # `send` returns at once when the client has gone: give the loop a turn, so that the
                # disconnect is seen, and so that what is said in the same turn leaves in one write.
                await asyncio.sleep(0)
            if source.finished:
                if not frames:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            if not frames:
                await source.wait()

    async def _ping(self, send: Send) -> None:
        while True:
            self._wrote = False
            await anyio.sleep(PING_S)
            # A write that waits for a slow reader may be the last one, which no ping may follow.
            if not (self._wrote or self._writing):
                await send({"type": "http.response.body", "body": PING_FRAME, "more_body": True})


async def _until_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
