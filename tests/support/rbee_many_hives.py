"""Hives that only tell that they are there: as many as a test wants, in its own process."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class FakeHive:
    """Answers what a queen asks of a hive that has nothing; `followers` counts who hears its heartbeats.

    Args:
        redirect: where every request is sent on to, instead of an answer.
        port: where it listens; a free one without.
    """

    def __init__(self, hive_id: str, redirect: str | None = None, port: int = 0) -> None:
        self.hive_id = hive_id
        self.redirect = redirect
        self.followers = 0
        self.port = port
        self.requests: list[str] = []
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    @property
    def announcement(self) -> dict[str, Any]:
        return {
            "hive_id": self.hive_id,
            "boot": f"boot-{self.hive_id}",
            "started_at": "2026-01-01T00:00:00Z",
            "version": "0.0.0",
            "port": self.port,
        }

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Cut every connection, and wait until that is done."""
        assert self._server is not None
        # A connection accepted just now has its task a few turns later, if the server is not closed by then.
        for listening in self._server.sockets:
            asyncio.get_running_loop().remove_reader(listening)
        for _ in range(5):
            await asyncio.sleep(0)
        self._server.close()
        for writer in self._open.values():
            writer.transport.abort()
        while self._open:
            await asyncio.wait(list(self._open))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        task.add_done_callback(self._open.pop)
        with suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split()[1]
            self.requests.append(path)
            if self.redirect is not None:
                answer = f"HTTP/1.1 307 Go\r\nLocation: {self.redirect}{path}\r\nContent-Length: 0\r\n\r\n"
                writer.write(answer.encode())
            elif path.startswith("/v1/heartbeats/stream"):
                await self._beat(reader, writer)
            elif path.startswith("/v1/events"):
                writer.write(_STREAM + b"id: b-0\n\n")
                await reader.read()
            else:
                body = b'{"jobs":[],"next_cursor":null}'
                length = f"Content-Length: {len(body)}\r\n\r\n"
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + length.encode() + body
                )
            await writer.drain()
        writer.close()

    async def _beat(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.followers += 1
        try:
            writer.write(_STREAM)
            while not writer.is_closing():
                beat = {
                    "hive_id": self.hive_id,
                    "boot": f"boot-{self.hive_id}",
                    "version": "0.0.0",
                    "timestamp": datetime.now(UTC).isoformat(),
                    "devices": [],
                    "workers": [],
                    "models": [],
                }
                writer.write(b"event: heartbeat\ndata: " + json.dumps(beat).encode() + b"\n\n")
                await writer.drain()
                with suppress(TimeoutError):
                    if not await asyncio.wait_for(reader.read(1), 1):
                        return
        finally:
            self.followers -= 1


@contextmanager
def fake_hives(*hives: FakeHive) -> Iterator[None]:
    """Run hives in a thread of their own."""
    started, over = threading.Event(), threading.Event()

    async def run() -> None:
        for hive in hives:
            await hive.start()
        started.set()
        await asyncio.to_thread(over.wait)
        for hive in hives:
            await hive.stop()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert started.wait(30)
        yield
    finally:
        over.set()
        thread.join(30)
