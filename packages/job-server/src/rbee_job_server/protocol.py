"""HTTP on one connection, bounded: uvicorn's httptools protocol with what it has no limit for.

By itself it takes a head of any size, waits for the rest of a request for ever, and takes any number of
connections. Here a request is whole by a deadline, or its connection ends.
"""

import asyncio
from typing import Any, ClassVar

import msgspec
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from rbee_contracts.errors import ErrorBody
from rbee_contracts.ids import new_correlation_id
from rbee_job_server.errors import RETRY_AFTER_S
from rbee_job_server.guards import Limits
from rbee_job_server.streams import CONNECTION

LINGER_S = 1.0
"""How long a refused connection is still read, and what comes thrown away. Closing with bytes unread
resets the connection, and the caller loses the answer that says why."""

HELD_UP_S = 1.0
"""A deadline that comes this late says that this process was held up (an engine loading), not the caller."""


class HttpConnection:
    """What a response may do with the connection it goes out on: `streams.Connection`."""

    __slots__ = ("_flow", "_transport", "error")

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow
        self.error: Exception | None = None

    def abort(self) -> None:
        self._transport.abort()

    def is_writable(self) -> bool:
        return not (self._flow.write_paused or self._transport.is_closing())

    def write(self, body: bytes) -> None:
        # A response without a length, as our streams are, goes out in chunks; see uvicorn's `send`.
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class GuardedProtocol(HttpToolsProtocol):
    """Holds a connection to `limits`."""

    limits: ClassVar[Limits] = Limits()
    cycle: Any  # None until a request has come

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True  # of a request that has begun, or is yet to come
        self._is_partial = False  # a request has begun and is not here as a whole
        self._raw_bytes = 0  # since the head was awaited
        self._head_bytes = 0  # of the head's parts, as parsed
        self._is_refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._connection: HttpConnection | None = None

    # --- connection ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections and not self._makes_room():
            self._refuse(
                503,
                "Unavailable",
                f"This service has {self.limits.max_connections} connections open, and takes no more.",
                "too_many_connections",
            )
        else:
            self._arm()

    def _makes_room(self) -> bool:
        """Close a connection that idles between two requests: nobody waits for anything on it."""
        for other in self.connections:
            assert isinstance(other, HttpToolsProtocol)
            is_idle = other.timeout_keep_alive_task is not None and not other.transport.is_closing()
            if other is not self and is_idle:
                other.transport.close()
                return True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._connection is not None:
            self._connection.error = exc
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_over():
            return
        if self._in_head:
            self._raw_bytes += len(data)
        super().data_received(data)
        if self._is_over():
            return
        if self._in_head and self._raw_bytes > self.limits.max_head_bytes:
            self._refuse_head()
        elif self._is_partial or (not self._is_answering and self.timeout_keep_alive_task is None):
            # The second: bytes that begin no request (empty lines), which have ended uvicorn's own timer.
            if self._timer is None:
                self._arm()
        else:
            self._disarm()

    # --- parser ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if not self._is_refused:
            self._in_head = self._is_partial = True
            self._head_bytes = 0
            super().on_message_begin()
            self._connection = HttpConnection(self.transport, self.flow)
            self.scope["extensions"] = {CONNECTION: {"connection": self._connection}}

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        if not self._is_refused and self._head_bytes <= self.limits.max_head_bytes:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if not self._is_refused and self._head_bytes <= self.limits.max_head_bytes:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_refused:
            return
        if self._head_bytes > self.limits.max_head_bytes:
            self._refuse_head()
            return
        self._in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_refused:
            self._in_head, self._is_partial, self._raw_bytes = True, False, 0
            super().on_message_complete()

    def _is_over(self) -> bool:
        return self._is_refused or self.transport.is_closing()

    # --- deadline --------------------------------------------------------------------------------------

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not bool(self.cycle.response_complete)

    def _arm(self, seconds: float | None = None) -> None:
        seconds = self.limits.receive_deadline_s if seconds is None else seconds
        self._due = self.loop.time() + seconds
        self._timer = self.loop.call_later(seconds, self._on_deadline)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_deadline(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.loop.time() - self._due > HELD_UP_S:
            self._arm(HELD_UP_S)
            return
        is_body = self._is_partial and not self._in_head
        has_begun = self.cycle.response_started or bool(self.pipeline) if is_body else self._is_answering
        if has_begun:
            self.transport.abort()  # an answer is on its way; another cannot be put into it
            return
        if is_body:
            self.cycle.disconnected = True  # whoever waits for the body learns that it will not come
            self.cycle.message_event.set()
        self._refuse(
            408,
            "Request timeout",
            f"The request was not here as a whole within {self.limits.receive_deadline_s:g} s.",
            "request_timeout",
            linger_s=0,
        )

    # --- refusing --------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; uvicorn calls this."""
        self._refuse(400, "Invalid request", msg, "invalid_http")

    def _unsupported_upgrade_warning(self) -> None:
        """Serve what asks for an upgrade as if it had not; it is no news for the log."""

    def _refuse_head(self) -> None:
        self._refuse(
            431,
            "Request header fields too large",
            f"The request line and its headers have more than {self.limits.max_head_bytes} bytes.",
            "head_too_large",
        )

    def _refuse(self, status: int, error: str, details: str, code: str, linger_s: float = LINGER_S) -> None:
        """Answer without the app, read no more requests, and close."""
        self._is_refused = True
        self._disarm()
        self._unset_keepalive_if_required()
        if self._is_answering and not self.cycle.disconnected:
            self.transport.abort()
            return
        correlation_id = new_correlation_id()
        body = msgspec.json.encode(
            ErrorBody(error=error, details=details, code=code, correlation_id=correlation_id)
        )
        head = [
            STATUS_LINE[status].rstrip(),
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"x-correlation-id: " + correlation_id.encode(),
            b"connection: close",
        ]
        if status == 503:
            head.append(b"retry-after: %d" % RETRY_AFTER_S)
        self.transport.write(b"\r\n".join([*head, b"", body]))
        if linger_s and self.transport.can_write_eof():
            self.flow.resume_reading()
            self.transport.write_eof()
            self._timer = self.loop.call_later(linger_s, self.transport.abort)
        else:
            self.transport.close()


def guarded(limits: Limits) -> type[GuardedProtocol]:
    """Give the protocol with these limits, for uvicorn's `http` setting."""
    return type("GuardedProtocol", (GuardedProtocol,), {"limits": limits})
