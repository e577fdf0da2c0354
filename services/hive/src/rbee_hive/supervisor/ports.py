"""Ports for workers: the lowest that is free."""

import socket

from rbee_contracts.errors import NoCapacity
from rbee_hive.config import PortRange

BACKLOG = 1024


def listen_on_free_port(host: str, ports: PortRange) -> socket.socket:
    """Listen on the lowest port that nobody has.

    The socket is handed to the worker as it is, so nobody can take the port between choosing and using it.

    Raises:
        NoCapacity: all are taken.
    """
    for port in range(ports.first, ports.last + 1):
        sock = socket.socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
        else:
            return sock
    raise NoCapacity(
        f"No free port for a worker between {ports.first} and {ports.last}; stop a worker first.",
        code="no_port",
    )
