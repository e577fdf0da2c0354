"""Ports of this machine that stay a test's own while its services come and go."""

import socket
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"


class HeldPort:
    """A free port that nobody else is given until it is released; its text is its number.

    The kernel gives no other process a port to which a socket is bound, neither for a bind to port 0 nor for
    an outgoing connection. As this one never listens, a service may listen beside it: ours set SO_REUSEADDR.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((HOST, 0))
        self.number: int = self._socket.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.number}"

    def release(self) -> None:
        """Let others have it; it may be called again."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()

    def __str__(self) -> str:
        return str(self.number)
