"""Ports for workers: from 9300 up, the lowest that is free."""

import socket
from collections.abc import Collection

from rbee_contracts.errors import NoCapacity

FIRST_PORT = 9300
LAST_PORT = 9999


def choose_port(taken: Collection[int], host: str = "127.0.0.1") -> int:
    """Give a port that is neither in `taken` nor listened on.

    Raises:
        NoCapacity: all are taken.
    """
    for port in range(FIRST_PORT, LAST_PORT + 1):
        if port not in taken and _is_free(host, port):
            return port
    raise NoCapacity(f"No free port for a worker between {FIRST_PORT} and {LAST_PORT}; stop a worker first.")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
