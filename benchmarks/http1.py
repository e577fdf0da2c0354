"""One HTTP/1.1 connection that notes when what arrived: as little between clock and socket as can be."""

import asyncio
import time
from types import TracebackType
from typing import Self, cast

TIMEOUT_S = 60.0
END = b"\r\n0\r\n\r\n"


class Connection(asyncio.Protocol):
    """A kept connection to a service on this machine; one request at a time.

    The moments of the last request, on the clock of `time.perf_counter`: `sent`, `head_at` (its head is
    here), `first_event_at` (its first `data:` line), `answered`.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: asyncio.WriteTransport | None = None
        self._received = b""
        self._head = b""
        self._parts: list[bytes] = []
        self._length: int | None = None
        self._answer: asyncio.Future[bytes] | None = None
        self._event: asyncio.Event = asyncio.Event()
        self.sent = self.head_at = self.first_event_at = self.answered = 0.0

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    async def open(self) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self._port)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    async def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Give the body of the answer; a stream's whole, in its chunks.

        Raises:
            ConnectionError: the answer is an error, or none.
        """
        async with asyncio.timeout(TIMEOUT_S):
            return await self.start(method, path, body)

    def start(self, method: str, path: str, body: bytes = b"") -> "asyncio.Future[bytes]":
        """Send a request; its answer comes later."""
        assert self._transport is not None
        self._head, self._parts, self._length = b"", [], None
        self.head_at = self.first_event_at = self.answered = 0.0
        self._event.clear()
        self._answer = asyncio.get_running_loop().create_future()
        kind = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body else ""
        self.sent = time.perf_counter()
        self._transport.write(f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{kind}\r\n".encode() + body)
        return self._answer

    async def until_first_event(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self._event.wait()

    # --- asyncio's side --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionError("the connection was closed"))
            self._answer.exception()  # whoever closed it may not ask

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.head_at:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            self._head = head.lower()
            self.head_at = now
            _, has_length, length = self._head.partition(b"content-length:")
            self._length = int(length.split(b"\r\n")[0]) if has_length else None
        self._parts.append(data)
        if not self.first_event_at and b"data: " in data:
            self.first_event_at = now
            self._event.set()
        if self._length is None:
            is_end = data.endswith(END) or (len(data) < len(END) and b"".join(self._parts[-8:]).endswith(END))
        else:
            is_end = sum(map(len, self._parts)) >= self._length
        if is_end:
            self.answered = now
            self._finish(b"".join(self._parts))

    def _finish(self, body: bytes) -> None:
        assert self._answer is not None
        if b" 200" in self._head[:13] or b" 202" in self._head[:13]:
            self._answer.set_result(body)
        else:
            self._answer.set_exception(ConnectionError(f"{self._head[:40]!r}: {body[:300]!r}"))
